"""Lines of home machines, as people know them ("20 up, 100 down, 30 ms") or as a topology of the WAN lab has them.

A line goes from a machine to the core of the network, and two machines are the sum of both apart. A topology file may
say otherwise of a pair (the format: scripts/wanlab/README.md). What a plan has no use for is passed over there:
queues, jitter, loss, NAT, addresses. Pure, but for the reading of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from swarm.errors import ConfigError
from swarm.host.presets import preset_path
from swarm.units import RATE_UNITS, TIME_UNITS, parse_quantity

MAX_LINES = 64
"""as many hosts as a lab may have, and members as a round"""
DEFAULT_LATENCY_S = 0.01
"""one way, of a host that says nothing of it: as in the lab"""
TOP = {"network", "seed", "defaults", "hosts", "pairs", "sysctls"}
HOST = {"up", "down", "latency", "queue", "jitter", "loss", "nat", "forward"}
PAIR = {"between", "latency", "rate", "jitter", "loss"}
EXAMPLE = "20/100/30ms: Mbit/s up, Mbit/s down, milliseconds there and back to another peer"


@dataclass(frozen=True)
class Line:
    """Of one machine. Rates: 0 is unlimited."""

    name: str
    up_bits_per_s: float = 0.0
    down_bits_per_s: float = 0.0
    latency_s: float = DEFAULT_LATENCY_S
    """one way, to the core"""


@dataclass(frozen=True)
class Pair:
    """What is special between two machines, in both directions."""

    between: tuple[str, str]
    latency_s: float | None = None
    """one way; None: the sum of both lines'"""
    bits_per_s: float = 0.0
    """of the path itself; 0: only the lines limit"""


@dataclass(frozen=True)
class Lines:
    lines: tuple[Line, ...]
    pairs: tuple[Pair, ...] = ()
    name: str = ""

    def __len__(self) -> int:
        return len(self.lines)

    def latency_s(self, a: Line, b: Line) -> float:
        """One way."""
        special = self._pair(a, b).latency_s
        return a.latency_s + b.latency_s if special is None else special

    def bits_per_s(self, a: Line, b: Line) -> float:
        """Of the path between them; 0: unlimited."""
        return self._pair(a, b).bits_per_s

    def first(self, count: int) -> Lines:
        """The first so many. One line alone stands for as many like it. Raises ConfigError where there are too few."""
        if len(self.lines) == 1 and count > 1:
            [line] = self.lines
            return replace(self, lines=tuple(replace(line, name=f"{line.name} ({i + 1})") for i in range(count)))
        if count > len(self.lines):
            raise ConfigError(
                f"{count} peers for each fragment need a line each", why=f"there are {len(self.lines)}",
                do="give fewer --replicas, a larger topology, or one --line that all of them have",
            )
        return replace(self, lines=self.lines[:count])

    def _pair(self, a: Line, b: Line) -> Pair:
        return next((pair for pair in self.pairs if {*pair.between} == {a.name, b.name}), Pair((a.name, b.name)))


def parse_line(text: str) -> Line:
    """ "20/100/30ms" -> 20 Mbit/s up, 100 down, and 30 ms there and back between two such machines: a quarter of it is
    one line, one way. Raises ConfigError."""
    parts = text.replace(" ", "").lower().split("/")
    numbers = [float(part) for part in parts[:2] if re.fullmatch(r"[0-9]+(\.[0-9]+)?", part)]
    try:
        if len(parts) != 3 or len(numbers) != 2 or not 0 < min(numbers) <= max(numbers) <= 1e6:
            raise ValueError("it needs two rates over 0, up to 1,000,000 Mbit/s, and a time")
        return Line(text, numbers[0] * 1e6, numbers[1] * 1e6, _time(parts[2]) / 4)
    except ValueError as error:
        raise ConfigError(f"--line {text} cannot be understood", why=str(error), do=f"write {EXAMPLE}") from None


def read_topology(name_or_file: str) -> Lines:
    """A ready-made topology by its name, or one's own by its file. Raises ConfigError."""
    path = Path(name_or_file)
    if name_or_file in ready_made():
        path = preset_path(f"topologies/{name_or_file}.yaml")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        do = f"name a YAML file or one of: {', '.join(ready_made())}"
        raise ConfigError(f"there is no topology {name_or_file!r}", do=do) from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        why, do = " ".join(str(error).split())[:300], "scripts/wanlab/README.md has the format"
        raise ConfigError(f"{path} cannot be read as a topology", why=why, do=do) from None
    try:
        return replace(parse_topology(document), name=path.stem)
    except ValueError as error:
        do = "scripts/wanlab/README.md has the format"
        raise ConfigError(f"{path} is not a topology", why=str(error), do=do) from None


def ready_made() -> list[str]:
    """Names of the topologies that come with the program."""
    return sorted(file.stem for file in preset_path("topologies/home-100.yaml").parent.glob("*.yaml"))


def parse_topology(document: Any) -> Lines:
    """The content of a topology file. Raises ValueError."""
    top = _settings(document, "a topology", TOP)
    defaults, hosts = _settings(top.get("defaults"), "defaults", HOST), top.get("hosts")
    if not isinstance(hosts, dict) or not 1 <= len(hosts) <= MAX_LINES:
        raise ValueError(f"it needs 1 to {MAX_LINES} hosts")
    lines = []
    for name, own in hosts.items():
        said = {**defaults, **_settings(own, f"host {name}", HOST)}
        lines.append(Line(
            str(name), _rate(said.get("up", 0)), _rate(said.get("down", 0)),
            _time(said["latency"]) if "latency" in said else DEFAULT_LATENCY_S,
        ))
    if not isinstance(top.get("pairs") or [], list):
        raise ValueError("pairs: it is not a list")
    names = {line.name for line in lines}
    return Lines(tuple(lines), tuple(_pair(entry, names) for entry in top.get("pairs") or []))


def _pair(entry: Any, names: Collection[str]) -> Pair:
    said = _settings(entry, "a pair", PAIR)
    between = said.get("between")
    if not isinstance(between, list) or len(between) != 2 or not {*map(str, between)} <= {*names}:
        raise ValueError(f"a pair is between two of its hosts, not {between!r}")
    latency_s = _time(said["latency"]) if "latency" in said else None
    return Pair((str(between[0]), str(between[1])), latency_s, _rate(said.get("rate", 0)))


def _settings(value: Any, where: str, known: Collection[str]) -> Mapping[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError(f"{where} consists of settings, not of {value!r}")
    if unknown := [str(key) for key in value if key not in known]:
        raise ValueError(f"{where}: unknown: {', '.join(unknown)}")
    return value


def _rate(value: Any) -> float:
    return parse_quantity(value, RATE_UNITS, example="100mbit")


def _time(value: Any) -> float:
    seconds = parse_quantity(value, TIME_UNITS, example="20ms")
    if not math.isfinite(seconds) or seconds > 60:
        raise ValueError(f"{value} is no latency: more than a minute")
    return seconds
