"""Every event as a JSON line with its time, in events.jsonl of the run's folder: what to plot, replay or send along.

Watching must never cost training: when the disk is full the journal stops, says so once, and the peer goes on.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swarm.events import Event

FILE_NAME = "events.jsonl"


class Journal:
    """A listener for `Bus.listen`. `warn` is called once, where it has to stop."""

    def __init__(self, folder: Path, *, warn: Callable[[str], None], clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since 1970. Appends to what earlier starts wrote."""
        self.path = folder / FILE_NAME
        self._warn, self._clock = warn, clock
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._end_half_a_line(self._descriptor)
        except OSError as error:
            self._stop(error)

    def __call__(self, event: Event) -> None:
        if self._descriptor is None:
            return
        line = json_line(event, time=round(self._clock(), 3)).encode()
        try:
            # one write a line, not buffered: a kill loses nothing, and cuts no line of an earlier event
            written = os.write(self._descriptor, line)
            if written < len(line):  # there was room for a part only; the next write says why there is no more
                os.write(self._descriptor, line[written:])
        except OSError as error:
            self._stop(error)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _stop(self, error: OSError) -> None:
        self.close()  # first: `warn` is likely to come back as an event
        self._warn(f"no more events are written to {self.path}: {error.strerror or error}; training goes on")

    @staticmethod
    def _end_half_a_line(descriptor: int) -> None:
        """A start that ran out of disk, or lost power, may have left half a line: keep ours apart from it."""
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")


def json_line(event: Event, **more: Any) -> str:
    """The event on one line. ASCII, and valid JSON always: a loss that is not a number becomes null."""
    return json.dumps(_finite({**more, **event.as_json()}), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
