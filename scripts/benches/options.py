"""What the benchmarks in the lab have in common: their flags, the run that is measured, and the lab itself."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from wanlab.lab import Lab
from wanlab.topology import Topology, load

from benches.systems import SYSTEMS, System
from swarm.config import AveragingConfig, RunConfig, TrainConfig, canonical_json, load_run, run_from_dict
from swarm.errors import ConfigError
from swarm.host.presets import preset_path

LAB = "bench"
ENDLESS_TOKENS = 10**12
"""so that no schedule ends while something is measured"""
SECTIONS = {"train": TrainConfig, "averaging": AveragingConfig}
OURS = "swarm"


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="run config (the demo run); its schedule is made longer where needed")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="train and averaging settings, as in the run config"
    )
    parser.add_argument("--seed", type=int, help="of weights and data (the run's)")


def add_places(parser: argparse.ArgumentParser, *, topologies: list[str], peers: list[int]) -> None:
    parser.add_argument(
        "--topology", nargs="+", default=topologies, metavar="NAME",
        help=f"of the WAN lab, ready-made or a file ({' '.join(topologies)})",
    )
    parser.add_argument(
        "--peers", nargs="+", type=int, default=peers, metavar="N",
        help=f"the first N hosts of the topology ({' '.join(map(str, peers))})",
    )


def add_systems(parser: argparse.ArgumentParser, choices: list[str] | None = None) -> None:
    known = choices or [name for name in SYSTEMS if name != "alone"]
    parser.add_argument("--system", nargs="+", default=[OURS], choices=known, help="what to measure (swarm)")


def systems(names: list[str]) -> list[System]:
    """Raises ConfigError where one of them cannot run here."""
    chosen = [SYSTEMS[name] for name in dict.fromkeys(names)]
    for system in chosen:
        if reason := system.available():
            do = 'pip install -e ".[bench]" brings the rivals; or leave it out of --system'
            raise ConfigError(f"{system.name} cannot be measured here", why=reason, do=do)
    return chosen


@contextlib.contextmanager
def lab(topology: Topology) -> Iterator[Lab]:
    """Raises ConfigError where this machine has no labs."""
    from wanlab.requirements import missing

    if lacking := missing():
        do = "on Debian and Ubuntu: apt install iproute2 iptables gcc libc6-dev; and be root"
        raise ConfigError("this machine cannot run a WAN lab", why=f"it lacks: {', '.join(lacking)}", do=do)
    with Lab(LAB, topology) as up:
        yield up


def places(options: argparse.Namespace) -> list[tuple[str, Topology, list[int]]]:
    """(name, topology, numbers of peers) of what was asked for. Raises ConfigError where there are too few hosts."""
    found = []
    for name in options.topology:
        topology = load(name)
        if max(options.peers) > len(topology.hosts):
            why = f"it has {len(topology.hosts)} hosts"
            raise ConfigError(f"{name} is too small for {max(options.peers)} peers", why=why, do="give fewer --peers")
        found.append((Path(name).stem, topology, options.peers))
    return found


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """For homes, weights and logs. Short, because sockets lie in homes and their paths must be."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        yield Path(name)


def run_of(options: argparse.Namespace) -> RunConfig:
    """The run config that was asked for, with --set and --seed."""
    run = load_run(options.run or preset_path("runs/demo.yaml"))
    return changed(run, settings(options.set), seed=options.seed)


def settings(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """["bits=8"] -> {"averaging": {"bits": 8}}"""
    found: dict[str, dict[str, Any]] = {}
    homes = {field.name: section for section, cls in SECTIONS.items() for field in fields(cls)}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in homes or not value:
            do = f"write KEY=VALUE with one of: {', '.join(homes)}"
            raise ConfigError(f"--set does not know {pair!r}", do=do)
        found.setdefault(homes[key], {})[key] = yaml.safe_load(value)
    return found


def changed(run: RunConfig, changes: dict[str, Any], *, seed: int | None = None) -> RunConfig:
    """Sections are merged, other keys replaced. Raises ConfigError."""
    document = json.loads(canonical_json(run))
    for key, value in changes.items():
        document[key] = {**document[key], **value} if key in SECTIONS else value
    if seed is not None:
        document["seed"] = seed
    return run_from_dict(document, origin="the benchmark's run")


def endless(run: RunConfig) -> RunConfig:
    return changed(run, {"train": {"total_tokens": ENDLESS_TOKENS}})


def write(run: RunConfig, file: Path) -> Path:
    """As YAML, by way of JSON, which knows no tuples."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(json.loads(canonical_json(run))), encoding="utf-8")
    return file
