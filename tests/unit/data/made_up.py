"""Sources made up for tests of the mixture: rows that say where they are from, and that fail or hang when told to."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import numpy as np

from swarm.config import PhaseConfig
from swarm.data.batch import Batch
from swarm.data.mixture import Mixture
from swarm.data.packing import Row
from swarm.data.shelf import Mark

LENGTH = 8
ROWS = 6
"""of a block"""


class MadeUp:
    """Row r of block b of pass p of source s in phase f is [f, s, p, b, r, 0, 0, 0]; three blocks a pass."""

    def __init__(self, phase: int, index: int, name: str, *, rows: int = ROWS, padding: int = 0) -> None:
        self.name, self.phase, self.index, self.rows, self.padding = name, phase, index, rows, padding
        self.error: Exception | None = None
        self.gate = threading.Event()
        """closed: it hangs"""
        self.gate.set()
        self.asked: list[Mark] = []

    def block(self, mark: Mark) -> tuple[list[Row], Mark]:
        self.asked.append(mark)
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        tokens = [[self.phase, self.index, mark.number, mark.row, row, 0, 0, 0] for row in range(self.rows)]
        segments = ((0, LENGTH - self.padding), (self.padding, self.padding)) if self.padding else ((0, LENGTH),)
        after = Mark(mark.number, 0, mark.row + 1) if mark.row < 2 else Mark(mark.number + 1)
        return [Row(np.array(row, dtype=np.int32), segments) for row in tokens], after


class World:
    """A mixture over made-up sources, with a clock and a swarm that are moved by hand."""

    def __init__(self, *mixtures: dict[str, float], phase_tokens: int = 1000, **options: Any) -> None:
        self.now, self.tick, self.tokens = 0.0, 0.0, 0
        """`tick`: seconds by which the clock moves each time it is read"""
        self.paused: list[float] = []
        self.retry = threading.Semaphore(0)
        """released: one failed source tries again"""
        self.warnings: list[str] = []
        names = list(mixtures[0])
        self.sources = {
            (phase, name): MadeUp(phase, names.index(name), name, **options)
            for phase, shares in enumerate(mixtures) for name in shares
        }  # fmt: skip
        self.phases = [PhaseConfig(tokens=phase_tokens, mixture=dict(shares)) for shares in mixtures]
        self.phase_tokens = phase_tokens

    def __getitem__(self, name: str) -> MadeUp:
        return self.sources[0, name]

    def mixture(self, state: Any = None) -> Mixture:
        made = Mixture(
            self.phases, lambda phase, name: self.sources[phase, name], sequence_length=LENGTH,
            swarm_tokens=lambda: self.tokens,
            phase_at=lambda tokens: min(tokens // self.phase_tokens, len(self.phases) - 1),
            warn=self.warnings.append, clock=self._clock, pause=self._pause,
        )
        if state is not None:
            made.load_state(state)
        made.start()
        return made

    def _clock(self) -> float:
        self.now += self.tick
        return self.now

    def _pause(self, stop: threading.Event, seconds: float) -> None:
        self.paused.append(seconds)
        while not self.retry.acquire(timeout=0.01) and not stop.is_set():
            pass


def origins(batch: Batch) -> list[tuple[int, ...]]:
    """(phase, source, pass, block, row) of each row."""
    return [tuple(row[:5]) for row in batch.tokens.tolist()]


def of_sources(rows: list[tuple[int, ...]]) -> dict[int, list[tuple[int, ...]]]:
    found: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
    for row in rows:
        found[row[1]].append((row[0], *row[2:]))
    return dict(found)


def in_order(number: int, *, phase: int = 0, rows: int = ROWS) -> list[tuple[int, ...]]:
    """(phase, pass, block, row) of the first so many rows of a source."""
    return [(phase, i // (3 * rows), i // rows % 3, i % rows) for i in range(number)]
