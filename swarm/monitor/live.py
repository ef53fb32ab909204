"""`--ui live`: a panel that stays at the bottom of the terminal, with logs and prints scrolling above it.

The join command is printed above the panel and not in it: borders and wrapping would spoil copy and paste.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from swarm.events import Event, Ready
from swarm.monitor.status import Status, round_line, status_line, update
from swarm.units import printable

REFRESH_S = 0.25


class LiveView:
    """Draws at most every REFRESH_S, on the thread that calls it: an error then ends in `Screen` and nowhere else."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=True, redirect_stderr=True)
        self._status = Status()
        self._drawn_at = float("-inf")
        self._stale = False
        self._rerouted: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._started = False

    def show(self, event: Event, now: float) -> None:
        if not self._started:
            self._start()
        self._status = update(self._status, event)
        self._stale = True
        if isinstance(event, Ready):
            self._console.print("Send this to a friend:\n")
            self._console.print(Text(f"  {printable(event.join, max_chars=10_000)}\n"), soft_wrap=True)
        if time.monotonic() - self._drawn_at >= REFRESH_S:
            self._draw()

    def idle(self) -> None:
        if self._stale:
            self._draw()

    def close(self) -> None:
        if self._started:
            self._draw()
            self._live.stop()
            for handler, stream in self._rerouted:
                handler.setStream(stream)

    def _start(self) -> None:
        self._started = True
        before = sys.stdout, sys.stderr
        self._live.start()
        self._console.show_cursor(True)  # rich hides it, and a peer that is killed could not bring it back
        for handler in _stream_handlers():
            if handler.stream in before:  # they took hold of the real stream before rich stood in for it
                self._rerouted.append((handler, handler.stream))
                handler.setStream(sys.stderr)

    def _draw(self) -> None:
        self._drawn_at, self._stale = time.monotonic(), False
        self._live.update(panel(self._status), refresh=True)


def panel(status: Status) -> RenderableType:
    """The status as a picture. Foreign text goes in as `Text`, never as markup."""
    checks = Table.grid(padding=(0, 2))
    for check in status.checks:
        checks.add_row(Text(printable(check.name), "cyan"), Text(printable(check.text)), f"{check.seconds:.1f} s")
    parts: list[RenderableType] = [checks]
    if line := status_line(status):
        parts.append(Text(f"\n{line}\n", "bold"))
    parts += [Text(round_line(event), "dim") for event in status.rounds]
    parts += [Text(f"warning: {printable(text)}", "yellow") for text in status.warnings]
    if status.left is not None:
        parts.append(Text(f"left: {printable(status.left)}"))
    title = printable(status.ready.run_id) if status.ready else "starting"
    return Panel(Group(*parts), title=Text(f"swarm  {title}"), subtitle=Text("Ctrl+C finishes the round and leaves"))


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            yield handler
