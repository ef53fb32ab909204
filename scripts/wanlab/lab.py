"""A lab that is up: hosts in namespaces, the forwarder between them. Python's door to it; __main__.py is the shell's.

What is up is written down in /run/wanlab/NAME before anything is made, so that any process can use the lab, and take
down even one that came up half way. Everything a lab makes has a name that follows from its topology.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from swarm.errors import ConfigError, SwarmError
from wanlab import forwarder, machine, namespaces, processes, topology
from wanlab.requirements import missing
from wanlab.topology import Topology

CONGESTION_CONTROL = "net.ipv4.tcp_congestion_control"


class Lab:
    """`with Lab(name, topology) as lab`: up inside, down afterwards. Lab.running(name): one that is up already."""

    def __init__(self, name: str, topology: Topology) -> None:
        self.topology = topology
        """what was asked for; set_link and set_path change it"""
        self.name, self._folder = name, _folder(name)

    @classmethod
    def running(cls, name: str) -> Lab:
        return cls(name, _read(_folder(name)))

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # ---- up and down ----

    def up(self) -> None:
        if lacking := missing():
            raise SwarmError(
                "this machine cannot run a WAN lab", why=f"it lacks: {', '.join(lacking)}",
                do="on Debian and Ubuntu: apt install iproute2 iptables gcc libc6-dev; and be root",
            )
        with machine.locked():
            self._claim()
        try:
            self._build()
        except BaseException:
            self.down()
            raise

    def _claim(self) -> None:
        if self._folder.exists():
            do = "take it down first, or choose another name (--lab)"
            raise SwarmError(f"lab {self.name!r} is up already", do=do)
        if taken := [namespace for namespace in self._namespaces() if namespaces.exists(namespace)]:
            why = f"these namespaces are somebody else's: {', '.join(taken)}"
            raise SwarmError(f"lab {self.name!r} cannot be built", why=why, do="choose another name (--lab)")
        new = machine.RUN / f".{self.name}"
        new.mkdir(exist_ok=True)
        _write(new, self.topology)
        new.rename(self._folder)

    def _build(self) -> None:
        for namespace in self._namespaces():
            namespaces.add(namespace)
        forwarder.start(self._folder)
        hosts = self.hosts
        lines = [f"seed {self.topology.seed}"]
        lines += [f"host {host} {namespaces.NETNS / self._router(host)} {self.public_ip(host)}" for host in hosts]
        lines += [forwarder.link_line(self.topology, host) for host in hosts]
        lines += [forwarder.path_line(self.topology, a, b) for a in hosts for b in hosts if a != b]
        forwarder.tell(self._folder, lines)
        with machine.locked():
            machine.allow(self.topology.sysctls[CONGESTION_CONTROL])
        for namespace in self._namespaces():
            namespaces.set_sysctls(namespace, dict(self.topology.sysctls))
        for host in hosts:
            self._set_up(host)

    def _set_up(self, host: str) -> None:
        settings, router = self.topology.host(host), self._router(host)
        prefix_length = ipaddress.IPv4Network(self.topology.network).prefixlen
        namespaces.set_up_wan(router, settings, self.public_ip(host), prefix_length)
        if settings.nat:
            namespaces.set_up_home(self._namespace(host), router, settings, self.ip(host))
        addresses = {other: self.public_ip(other) for other in self.hosts}
        namespaces.write_names(self._namespace(host), {**addresses, host: self.ip(host)})

    def down(self) -> None:
        """End what runs in the lab and remove all of it, however much of it there is."""
        _read(self._folder)
        forwarder.stop(self._folder)
        failures = []
        for namespace in self._namespaces():
            try:
                namespaces.remove(namespace)
            except SwarmError as error:
                failures.append(f"{error.what}: {error.why}")
        if failures:
            raise SwarmError(f"lab {self.name!r} is not wholly down", why="; ".join(failures), do="take it down again")
        with machine.locked():
            shutil.rmtree(self._folder, ignore_errors=True)

    # ---- use ----

    @property
    def hosts(self) -> list[str]:
        return self.topology.names

    def ip(self, host: str) -> str:
        """The address that the host itself has."""
        if not self.topology.host(host).nat:
            return self.public_ip(host)
        return f"192.168.{1 + self.hosts.index(host)}.2"

    def public_ip(self, host: str) -> str:
        """The address that others see."""
        return self.topology.public_ip(host)

    def command(self, host: str, argv: list[str]) -> list[str]:
        """Words for subprocess.Popen that run `argv` on that host."""
        return ["ip", "netns", "exec", self._namespace(host), *argv]

    def environment(self, host: str) -> dict[str, str]:
        """Variables, besides the usual ones, for a process on that host."""
        own, public = self.ip(host), self.public_ip(host)
        return {"WANLAB": self.name, "WANLAB_HOST": host, "WANLAB_IP": own, "WANLAB_PUBLIC_IP": public}

    def cut(self, host: str, peer: str | None = None) -> None:
        """Silence, of a host or of one pair: packets vanish, nobody is told."""
        self._cut(host, peer, 1)

    def heal(self, host: str, peer: str | None = None) -> None:
        self._cut(host, peer, 0)

    def _cut(self, host: str, peer: str | None, value: int) -> None:
        if peer is None:
            lines = [f"cut {self.topology.host(host).name} {value}"]
        else:
            a, b = self.topology.pair(host, peer).between
            lines = [f"cutpath {a} {b} {value}", f"cutpath {b} {a} {value}"]
        forwarder.tell(self._folder, lines)

    def kill(self, host: str) -> None:
        """Power failure: silence, then its processes end. Heal it before it is used again."""
        self.cut(host)
        self.crash(host)

    def crash(self, host: str) -> None:
        """Its processes end at once; its kernel lives and closes their connections."""
        processes.end_in_namespace(namespaces.NETNS / self._namespace(host))

    def set_link(
        self, host: str, *, up_bits_per_s: float | None = None, down_bits_per_s: float | None = None,
        queue_s: float | None = None,
    ) -> None:
        """While it runs; None: as it was."""
        changes = {"up_bits_per_s": up_bits_per_s, "down_bits_per_s": down_bits_per_s, "queue_s": queue_s}
        given = {key: value for key, value in changes.items() if value is not None}
        self._change(lambda before: before.with_link(host, **given))
        forwarder.tell(self._folder, [forwarder.link_line(self.topology, host)])

    def set_path(
        self, a: str, b: str, *, latency_s: float | None = None, jitter_s: float | None = None,
        loss: float | None = None,
    ) -> None:
        """While it runs, both directions; None: as it was. The latency is one way."""
        changes = {"latency_s": latency_s, "jitter_s": jitter_s, "loss": loss}
        given = {key: value for key, value in changes.items() if value is not None}
        self._change(lambda before: before.with_path(a, b, **given))
        forwarder.tell(self._folder, [forwarder.path_line(self.topology, *ends) for ends in ((a, b), (b, a))])

    def stats(self) -> dict[str, dict[str, float]]:
        """Counters of every host and of the forwarder; README.md says what they mean."""
        found: dict[str, dict[str, float]] = {}
        for line in forwarder.tell(self._folder, ["stats"]).splitlines():
            name, *counters = line.split()
            pairs = (counter.split("=") for counter in counters)
            found[name] = {key: float(value) if "." in value else int(value) for key, value in pairs}
        for host in self.hosts:
            found[host].update(namespaces.wan_counters(self._router(host)))
        return found

    def is_running(self) -> bool:
        """Whether the forwarder lives: without it no packet moves."""
        return forwarder.is_running(self._folder)

    def _change(self, change: Callable[[Topology], Topology]) -> None:
        """From what is written down, which another process may have changed since."""
        with machine.locked():
            self.topology = change(_read(self._folder))
            _write(self._folder, self.topology)

    def _namespace(self, host: str) -> str:
        return f"{self.name}.{self.topology.host(host).name}"

    def _router(self, host: str) -> str:
        """Where wan0 is."""
        return self._namespace(host) + (".nat" if self.topology.host(host).nat else "")

    def _namespaces(self) -> list[str]:
        return list(dict.fromkeys(name for host in self.hosts for name in (self._namespace(host), self._router(host))))


def _folder(name: str) -> Path:
    if not re.fullmatch(r"[a-z0-9]{1,16}", name):
        raise ConfigError(f"{name!r} cannot be a lab's name", do="take 1 to 16 lower-case letters and digits")
    return machine.RUN / name


def _read(folder: Path) -> Topology:
    try:
        return topology.from_json(json.loads((folder / "lab.json").read_text()))
    except FileNotFoundError:
        up = machine.labs()
        do = f"up are: {', '.join(up)} (--lab NAME)" if up else "bring one up: python scripts/wanlab up home-100"
        raise SwarmError(f"lab {folder.name!r} is not up", do=do) from None
    except (KeyError, TypeError, ValueError) as error:
        do = "take it down with the one that made it"
        raise SwarmError(f"lab {folder.name!r} was made by another version of this program", do=do) from error


def _write(folder: Path, topology: Topology) -> None:
    machine.write(folder / "lab.json", json.dumps(dataclasses.asdict(topology), indent=1))
