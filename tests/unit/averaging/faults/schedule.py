"""What happens to a simulated swarm, and when: drawn from a seed, and nothing but data, so that it can be printed."""

from __future__ import annotations

import random
from dataclasses import dataclass

QUIET_S = 2.0
"""after the last fault has been drawn"""


@dataclass(frozen=True)
class Crash:
    """A peer's process ends `steps` of its own steps after a moment; a new one begins from its disk, or never."""

    at_s: float
    peer: int
    steps: int
    back_s: float | None


@dataclass(frozen=True)
class Freeze:
    """Nothing of a peer goes on, as with SIGSTOP, from one of its steps on."""

    at_s: float
    peer: int
    steps: int
    for_s: float


@dataclass(frozen=True)
class Cut:
    """Some peers and the others do not hear each other; with `for_s` None for good."""

    at_s: float
    side: tuple[int, ...]
    for_s: float | None


@dataclass(frozen=True)
class Storm:
    """So many of all messages are lost for a while."""

    at_s: float
    loss: float
    for_s: float


@dataclass(frozen=True)
class Join:
    """Another peer comes, with an empty disk."""

    at_s: float
    peer: int


Fault = Crash | Freeze | Cut | Storm | Join


@dataclass(frozen=True)
class Schedule:
    seed: int
    holds: tuple[tuple[int, ...], ...]
    """fragments of each peer, those that join later included"""
    little: tuple[bool, ...]
    """which peers keep as little of the past as they can"""
    every_s: tuple[float, ...]
    """how often each peer takes an inner step"""
    bits: int
    loss: float
    twice: float
    delay_s: float
    faults: tuple[Fault, ...]

    @property
    def late(self) -> set[int]:
        return {fault.peer for fault in self.faults if isinstance(fault, Join)}

    @property
    def until_s(self) -> float:
        """all faults are over by then"""
        ends = [fault.at_s + _lasts_s(fault) for fault in self.faults]
        return max(ends, default=0.0) + QUIET_S

    def text(self) -> str:
        """For people."""
        what = [
            f"seed {self.seed}: {self.bits} bits; {100 * self.loss:.0f} % of messages lost, "
            f"{100 * self.twice:.0f} % twice, on their way about {self.delay_s} s"
        ]
        for number, (holds, little, every_s) in enumerate(zip(self.holds, self.little, self.every_s, strict=True)):
            fragments = " and ".join(map(str, holds))
            keeps = ", keeps little of the past" if little else ""
            what.append(f"  p{number} holds fragment {fragments}, takes a step every {every_s} s{keeps}")
        return "\n".join([*what, *(f"  {fault}" for fault in self.faults)])

    def sides(self) -> list[set[int]]:
        """Peers that can talk to each other at the end."""
        groups = [set(range(len(self.holds)))]
        for fault in self.faults:
            if isinstance(fault, Cut) and fault.for_s is None:
                groups = [part for group in groups for part in (group & set(fault.side), group - set(fault.side))]
        return [group for group in groups if group]


def _lasts_s(fault: Fault) -> float:
    if isinstance(fault, Crash):
        return fault.back_s or 0.0
    return 0.0 if isinstance(fault, Join) else fault.for_s or 0.0


def draw(seed: int) -> Schedule:
    """The same seed gives the same schedule, on every machine."""
    dice = random.Random(f"schedule {seed}")
    count = dice.choices((1, 2, 3, 4, 5), (1, 8, 8, 2, 1))[0]
    late = dice.random() < 0.25
    holds: list[tuple[int, ...]] = [(0,)] * (count + late)
    if dice.random() < 0.15:
        holds = [(0, 1), *(dice.choice(((0, 1), (0,), (1,))) for _ in holds[1:])]
    start_s = dice.uniform(1.0, 4.0)
    span_s = dice.uniform(3.0, 8.0)
    faults: list[Fault] = [Join(dice.uniform(2.0, start_s + span_s), count)] if late else []
    for _ in range(dice.choices((0, 1, 2, 3, 4), (1, 5, 5, 3, 1))[0]):
        at_s = start_s + span_s * dice.random()
        peer, steps = dice.randrange(count), dice.choice((dice.randrange(8), dice.randrange(80)))
        kind = dice.random()
        if kind < 0.4:
            faults.append(Crash(at_s, peer, steps, dice.uniform(0.3, 12.0) if dice.random() < 0.6 else None))
        elif kind < 0.6:
            faults.append(Freeze(at_s, peer, steps, dice.choice((dice.uniform(0.5, 5.0), dice.uniform(5.0, 18.0)))))
        elif kind < 0.85 and count > 1:
            side = tuple(sorted(dice.sample(range(count), dice.randint(1, count - 1))))
            for_s = dice.choice((dice.uniform(1.0, 8.0), dice.uniform(8.0, 35.0)))
            faults.append(Cut(at_s, side, for_s if dice.random() < 0.85 else None))
        else:
            faults.append(Storm(at_s, dice.uniform(0.1, 0.5), dice.uniform(2.0, 8.0)))
    # somebody must be left to go on: the last process of a swarm does not die for good
    ends = [fault for fault in faults if isinstance(fault, Crash) and fault.back_s is None]
    if len({fault.peer for fault in ends}) >= count:
        faults.remove(ends[0])
        faults = [f for f in faults if not (isinstance(f, Crash) and f.peer == ends[0].peer and f.back_s is None)]
    return Schedule(
        seed=seed, holds=tuple(holds), little=tuple(dice.random() < 0.15 for _ in holds),
        every_s=tuple(dice.choice((0.5, 0.7, 1.0, 2.0)) for _ in holds), bits=dice.choice((4, 4, 8, 32)),
        loss=dice.choice((0.0, 0.0, 0.02, 0.1)), twice=dice.choice((0.0, 0.02, 0.1)),
        delay_s=dice.choice((0.01, 0.05, 0.2, 0.5)), faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
    )
