"""A thread that keeps rows of one source ready, and keeps trying where the source stalls or dies.

The next block is made while the one before is being used, so that there are rows as long as a source is quicker than
training. One that raises is asked again after 1 s, 2 s, 4 s, ... up to 5 minutes. One that hangs cannot be woken; it
counts as stalled after `PATIENCE_S`, until it has rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from swarm.data.packing import Row
from swarm.data.shelf import Mark
from swarm.errors import ConfigError, SwarmError

BACKOFF_S, MAX_BACKOFF_S = 1.0, 300.0
PATIENCE_S = 20.0
FIRST_PATIENCE_S = 300.0
"""for the first block: sources are found, fetched and read in it"""
EMPTY_PASSES = 2
"""a pass without a row may be the end of one that was begun late; a second is not"""

Pause = Callable[[threading.Event, float], object]
"""waits so many seconds, or until the event"""


class Place(NamedTuple):
    """A place in a source: `taken` rows of the block at a mark have been used."""

    mark: Mark = Mark()
    taken: int = 0


class Blocks(Protocol):
    name: str

    def block(self, mark: Mark) -> tuple[list[Row], Mark]: ...


class Feeder:
    """`take` and `place` are for one thread, whoever trains."""

    def __init__(
        self, supply: Blocks, place: Place, *, clock: Callable[[], float], changed: threading.Condition,
        pause: Pause = threading.Event.wait,
    ) -> None:
        """`changed` is notified when there are rows, or none to be had; its lock guards all feeders of a mixture."""
        self.name = supply.name
        self.place = place
        """after the last row that was taken"""
        self.error: Exception | None = None
        """why there are no rows, since the last try"""
        self._supply, self._clock, self._changed, self._pause = supply, clock, changed, pause
        self._rows: list[Row] = []
        self._after = place.mark
        self._ready: tuple[list[Row], Mark, Mark] | None = None
        """rows, their mark, and the one after"""
        self._since = clock()
        """since when the thread has been at its block"""
        self._had_rows = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._feed, args=(place.mark,), name=f"text-{self.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The thread ends after what it is at; one that hangs ends with the program."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()

    # -- with the lock held -----------------------------------------------------------------------------------------

    def has_row(self) -> bool:
        return self.place.taken < len(self._rows) or self._ready is not None

    def is_stalled(self) -> bool:
        """There is no row, and it is not worth waiting for one."""
        return not self.has_row() and (self.error is not None or self.patience_s() <= 0)

    def patience_s(self) -> float:
        """How much longer to wait for a row that is not there."""
        return self._since + (PATIENCE_S if self._had_rows else FIRST_PATIENCE_S) - self._clock()

    def take(self) -> Row:
        """The next row; there must be one."""
        if self.place.taken >= len(self._rows):
            assert self._ready is not None
            self._rows, mark, self._after = self._ready
            # a restart may be in the middle of its first block
            taken = self.place.taken if mark == self.place.mark else 0
            self._ready, self.place = None, Place(mark, min(taken, len(self._rows) - 1))
            self._since = self._clock()
            self._changed.notify_all()
        row = self._rows[self.place.taken]
        self.place = Place(self.place.mark, self.place.taken + 1)
        if self.place.taken == len(self._rows):
            self.place, self._rows = Place(self._after), []
        return row

    # -- on its thread ----------------------------------------------------------------------------------------------

    def _feed(self, mark: Mark) -> None:
        wait_s = BACKOFF_S
        empty_since = mark.number
        while not self._stop.is_set():
            try:
                rows, after = self._supply.block(mark)
                if not rows and after.number - empty_since >= EMPTY_PASSES:
                    raise ConfigError(
                        f"the source {self.name!r} holds nothing to train on", why="there is no row in a whole pass",
                        do=f"check sources.{self.name}, or hold less of it out (held_out_percent)",
                    )
            except Exception as error:  # whatever a library raises must not end the source for ever
                with self._changed:
                    self.error = error
                    self._changed.notify_all()
                self._pause(self._stop, wait_s)
                wait_s = min(MAX_BACKOFF_S, 2 * wait_s)
                continue
            wait_s = BACKOFF_S
            if rows:
                empty_since = after.number
                with self._changed:
                    self._changed.wait_for(lambda: self._ready is None or self._stop.is_set())
                    self._ready, self.error, self._had_rows = (rows, mark, after), None, True
                    self._changed.notify_all()
            mark = after


def reason(error: Exception) -> str:
    """On one line."""
    if isinstance(error, SwarmError):
        return f"{error.what} ({error.why})" if error.why else error.what
    return f"{type(error).__name__}: {error}".splitlines()[0]
