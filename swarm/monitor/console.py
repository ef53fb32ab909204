"""What people and their scripts see of a peer: `--ui plain`, `live` or `json`.

A `Screen` is a listener of the bus. It only queues: a terminal that is paused (Ctrl+S, a mouse selection, a reader
that stopped reading) would otherwise hold up training, and other peers would take this one for dead. A thread of its
own writes; when nobody reads any more (broken pipe) it goes quiet and training goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from swarm.errors import ConfigError
from swarm.events import Check, Event, Left, Progress, Ready, Round, Warning
from swarm.monitor.journal import json_line
from swarm.monitor.status import Status, round_line, status_line, update
from swarm.units import printable

KINDS = ("auto", "plain", "live", "json")
_MAX_QUEUED = 10_000
_IDLE_S = 0.5
_REPEAT_S = 60.0


class View(Protocol):
    """One way to show events. `now`: monotonic seconds when the event happened."""

    def show(self, event: Event, now: float) -> None: ...
    def idle(self) -> None: ...
    def close(self) -> None: ...


def make_ui(
    kind: str,
    stream: TextIO,
    *,
    verbose: bool = False,
    clock: Callable[[], float] = time.monotonic,
    interval_s: float = 3.0,
) -> Screen:
    """The screen for `kind` (see KINDS), to be given to `Bus.listen` and closed at the end.

    `interval_s`: at most one status line in that time. `verbose`: a line for each round.
    """
    if kind not in KINDS:
        raise ConfigError(f"--ui {kind} is unknown", do=f"use one of {', '.join(KINDS)}")
    if kind == "auto":
        kind = "live" if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" else "plain"
    if kind == "json":
        return Screen(JsonView(stream), stream, clock=clock)
    if kind == "live":
        from swarm.monitor.live import LiveView  # rich takes a while to import, and only this needs it

        return Screen(LiveView(stream), stream, clock=clock)
    return Screen(PlainView(stream, verbose=verbose, interval_s=interval_s), stream, clock=clock)


class Screen:
    """Hands events to a view, on a thread of its own."""

    def __init__(self, view: View, stream: TextIO, *, clock: Callable[[], float]) -> None:
        self.view = view
        self._stream, self._clock = stream, clock
        self._queue: queue.Queue[tuple[Event, float] | None] = queue.Queue(_MAX_QUEUED)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="screen", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the last words of a peer that ends by an exception matter most

    def __call__(self, event: Event) -> None:
        with contextlib.suppress(queue.Full):  # nobody has read for hours; the journal has it
            self._queue.put_nowait((event, self._clock()))

    def close(self, timeout_s: float = 2.0) -> None:
        """Show what is queued and stop; gives up on a paused terminal after `timeout_s`. Twice is harmless."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while True:
                try:
                    item = self._queue.get(timeout=_IDLE_S)
                except queue.Empty:
                    self.view.idle()
                    continue
                if item is None:
                    break
                self.view.show(*item)
            self.view.close()
        except (OSError, ValueError):  # broken pipe, terminal gone, stream closed
            self._go_quiet()
            while self._queue.get() is not None:
                pass

    def _go_quiet(self) -> None:
        """Point the stream at nothing: Python flushes stdout as it ends, and would turn exit code 0 into 120."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class JsonView:
    """One JSON object a line, exactly `event.as_json()`: a contract with scripts."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, event: Event, now: float) -> None:
        self._stream.write(json_line(event))
        self._stream.flush()

    def idle(self) -> None:
        pass

    def close(self) -> None:
        pass


class PlainView:
    """Lines for people, pipes and log files: checklist, join command, then a status line every few seconds."""

    def __init__(self, stream: TextIO, *, verbose: bool, interval_s: float) -> None:
        self._stream, self._verbose, self._interval_s = stream, verbose, interval_s
        self._status = Status()
        self._next_status = float("-inf")
        self._shown: str | None = None
        self._warned: dict[str, tuple[float, int]] = {}

    def show(self, event: Event, now: float) -> None:
        self._status = update(self._status, event)
        if isinstance(event, Check):
            self._write(check_line(event))
        elif isinstance(event, Ready):
            self._write(f"\n{join_block(event)}\n")
        elif isinstance(event, Progress) and now >= self._next_status:
            self._next_status = now + self._interval_s
            self._write_status()
        elif isinstance(event, Round) and self._verbose:
            self._write(round_line(event))
        elif isinstance(event, Warning):
            self._warn(event.text, now)
        elif isinstance(event, Left):
            self._write_status()
            self._write(f"left: {printable(event.reason)}")

    def idle(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _write_status(self) -> None:
        line = status_line(self._status)
        if line and line != self._shown:  # at the end, the same numbers again would look like more work
            self._shown = line
            self._write(line)

    def _warn(self, text: str, now: float) -> None:
        """The same warning at most once a minute: one dead peer must not fill the screen."""
        since, hidden = self._warned.get(text, (float("-inf"), 0))
        if now - since < _REPEAT_S:
            self._warned[text] = since, hidden + 1
            return
        self._warned = {other: seen for other, seen in self._warned.items() if now - seen[0] < _REPEAT_S}
        self._warned[text] = now, 0
        self._write(f"warning: {printable(text)}{f' ({hidden} more times)' if hidden else ''}")

    def _write(self, line: str) -> None:
        encoding = self._stream.encoding or "utf-8"  # a name in Cyrillic on an ASCII terminal must not end the screen
        self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


def check_line(check: Check) -> str:
    """One line; what is a table in it follows, indented."""
    text, *table = check.text.split("\n")
    lines = [f"  {printable(check.name):<10}  {printable(text):<78}  {check.seconds:6.1f} s"]
    return "\n".join([*lines, *(f"{'':14}{printable(row)}" for row in table)])


def join_block(ready: Ready) -> str:
    """Whole and on one line: what is cut or wrapped cannot be pasted."""
    return f"Send this to a friend:\n\n  {printable(ready.join, max_chars=10_000)}\n"
