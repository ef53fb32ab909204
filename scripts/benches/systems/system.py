"""What the benchmarks know of a system: how its peers are started, what they need beside them, where weights end up.

Light on purpose (no torch, no rival): whoever lists the systems, or reads the help, waits for nothing.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from swarm.config import canonical_json, load_run

THREADS = 1
"""of torch in each peer: all systems get the same share of a machine"""


@dataclass(frozen=True)
class Setup:
    """One swarm that is to be measured."""

    run: Path
    """run config, YAML"""
    num_peers: int
    until_tokens: int | None
    """of the whole swarm; None: the run's own total"""
    folder: Path
    """of this swarm alone: homes, weights, logs"""
    seed: int


class System(Protocol):
    """One way to train a run with several peers. A peer is one process a host; scripts/benches/systems/process.py
    says what it prints."""

    name: str
    settings: str
    """one line for the table: which documented settings were chosen, and why"""

    def available(self) -> str:
        """Empty, or why it cannot run here."""

    def helpers(self, setup: Setup, ips: list[str]) -> list[tuple[int, list[str]]]:
        """Processes beside the peers, (index of the host, argv): started before them, killed at the end."""

    def command(self, setup: Setup, number: int, ips: list[str], join: list[str]) -> list[str]:
        """argv of peer `number`. `ips`: addresses of all hosts; `join`: maddrs of peer 0, of the product only."""

    def weights(self, setup: Setup, number: int) -> Path:
        """Where that peer's final weights lie (safetensors, Hugging Face names)."""


@dataclass(frozen=True)
class Script:
    """A system whose peer is a script of this folder."""

    name: str
    settings: str
    file: str
    flags: tuple[str, ...] = ()

    def available(self) -> str:
        return ""

    def helpers(self, setup: Setup, ips: list[str]) -> list[tuple[int, list[str]]]:
        return []

    def command(self, setup: Setup, number: int, ips: list[str], join: list[str]) -> list[str]:
        until = [] if setup.until_tokens is None else ["--until-tokens", str(setup.until_tokens)]
        return [
            sys.executable, str(Path(__file__).resolve().parent / self.file), "--run", str(run_file(setup)),
            "--number", str(number), "--ips", *ips[:setup.num_peers], "--folder", str(setup.folder),
            "--weights", str(self.weights(setup, number)), *until, *self.flags,
        ]

    def weights(self, setup: Setup, number: int) -> Path:
        return setup.folder / f"weights-{number}.safetensors"


def run_file(setup: Setup) -> Path:
    """The run with the setup's seed, as a file in its folder: what every system of a comparison reads."""
    run = dataclasses.replace(load_run(setup.run), seed=setup.seed)
    file = setup.folder / "run.yaml"
    setup.folder.mkdir(parents=True, exist_ok=True)
    # by way of JSON, which knows no tuples; YAML in the end, because JSON's 1e-05 is text to a YAML reader
    file.write_text(yaml.safe_dump(json.loads(canonical_json(run))), encoding="utf-8")
    return file
