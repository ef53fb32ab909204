"""Rules of placement beside each other, behind one face: ours (swarm/pipeline), Petals', SWARM's, and never to move.

The rivals' are written from their descriptions and code as we read them: Petals' `block_selection` (lexicographically
poorest window; every 0 to 240 s, move if everybody's moving would raise the least throughput to more than 4/3), SWARM
Parallelism's adaptive rebalancing (paper, 2301.11913: equal stages; every 300 s a peer of the richest stage goes to
the poorest; which one is not said, here the slowest). Both stop serving, load all of the new stage, and start again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from swarm.pipeline import placement
from swarm.pipeline.placement import Act, Memory
from swarm.pipeline.snapshot import NO_STAGE, Claim, Holder, Snapshot, Stage, options_of

HEARTBEAT_S = 5.0
PETALS_QUALITY = 0.75
PETALS_CHECK_S = 240.0
PETALS_SETTLES = 50
"""sweeps of its own simulation, which need not end by itself"""
SWARM_STAGES = 8
SWARM_CHECK_S = 300.0


@dataclass(frozen=True)
class Step:
    """What a rule answers."""

    state: Any
    again_s: float
    """when to ask again"""
    target: Stage | None = None
    """go there now"""
    claim: Claim | None = None
    heals: bool = False


class Rule(Protocol):
    name: str
    breaks: bool
    """stops serving while it loads, and serves a stage only when all of it is there"""

    def join(self, snapshot: Snapshot, me: Holder) -> Stage: ...

    def step(
        self, snapshot: Snapshot, me: Holder, state: Any, *, now_s: float, load_s: float, rng: np.random.Generator
    ) -> Step: ...


class Ours:
    name = "ours"
    breaks = False

    def join(self, snapshot: Snapshot, me: Holder) -> Stage:
        return placement.choose_stage(snapshot, me)

    def step(
        self, snapshot: Snapshot, me: Holder, state: Any, *, now_s: float, load_s: float, rng: np.random.Generator
    ) -> Step:
        memory = state or Memory(moved_at_s=now_s)
        decision = placement.decide(snapshot, me, memory, now_s=now_s, load_s=load_s)
        if decision.act is Act.GO:
            assert decision.claim is not None
            return Step(decision.memory, HEARTBEAT_S, decision.claim.stage, heals=decision.claim.heals)
        return Step(decision.memory, HEARTBEAT_S, claim=decision.claim)


class Never(Ours):
    """Newcomers are placed and grow as ours; nobody moves."""

    name = "never move"

    def step(
        self, snapshot: Snapshot, me: Holder, state: Any, *, now_s: float, load_s: float, rng: np.random.Generator
    ) -> Step:
        return Step(state, float("inf"))


class NeverGrow(Never):
    """Nor does a newcomer serve before it has all of its stage."""

    name = "never move, serve when complete"
    breaks = True


class Petals:
    name = "Petals' rule"
    breaks = True

    def join(self, snapshot: Snapshot, me: Holder) -> Stage:
        totals = _totals(snapshot.holders, len(snapshot.fragments))
        return _poorest(totals, _longest(snapshot, me))

    def step(
        self, snapshot: Snapshot, me: Holder, state: Any, *, now_s: float, load_s: float, rng: np.random.Generator
    ) -> Step:
        again_s = float(rng.uniform(0, PETALS_CHECK_S))
        if state is None or me.serving == NO_STAGE:  # it looks again only when it serves
            return Step(True, again_s)
        target = self.elsewhere(snapshot, me, rng)
        return Step(True, again_s, target)

    def elsewhere(self, snapshot: Snapshot, me: Holder, rng: np.random.Generator) -> Stage | None:
        others = [holder for holder in snapshot.holders if holder.peer_id != me.peer_id]
        totals = _totals([*others, me], len(snapshot.fragments))
        least = totals.min()
        totals[slice(*me.target)] -= _petals_speed(me)
        if least > 1e-3 and totals.min() <= 1e-9:
            return None  # nobody else serves some of it
        mine = _poorest(totals, me.target[1] - me.target[0])
        if mine == me.target:
            return None
        totals[slice(*mine)] += _petals_speed(me)
        reached = _settled(totals, [*others, replace(me, target=mine)], rng)
        return mine if reached > 1e-3 and least / reached < PETALS_QUALITY - 1e-3 else None


class FixedStages:
    name = "SWARM's rule"
    breaks = True

    def join(self, snapshot: Snapshot, me: Holder) -> Stage:
        length = len(snapshot.fragments) // SWARM_STAGES
        if me.room_bytes < sum(snapshot.fragments.sizes_bytes[:length]):
            return NO_STAGE  # a stage does not fit: shut out
        poorest = int(self._totals(snapshot, length).argmin())
        return poorest * length, (poorest + 1) * length

    def step(
        self, snapshot: Snapshot, me: Holder, state: Any, *, now_s: float, load_s: float, rng: np.random.Generator
    ) -> Step:
        again_s = SWARM_CHECK_S - now_s % SWARM_CHECK_S  # everybody at the same time
        if state is None or me.serving == NO_STAGE:
            return Step(True, again_s)
        length = len(snapshot.fragments) // SWARM_STAGES
        totals = self._totals(snapshot, length)
        richest, poorest = int(totals.argmax()), int(totals.argmin())
        there = [h for h in snapshot.holders if h.target[0] == richest * length and h.serving == h.target]
        slowest = min(there, key=lambda holder: (holder.speed, holder.peer_id), default=None)
        if slowest is None or slowest.peer_id != me.peer_id or len(there) < 2 or richest == poorest:
            return Step(True, again_s)
        return Step(True, again_s, (poorest * length, (poorest + 1) * length))

    def _totals(self, snapshot: Snapshot, length: int) -> np.ndarray:
        totals = np.zeros(SWARM_STAGES)
        for holder in snapshot.holders:
            if holder.target != NO_STAGE:
                totals[holder.target[0] // length] += holder.speed
        return totals


RULES: dict[str, Rule] = {
    "ours": Ours(), "never": Never(), "never-grow": NeverGrow(), "petals": Petals(), "swarm": FixedStages(),
}


def _longest(snapshot: Snapshot, me: Holder) -> int:
    """Petals' number of blocks: as many as fit; its blocks are equal."""
    first, end = options_of(me.room_bytes, snapshot.fragments)[0]
    return int(end - first)


def _petals_speed(holder: Holder) -> float:
    """Requests/s through a stage: on average they use half of it."""
    return holder.speed / ((holder.target[1] - holder.target[0] + 1) / 2)


def _totals(holders: list[Holder], num_fragments: int) -> np.ndarray:
    totals = np.zeros(num_fragments)
    for holder in holders:
        if holder.target != NO_STAGE:
            totals[slice(*holder.target)] += _petals_speed(holder)
    return totals


def _poorest(totals: np.ndarray, length: int) -> Stage:
    """The window whose sorted throughputs come first in the dictionary."""
    sorted_windows = np.sort(np.lib.stride_tricks.sliding_window_view(totals, length), axis=1)
    first = int(np.lexsort(sorted_windows.T[::-1])[0])
    return first, first + length


def _settled(totals: np.ndarray, holders: list[Holder], rng: np.random.Generator) -> float:
    """Least throughput after everybody has gone where it would, again and again."""
    places = [(holder.target, _petals_speed(holder)) for holder in holders if holder.target != NO_STAGE]
    for _ in range(PETALS_SETTLES):
        moved = False
        for index in rng.permutation(len(places)):
            place, speed = places[index]
            totals[slice(*place)] -= speed * 1.001
            best = _poorest(totals, place[1] - place[0])
            totals[slice(*place)] += speed * 0.001
            totals[slice(*best)] += speed
            moved |= best != place
            places[index] = best, speed
        if not moved:
            break
    return float(totals.min())
