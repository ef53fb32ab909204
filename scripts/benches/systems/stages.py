"""The product with a stage of the model at each peer (systems/stage_peer.py), as LabSwarm starts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benches.systems.ours import Ours
from benches.systems.system import Setup

PEER = Path(__file__).resolve().parent / "stage_peer.py"
BACKWARD_SHARE = 2 / 3
"""of the time of a stage: a backward is two matrix products where a forward is one"""


@dataclass(frozen=True)
class StageSpec:
    part: tuple[int, int]
    """fragments [first, end)"""
    service_s: float
    """computing of a microbatch, forward and backward of all of them"""

    @property
    def fragment_s(self) -> float:
        return self.service_s / (self.part[1] - self.part[0])


class Stages(Ours):
    """`specs`: one a peer, and peer 0 has the first fragment. `hub`: microbatches under way, tried one after another,
    each for `each_s`; none: the product's chain."""

    name = "swarm"  # what LabSwarm knows how to join and resume

    def __init__(
        self, specs: Sequence[StageSpec], *, emulate: bool, hub: Sequence[int] = (), each_s: float = 10.0
    ) -> None:
        self.specs, self._emulate, self._hub, self.each_s = specs, emulate, hub, each_s

    def command(self, setup: Setup, number: int, ips: list[str], join: list[str]) -> list[str]:
        python, *_ = argv = super().command(setup, number, ips, join)
        spec = self.specs[number]
        forward_s, backward_s = ((1 - BACKWARD_SHARE) * spec.fragment_s, BACKWARD_SHARE * spec.fragment_s)
        hub = ["--hub", *map(str, self._hub), "--each-s", str(self.each_s)] if self._hub else []
        return [
            python, str(PEER), "--forward-s", f"{forward_s:.6f}", "--backward-s", f"{backward_s:.6f}",
            *(["--emulate"] if self._emulate else []), *hub, "--", *argv[3:],
            "--fragments", f"{spec.part[0]}:{spec.part[1]}", "--spare-disk", "0",  # copies are not a part of the chain
        ]
