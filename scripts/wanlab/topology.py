"""What a lab looks like: its hosts, their access links, and the paths between them. Pure: nothing is touched here.

A topology is a YAML file (README.md has the format); the ready-made ones lie in peers/topologies, where
`python -m swarm.plan` finds them too, and go by their names. Rates are written "100mbit", times "20ms", losses "0.1%".
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from swarm.errors import ConfigError
from swarm.units import RATE_UNITS, TIME_UNITS, parse_quantity

READY_MADE = Path(__file__).resolve().parents[2] / "peers" / "topologies"
MAX_HOSTS = 64
"""what forwarder.c has room for"""
NATS = ("", "cone", "symmetric")
RESERVED = ("forwarder", "localhost")
LOSSES = {"%": 1e-2}
SYSCTLS = {
    "net.ipv6.conf.all.disable_ipv6": "1",  # its packets would go nowhere, and its timers make noise
    "net.ipv6.conf.default.disable_ipv6": "1",
    "net.ipv4.tcp_congestion_control": "cubic",  # what home machines have, whatever this one has
}


@dataclass(frozen=True)
class Host:
    """One machine and its access link. Rates: 0 is unlimited. Latency, jitter and loss: from the host to the core."""

    name: str
    up_bits_per_s: float = 0.0
    down_bits_per_s: float = 0.0
    queue_s: float = 0.1
    latency_s: float = 0.01
    jitter_s: float = 0.0
    loss: float = 0.0
    nat: str = ""
    forward: tuple[int, ...] = ()
    """ports that its router passes on to it, tcp and udp"""


@dataclass(frozen=True)
class Pair:
    """What is special between two hosts, both directions; None: what follows from their access links."""

    between: tuple[str, str]
    latency_s: float | None = None
    jitter_s: float | None = None
    loss: float | None = None
    bits_per_s: float = 0.0
    """of the path itself, in each direction; 0: only the access links limit"""


@dataclass(frozen=True)
class Topology:
    hosts: tuple[Host, ...]
    pairs: tuple[Pair, ...] = ()
    network: str = "10.77.0.0/16"
    seed: int = 1
    """of loss and jitter"""
    sysctls: Mapping[str, str] = field(default_factory=lambda: dict(SYSCTLS))

    @property
    def names(self) -> list[str]:
        return [host.name for host in self.hosts]

    def host(self, name: str) -> Host:
        for host in self.hosts:
            if host.name == name:
                return host
        raise ConfigError(f"there is no host {name!r} in this lab", do=f"name one of: {', '.join(self.names)}")

    def pair(self, a: str, b: str) -> Pair:
        self.host(a), self.host(b)
        if a == b:
            raise ConfigError(f"a path leads from one host to another, not from {a!r} to itself")
        return next((pair for pair in self.pairs if set(pair.between) == {a, b}), Pair((a, b)))

    def public_ip(self, name: str) -> str:
        return str(ipaddress.IPv4Network(self.network)[1 + self.hosts.index(self.host(name))])

    def up_bits_per_s(self, name: str) -> float:
        return self.host(name).up_bits_per_s

    def down_bits_per_s(self, name: str) -> float:
        return self.host(name).down_bits_per_s

    def latency_s(self, a: str, b: str) -> float:
        """One way."""
        special = self.pair(a, b).latency_s
        return self.host(a).latency_s + self.host(b).latency_s if special is None else special

    def jitter_s(self, a: str, b: str) -> float:
        special = self.pair(a, b).jitter_s
        return self.host(a).jitter_s + self.host(b).jitter_s if special is None else special

    def loss(self, a: str, b: str) -> float:
        special = self.pair(a, b).loss
        return 1 - (1 - self.host(a).loss) * (1 - self.host(b).loss) if special is None else special

    def with_link(self, name: str, **changes: Any) -> Topology:
        changed = replace(self.host(name), **changes)
        return replace(self, hosts=tuple(changed if host.name == name else host for host in self.hosts))

    def with_path(self, a: str, b: str, **changes: Any) -> Topology:
        pair = self.pair(a, b)
        return replace(self, pairs=(*(p for p in self.pairs if p != pair), replace(pair, **changes)))


def available() -> list[str]:
    """Names of the ready-made topologies."""
    return sorted(path.stem for path in READY_MADE.glob("*.yaml"))


def load(name_or_path: str | Path) -> Topology:
    """A ready-made topology by its name, or one's own by its file."""
    ready_made = str(name_or_path) in available()
    path = READY_MADE / f"{name_or_path}.yaml" if ready_made else Path(name_or_path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        do = f"name a YAML file or one of: {', '.join(available())}"
        raise ConfigError(f"there is no topology {str(name_or_path)!r}", do=do) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a topology", why=" ".join(str(error).split())) from error
    try:
        return parse(document)
    except ConfigError as error:
        error.what = f"{path}: {error.what}"
        raise


def parse(document: Any) -> Topology:
    """The content of a topology file."""
    top = _settings(document, "a topology", ("network", "seed", "defaults", "hosts", "pairs", "sysctls"))
    defaults = _host_settings(top.get("defaults"), "defaults")
    named = top.get("hosts")
    if not isinstance(named, dict) or not 1 <= len(named) <= MAX_HOSTS:
        raise ConfigError(f"a topology needs 1 to {MAX_HOSTS} hosts", do="write them below `hosts:`, one `name:` each")
    hosts = tuple(
        Host(_host_name(name), **{**defaults, **_host_settings(own, f"host {name}")}) for name, own in named.items()
    )
    pairs = _pairs(top.get("pairs"), [host.name for host in hosts])
    seed = top.get("seed", 1)
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise ConfigError(f"seed: {seed!r} is not a whole number from 0 to {2**31 - 1}")
    network = _network(top.get("network", "10.77.0.0/16"), len(hosts))
    return Topology(hosts, pairs, network, seed, {**SYSCTLS, **_sysctls(top.get("sysctls"))})


def from_json(document: dict[str, Any]) -> Topology:
    """What dataclasses.asdict made of a topology."""
    hosts = tuple(Host(**{**host, "forward": tuple(host["forward"])}) for host in document["hosts"])
    pairs = tuple(Pair(**{**pair, "between": tuple(pair["between"])}) for pair in document["pairs"])
    return Topology(**{**document, "hosts": hosts, "pairs": pairs})


def parse_rate(value: Any) -> float:
    """ "100mbit" -> 1e8 bits a second; 0 is unlimited."""
    return _quantity(value, RATE_UNITS, example="100mbit")


def parse_time(value: Any) -> float:
    """ "20ms" -> 0.02 seconds."""
    return _quantity(value, TIME_UNITS, example="20ms")


def parse_loss(value: Any) -> float:
    """ "0.1%" -> 0.001"""
    loss = _quantity(value, LOSSES, example="0.1%")
    if loss > 1:
        raise ConfigError(f"{value!r} is more than everything", do="write a loss from 0 to 100%")
    return loss


def _quantity(value: Any, units: dict[str, float], *, example: str) -> float:
    try:
        return parse_quantity(value, units, example=example)
    except ValueError:
        do = f"write a number and a unit ({', '.join(units)}), such as {example}"
        raise ConfigError(f"cannot read {value!r}", do=do) from None


def _settings(value: Any, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ConfigError(f"{where} consists of settings, not of {value!r}")
    if unknown := [str(key) for key in value if key not in known]:
        raise ConfigError(f"{where}: unknown: {', '.join(unknown)}", do=f"the settings are: {', '.join(known)}")
    return value


def _read(value: dict[str, Any], where: str, keys: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """{setting in the file: (field, parser)} -> {field: value}, of the settings that are there."""
    found = {}
    for key, (name, parser) in keys.items():
        if key in value:
            try:
                found[name] = parser(value[key])
            except ConfigError as error:
                error.what = f"{where}: {key}: {error.what}"
                raise
    return found


def _host_settings(value: Any, where: str) -> dict[str, Any]:
    keys = {
        "up": ("up_bits_per_s", parse_rate), "down": ("down_bits_per_s", parse_rate), "queue": ("queue_s", parse_time),
        "latency": ("latency_s", parse_time), "jitter": ("jitter_s", parse_time), "loss": ("loss", parse_loss),
        "nat": ("nat", _nat), "forward": ("forward", _ports),
    }  # fmt: skip
    return _read(_settings(value, where, tuple(keys)), where, keys)


def _pairs(value: Any, names: list[str]) -> tuple[Pair, ...]:
    if not isinstance(value or [], list):
        raise ConfigError("pairs: it is not a list", do="begin each with `- between: [a, b]`")
    keys = {
        "latency": ("latency_s", parse_time), "jitter": ("jitter_s", parse_time), "loss": ("loss", parse_loss),
        "rate": ("bits_per_s", parse_rate),
    }  # fmt: skip
    pairs: list[Pair] = []
    for entry in value or []:
        between = _settings(entry, "a pair", ("between", *keys)).get("between")
        if not isinstance(between, list) or len(between) != 2 or not set(map(str, between)) <= set(names):
            raise ConfigError(f"a pair is between two hosts, not {between!r}", do=f"the hosts are: {', '.join(names)}")
        a, b = between
        if a == b or any(set(pair.between) == {a, b} for pair in pairs):
            raise ConfigError(f"the pair {a}, {b} " + ("is one host" if a == b else "is there twice"))
        pairs.append(Pair((a, b), **_read(entry, f"pair {a}, {b}", keys)))
    return tuple(pairs)


def _host_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9-]{0,23}", name) or name in RESERVED:
        do = f"take 1 to 24 lower-case letters, digits and -, a letter first; {' and '.join(RESERVED)} are taken"
        raise ConfigError(f"{name!r} cannot be a host's name", do=do)  # YAML reads y and n as truth values, too
    return name


def _nat(value: Any) -> str:
    if value not in NATS:
        raise ConfigError(f"there is no NAT called {value!r}", do="write cone or symmetric, or leave it out")
    return str(value)


def _ports(value: Any) -> tuple[int, ...]:
    ports = value if isinstance(value, list) else [value]
    if not all(type(port) is int and 1 <= port <= 65535 for port in ports):
        raise ConfigError(f"{value!r} are not ports", do="write a list such as [4001]")
    return tuple(ports)


def _network(value: Any, num_hosts: int) -> str:
    try:
        network = ipaddress.IPv4Network(value)
    except ValueError as error:
        raise ConfigError(f"network: {value!r} is not one", why=str(error), do="write 10.77.0.0/16, say") from None
    if network.num_addresses - 2 < num_hosts:
        raise ConfigError(f"network: {value} has no room for {num_hosts} hosts", do="take a larger one")
    if network.overlaps(ipaddress.IPv4Network("192.168.0.0/16")):
        raise ConfigError(f"network: {value} overlaps 192.168.0.0/16", why="the homes behind NAT are there")
    return str(network)


def _sysctls(value: Any) -> dict[str, str]:
    if not isinstance(value or {}, dict):
        raise ConfigError("sysctls: it is not a table", do="write `net.ipv4.tcp_rmem: 4096 131072 6291456`, say")
    for key in value or {}:
        if not re.fullmatch(r"net(\.[a-z0-9_-]+)+", str(key)):
            raise ConfigError(f"sysctls: {key!r} is not below net.", why="no other belongs to a namespace of its own")
    return {str(key): str(setting) for key, setting in (value or {}).items()}
