"""What a peer knows of the others when it thinks about its place, and what each place would be worth.

A snapshot is made of what all peers say of themselves (their entries in the directory), so it is a little old and a
little different at each peer; placement.py lives with that. Nothing in it is trusted with more than placement: entries
that make no sense are left out, speeds are capped, and whoever lies within that makes the swarm slower, not wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from swarm.errors import ConfigError
from swarm.pipeline.throughput import Bools, Floats, Ints, fair_rates, masks_of, stages_of, worth
from swarm.units import format_bytes

SWEEPS = 8
"""of `fair_rates` for each candidate, from the prices of the swarm as it is: the least rate is then within a tenth of
the optimum, and which candidate is best seldom changes with more"""
FIRST_SWEEPS = 30
SPEED_CAP = 64.0
"""times the median: a peer that claims more counts as that, lest one word of one peer empties its stage of others"""

Stage = tuple[int, int]
"""(first fragment, one past the last)"""
NO_STAGE: Stage = (0, 0)


@dataclass(frozen=True)
class Fragments:
    """What all peers of a run know of its fragments."""

    sizes_bytes: tuple[int, ...]
    """what holding each takes of a peer's room: weights, gradients, optimizer, global state"""
    work: tuple[float, ...]
    """compute of a microbatch, in any unit that peers' speeds share; (1, 1, ...) for equal ones"""

    def __post_init__(self) -> None:
        if not 1 <= len(self.work) == len(self.sizes_bytes) or min(self.sizes_bytes) <= 0 or min(self.work) <= 0:
            raise ValueError("sizes and work must be positive, one of each a fragment")

    def __len__(self) -> int:
        return len(self.work)


@dataclass(frozen=True)
class Claim:
    """I am about to move there; whoever claims more goes first."""

    stage: Stage
    gain: float
    """share of its speed that the swarm wins; when it heals: how many times the swarm's worth rises"""
    heals: bool = False
    """there are fragments that nobody holds, and it takes some"""


@dataclass(frozen=True)
class Holder:
    """A peer as the others see it."""

    peer_id: str
    serving: Stage
    """what microbatches can use now; `NO_STAGE` while it joins"""
    target: Stage
    """where it is, or what it is loading to get to"""
    room_bytes: int
    speed: float
    """work/s, measured"""
    claim: Claim | None = None


class Snapshot:
    """Of all holders at one moment. Costs O(holders) to make, and a question for one peer some milliseconds at most."""

    def __init__(self, holders: Iterable[Holder], fragments: Fragments, *, like: Snapshot | None = None) -> None:
        """`like`: an earlier one; what was worked out for it is used again where only claims have changed."""
        self.fragments = fragments
        sound = [holder for holder in holders if _is_sound(holder, len(fragments))]
        self.holders = sorted(sound, key=lambda holder: holder.peer_id)
        self.claims = {holder.peer_id: holder.claim for holder in self.holders if holder.claim is not None}
        key = [(holder.peer_id, holder.serving, holder.target, holder.speed) for holder in self.holders]
        known = like._places if like is not None and like.fragments == fragments else None
        self._places: _Places = known if known is not None and known.key == key else _Places(key, fragments)

    def __len__(self) -> int:
        return len(self.holders)

    def worths(self, me: Holder, options: Ints, *, serving: bool = False) -> Floats:
        """(K,) of the swarm with me at each of `options` (K, 2) and the others at their targets; with `serving`, where
        they are now. An option may be empty."""
        return self._places.worths(me, options, serving=serving)

    def gaps(self, me: Holder) -> Bools:
        """(F,) fragments that nobody serves or is on its way to, `me` included."""
        places = self._places
        if places.least_count > 0:  # the usual answer, without looking at who is who
            return places.no_gaps
        others = places.others(me)
        count = _count(places.serving[others], len(self.fragments)) + _count(places.target[others], len(self.fragments))
        gaps: Bools = count == 0
        for first, end in (me.serving, me.target):
            gaps[first:end] = False
        return gaps

    def served_rates(self, me: Holder) -> Floats:
        """(F,) microbatches/s that the others can do of each fragment now, each equally divided over its stage."""
        places = self._places
        others = places.others(me)
        first, end = places.serving[others].T
        own = np.zeros((1, len(self.fragments)))
        stages = stages_of(first, end, places.speed[others], num_fragments=len(self.fragments))
        rates: Floats = fair_rates(stages, places.work, own=own, own_speed=0.0, prices=places.work, sweeps=0)[0][0]
        return rates


class _Places:
    """Where everybody is, as arrays, with the answers that were worked out."""

    def __init__(self, key: list[tuple[str, Stage, Stage, float]], fragments: Fragments) -> None:
        self.key = key
        self.work = np.array(fragments.work)
        self.serving = np.array([row[1] for row in key], dtype=np.int64).reshape(-1, 2)
        self.target = np.array([row[2] for row in key], dtype=np.int64).reshape(-1, 2)
        self.speed = np.array([row[3] for row in key], dtype=np.float64)
        self.least_count = int((_count(self.serving, len(self.work)) + _count(self.target, len(self.work))).min())
        if key:
            self.speed = np.minimum(self.speed, SPEED_CAP * np.median(self.speed))
        self.no_gaps: Bools = np.zeros(len(self.work), dtype=np.bool_)
        self._row = {row[0]: index for index, row in enumerate(key)}
        self._prices: dict[bool, Floats] = {}
        self._known: dict[tuple[object, ...], Floats] = {}

    def others(self, me: Holder) -> Bools:
        kept = np.ones(len(self.key), dtype=bool)
        if me.peer_id in self._row:
            kept[self._row[me.peer_id]] = False
        return kept

    def worths(self, me: Holder, options: Ints, *, serving: bool) -> Floats:
        asked = (me.peer_id, me.speed, serving, options.tobytes())
        if asked not in self._known:
            others, num_fragments = self.others(me), len(self.work)
            first, end = (self.serving if serving else self.target)[others].T
            stages = stages_of(first, end, self.speed[others], num_fragments=num_fragments)
            rates, largest, _ = fair_rates(
                stages, self.work, own=masks_of(options[:, 0], options[:, 1], num_fragments), own_speed=me.speed,
                prices=self._prices_of(serving), sweeps=SWEEPS,
            )
            scale = (stages.speed.sum() + me.speed) / self.work.sum()
            self._known[asked] = worth(rates, largest, self.work, scale=float(scale))
        return self._known[asked]

    def _prices_of(self, serving: bool) -> Floats:
        if serving not in self._prices:
            first, end = (self.serving if serving else self.target).T
            stages = stages_of(first, end, self.speed, num_fragments=len(self.work))
            nobody = np.zeros((1, len(self.work)))
            _, _, prices = fair_rates(
                stages, self.work, own=nobody, own_speed=0.0, prices=self.work, sweeps=FIRST_SWEEPS
            )
            self._prices[serving] = prices[0]
        return self._prices[serving]


def options_of(room_bytes: int, fragments: Fragments) -> Ints:
    """(K, 2): the stages that fill a peer's memory: as long as they can be, none inside another.

    Raises ConfigError where not even one fragment fits.
    """
    sums = np.concatenate([[0], np.cumsum(fragments.sizes_bytes)])
    ends = np.searchsorted(sums, sums[:-1] + room_bytes, side="right") - 1
    found: list[Stage] = []
    for first, end in enumerate(ends.tolist()):
        if end > max(first, found[-1][1] if found else 0):
            found.append((first, end))
    if not found:
        least = min(fragments.sizes_bytes)
        raise ConfigError(
            f"this peer has room for {format_bytes(room_bytes)} of the model and can hold no part of it",
            why=f"the smallest fragment takes {format_bytes(least)}",
            do="give it more memory, or join a run whose model is cut into more fragments",
        )
    return np.array(found, dtype=np.int64)


def _is_sound(holder: Holder, num_fragments: int) -> bool:
    stages = [holder.serving, holder.target, *([holder.claim.stage] if holder.claim is not None else [])]
    return 0 < holder.speed < math.inf and all(0 <= first <= end <= num_fragments for first, end in stages)


def _count(stages: Ints, num_fragments: int) -> Ints:
    """(F,) how many of these stages (n, 2) have each fragment: differences, summed up."""
    change = np.zeros(num_fragments + 1, dtype=np.int64)
    filled = stages[stages[:, 1] > stages[:, 0]]
    np.add.at(change, filled[:, 0], 1)
    np.add.at(change, filled[:, 1], -1)
    count: Ints = np.cumsum(change)[:-1]
    return count
