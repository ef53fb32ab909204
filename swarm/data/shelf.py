"""The order in which one peer goes through one source: block by block, each a pure function of its mark.

A mark is (pass, shard, row). What a block holds follows from the mark, the key (run, reader, source, phase) and the
files alone, so that a mark in a checkpoint is all that a restart needs, and peers with other keys draw other data
without asking anyone.

Kept       all samples in memory, shuffled anew for each pass
Streamed   shards in an order of the pass's own, some open at a time, each read from a row of the pass's own on, round
           to that row again. What one block holds is shuffled, so a file that is sorted stays roughly so
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from swarm.data.sample import Sample
from swarm.data.shards import Shard
from swarm.data.sources import is_held_out
from swarm.data.templates import Pack, packs

FIRST_ROWS = 4_096
"""a streamed shard is begun before this row: peers that begin with the same one read different parts of it"""


class Mark(NamedTuple):
    number: int = 0
    """of the pass"""
    shard: int = 0
    """streamed: the first of those open, in the order of the pass"""
    row: int = 0
    """kept: pack of the pass; streamed: row of each open shard"""


class Shelf(Protocol):
    def read(self, mark: Mark) -> tuple[list[Pack], Mark]:
        """The block there, and the mark after it. A block may be empty at the end of a pass."""


@dataclass(frozen=True)
class Layout:
    """How a source is cut up."""

    block_chars: int
    """a block ends with the pack that reaches this"""
    room_chars: int
    """of a pack: about a row"""
    shots: int
    held_out_percent: float
    open_shards: int = 4
    """streamed: so many at a time, in turns, a row of each"""
    window_rows: int = 2**62
    """streamed: of each shard a pass reads so many rows, where there are more shards than are open: those of task sets
    are tasks, and another pass, which begins at another row, is better than a long time with the same few"""


def dice_of(key: str, *place: object) -> np.random.RandomState:
    """Whose draws numpy promises never to change, so checkpoints outlive upgrades."""
    text = "/".join([key, *map(str, place)])
    return np.random.RandomState(np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype="<u4"))


class Kept:
    def __init__(self, samples: Sequence[Sample], *, key: str, layout: Layout) -> None:
        """`samples`: those to train on."""
        self._samples, self._key, self._layout = samples, key, layout
        self._pass = -1
        self._packs: list[Pack] = []

    def read(self, mark: Mark) -> tuple[list[Pack], Mark]:
        if mark.number != self._pass:
            layout, dice = self._layout, dice_of(self._key, mark.number)
            self._packs = packs(self._samples, dice, shots=layout.shots, room_chars=layout.room_chars)
            self._pass = mark.number
        end, chars = mark.row, 0
        while end < len(self._packs) and chars < self._layout.block_chars:
            chars += pack_chars(self._packs[end])
            end += 1
        after = Mark(mark.number, 0, end) if end < len(self._packs) else Mark(mark.number + 1)
        return self._packs[mark.row : end], after


class Streamed:
    def __init__(self, shards: Sequence[Shard], *, key: str, layout: Layout) -> None:
        self._shards, self._key, self._layout = shards, key, layout
        self._at: Mark | None = None
        """where `_open` is"""
        self._open: list[Iterator[Sample]] = []

    def read(self, mark: Mark) -> tuple[list[Pack], Mark]:
        """Raises what the shards raise; asked again, it opens them anew."""
        layout = self._layout
        if mark != self._at:
            self._open = self._opened(mark)
        self._at = None  # until the block is whole
        samples: list[Sample] = []
        row, chars = mark.row, 0
        end = layout.window_rows if len(self._shards) > layout.open_shards else mark.row + 2**62
        while self._open and chars < layout.block_chars and row < end:
            row += 1
            for shard in list(self._open):
                sample = next(shard, None)
                if sample is None:
                    self._open.remove(shard)
                elif sample.text and not is_held_out(sample.name, held_out_percent=layout.held_out_percent):
                    samples.append(sample)
                    chars += len(sample.prompt) + len(sample.text)
        if self._open and row < end:
            after = Mark(mark.number, mark.shard, row)
            self._at = after
        elif mark.shard + layout.open_shards < len(self._shards):
            after = Mark(mark.number, mark.shard + layout.open_shards)
        else:
            after = Mark(mark.number + 1)
        dice = dice_of(self._key, *mark)
        return packs(samples, dice, shots=layout.shots, room_chars=layout.room_chars), after

    def _opened(self, mark: Mark) -> list[Iterator[Sample]]:
        dice = dice_of(self._key, mark.number)
        order, starts = dice.permutation(len(self._shards)), dice.randint(FIRST_ROWS, size=len(self._shards))
        chosen = order[mark.shard : mark.shard + self._layout.open_shards]
        opened = [_rotated(self._shards[index], int(starts[index])) for index in chosen]
        for shard in opened:
            next(islice(shard, mark.row, mark.row), None)  # passes by what was read before
        return opened


def pack_chars(pack: Pack) -> int:
    return sum(len(sample.prompt) + len(sample.text) for sample in pack.samples)


def _rotated(shard: Shard, start: int) -> Iterator[Sample]:
    """All samples of a shard, from number `start` on and round; of a shorter one from the rest of the division on."""
    samples = shard.samples()
    passed = sum(1 for _ in islice(samples, start))
    if passed < start:
        if not passed:
            return
        start %= passed
        samples = shard.samples()
        next(islice(samples, start, start), None)
    yield from samples
    yield from islice(shard.samples(), start)
