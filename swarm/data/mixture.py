"""The text of a peer that trains on several sources: rows drawn from each by its share of the tokens.

Sources are packed each on its own (supply.py), so a row is of one source, and the source that is furthest behind its
share is drawn next: over any stretch the shares are exact to a row or two. Padding does not count.

Everything follows from (run, peer, cursor): the run's seed and the peer's name order each source, and the cursor, which
is a place in each source and the tokens drawn of it, says which is next. It is all that a checkpoint keeps. Other peers
read in unrelated orders, so nobody has to be told which part of the data is whose.

A source that stalls is not replaced: the others are drawn meanwhile, and what it is behind by is made up when it is
back, while they keep half of their share. Only where all stall does training wait. Phases (config_data.py) begin when
the swarm's tokens say so, each with places of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from swarm.config import PhaseConfig, RunConfig
from swarm.data.batch import Batch
from swarm.data.feeder import Blocks, Feeder, Pause, Place, reason
from swarm.data.marks import Marks
from swarm.data.packing import Row, to_batch
from swarm.data.shelf import Mark
from swarm.data.supply import Stock, Supply
from swarm.data.text_stream import TextClosed
from swarm.errors import ConfigError, StateError

PREPARE = 0.9
"""of a phase is over when the next one's sources are opened"""
CATCH_UP_ROWS = 16
"""a source that is further behind was away: the others keep half of their share while that is made up"""
LOOK_AGAIN_S = 1.0


@dataclass
class Drawn:
    """Of one phase: what has been taken of each source."""

    places: dict[str, Place]
    tokens: dict[str, int]
    rows: int = 0
    """of all sources"""


@dataclass
class Blend:
    """A phase that is being drawn from, or about to be."""

    shares: Mapping[str, float]
    drawn: Drawn
    feeders: dict[str, Feeder] = field(default_factory=dict)
    stalled: set[str] = field(default_factory=set)
    """those that were said to be"""

    def behind(self, name: str) -> float:
        """Tokens that this source lacks of its share."""
        return self.shares[name] * sum(self.drawn.tokens.values()) - self.drawn.tokens[name]

    def choose(self, *, row_tokens: int) -> Feeder | None:
        """Whose turn it is; None where all stall."""
        there = [name for name in self.shares if not self.feeders[name].is_stalled()]
        there.sort(key=lambda name: (-self.behind(name), name))
        if len(there) > 1 and self.behind(there[0]) > CATCH_UP_ROWS * row_tokens:
            every = max(2, round(2 / (1 - self.shares[there[0]])))
            if self.drawn.rows % every == 0:
                return self.feeders[there[1]]
        return self.feeders[there[0]] if there else None


class Mixture:
    """A TextStream. Draws on one thread; `close` and `state` may be called on any."""

    may_wait = True

    def __init__(
        self, phases: list[PhaseConfig], supplies: Callable[[int, str], Blocks], *, sequence_length: int,
        swarm_tokens: Callable[[], int], phase_at: Callable[[int], int],
        warn: Callable[[str], None] = lambda text: None, clock: Callable[[], float] = time.monotonic,
        pause: Pause = threading.Event.wait,
    ) -> None:
        """`supplies(phase, source)`: its rows; `phase_at(swarm tokens)`: number of the phase. See `open_mixture`."""
        self._phases, self._supplies, self._length = phases, supplies, sequence_length
        self._swarm_tokens, self._phase_at = swarm_tokens, phase_at
        self._warn, self._clock, self._pause = warn, clock, pause
        self._changed = threading.Condition()
        self._drawn: dict[int, Drawn] = {}
        self._blends: dict[int, Blend] = {}
        self._closed = False
        self.waits, self.waited_s = 0, 0.0
        """how often, and how long, a batch was not there when it was asked for"""

    def start(self) -> None:
        """Open the sources of the phase that the swarm is in, and wait until each has rows or has failed. A stall is
        reported later; raises ConfigError for a source that cannot be as the run says."""
        with self._changed:
            blend = self._blend(self._phase_at(self._swarm_tokens()))
            feeders = blend.feeders.values()
            while not all(feeder.has_row() or feeder.is_stalled() for feeder in feeders):
                self._changed.wait(LOOK_AGAIN_S)
        for feeder in feeders:
            if isinstance(feeder.error, ConfigError):
                self.close()
                raise feeder.error

    def next_batch(self, num_sequences: int) -> Batch:
        tokens = self._swarm_tokens()
        number = self._phase_at(tokens)
        with self._changed:
            blend = self._blend(number)
            self._tidy(number, tokens)
            return to_batch([self._draw(blend) for _ in range(num_sequences)])

    def state(self) -> dict[str, Any]:
        with self._changed:
            return {"phases": {
                str(number): {
                    "places": {name: [*place.mark, place.taken] for name, place in drawn.places.items()},
                    "tokens": dict(drawn.tokens), "rows": drawn.rows,
                }
                for number, drawn in self._drawn.items()
            }}

    def load_state(self, state: dict[str, Any]) -> None:
        """Before `start`, or after: what is ready is then dropped."""
        try:
            found = {int(number): self._drawn_of(int(number), said) for number, said in state["phases"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise StateError(
                "the place in the data is not valid", why=f"{type(error).__name__}: {error}"[:200],
                do="delete the checkpoint to start afresh",
            ) from None
        with self._changed:
            self._stop_feeders()
            self._drawn = found

    def tokens(self) -> dict[str, int]:
        """Drawn of each source by this peer, in all phases, without padding."""
        with self._changed:
            names = {name for drawn in self._drawn.values() for name in drawn.tokens}
            return {name: sum(d.tokens.get(name, 0) for d in self._drawn.values()) for name in sorted(names)}

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._stop_feeders()
            self._changed.notify_all()

    # -- with the lock held -----------------------------------------------------------------------------------------

    def _draw(self, blend: Blend) -> Row:
        began: float | None = None
        while True:
            if self._closed:
                raise TextClosed
            self._report(blend)
            feeder = blend.choose(row_tokens=self._length)
            if feeder is not None and feeder.has_row():
                break
            began = self._clock() if began is None else began
            self._changed.wait(LOOK_AGAIN_S)
        if began is not None:
            self.waits += 1
            self.waited_s += self._clock() - began
        row = feeder.take()
        drawn = blend.drawn
        drawn.places[feeder.name] = feeder.place
        drawn.rows += 1
        drawn.tokens[feeder.name] += sum(size for prefix, size in row.segments if prefix < size)
        return row

    def _report(self, blend: Blend) -> None:
        for name, feeder in blend.feeders.items():
            if name in blend.stalled and feeder.has_row():
                blend.stalled.remove(name)
                self._warn(f"the source {name!r} is back: the tokens that it is behind by are made up now")
            elif name not in blend.stalled and feeder.is_stalled():
                blend.stalled.add(name)
                why = reason(feeder.error) if feeder.error is not None else "it does not answer"
                others = "training goes on with the others, and its share waits for it"
                all_stall = len(blend.stalled) == len(blend.feeders)
                text = "training waits, since no other source has text" if all_stall else others
                self._warn(f"the source {name!r} has stalled, {text}; it is tried again: {why}")

    def _blend(self, number: int) -> Blend:
        blend = self._blends.get(number)
        if blend is None:
            if self._closed:
                raise TextClosed
            shares = self._phases[number].mixture
            if number not in self._drawn:
                self._drawn[number] = Drawn(dict.fromkeys(shares, Place()), dict.fromkeys(shares, 0))
            blend = self._blends[number] = Blend(shares, self._drawn[number])
            for name in shares:
                blend.feeders[name] = Feeder(
                    self._supplies(number, name), blend.drawn.places[name], clock=self._clock, changed=self._changed,
                    pause=self._pause,
                )
            for feeder in blend.feeders.values():
                feeder.start()
        return blend

    def _tidy(self, number: int, tokens: int) -> None:
        """Phases that are over are closed, the next one is opened before it begins."""
        for old in [other for other in self._blends if other < number]:
            for feeder in self._blends.pop(old).feeders.values():
                feeder.stop()
        if number + 1 < len(self._phases):
            end = sum(phase.tokens or 0 for phase in self._phases[: number + 1])
            if end - tokens <= (1 - PREPARE) * (self._phases[number].tokens or 0):
                self._blend(number + 1)

    def _stop_feeders(self) -> None:
        for blend in self._blends.values():
            for feeder in blend.feeders.values():
                feeder.stop()
        self._blends = {}

    def _drawn_of(self, number: int, said: dict[str, Any]) -> Drawn:
        names = self._phases[number].mixture.keys() if number >= 0 else set()
        places = {name: [*map(_count, place)] for name, place in said["places"].items()}
        tokens = {name: _count(count) for name, count in said["tokens"].items()}
        if not names == places.keys() == tokens.keys() or not all(len(place) == 4 for place in places.values()):
            raise ValueError(f"phase {number} mixes other sources")
        places_there = {name: Place(Mark(*place[:3]), place[3]) for name, place in places.items()}
        return Drawn(places_there, tokens, _count(said["rows"]))


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} counts nothing")
    return value


def open_mixture(
    run: RunConfig, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, reader: str,
    swarm_tokens: Callable[[], int], warn: Callable[[str], None] = lambda text: None, cache: Path | None = None,
) -> Mixture:
    """The run's mixture for one peer; `load_state`, then `start` it.

    `vocabulary`: rows of the model's embedding; `reader`: the peer's name, so that others draw other data; `cache`:
    folder for what the hub's data sets leave behind.
    Raises ConfigError: files that are not there, other columns, an objective that the vocabulary has no room for.
    """
    phases, marks = run.all_phases(), Marks.of(tokenizer, vocabulary)
    stocks = {name: Stock(name, source, cache=cache) for name, source in run.named_sources().items()}
    for stock in stocks.values():
        if stock.source.hub is None:
            stock.look()  # what is wrong with a later phase is better known now
    supplies = {
        (number, name): Supply(
            stocks[name], phase.objective, run, tokenizer, marks, key=f"{run.seed}/{reader}/{name}/{number}"
        )
        for number, phase in enumerate(phases) for name in phase.mixture
    }
    return Mixture(
        phases, lambda number, name: supplies[number, name], sequence_length=run.train.sequence_length,
        swarm_tokens=swarm_tokens, phase_at=run.phase_at, warn=warn,
    )
