"""One process of a swarm in the lab: how it is started, what it says, stamped with the time of receipt."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanlab.lab import Lab

from benches.table import Point
from swarm.errors import SwarmError

ROOT = Path(__file__).resolve().parents[2]
END_S = 10.0
QUOTED_CHARS = 600
PR_SET_PDEATHSIG = 1

Launch = Callable[..., Any]
"""as `popen` here"""
Line = tuple[float, dict[str, Any]]
"""(monotonic seconds of receipt, the JSON line)"""


class DidNotFinish(SwarmError):
    """A system failed at what was asked of it."""

    @property
    def said(self) -> str:
        """On one line, for tables."""
        return f"did not finish: {self.what}" + (f" ({self.why})" if self.why else "")


@dataclass
class Peer:
    """One process; a peer that is started again is another one with the same number."""

    number: int
    host: str
    process: subprocess.Popen[str]
    errors: Path
    began: float
    lines: list[Line] = field(default_factory=list)
    may_end: bool = False
    """it has been asked to, or killed"""
    ended: float | None = None
    """when we killed it, or saw that it had ended"""
    _reader: threading.Thread | None = None

    @classmethod
    def start(
        cls, lab: Lab, number: int, host: str, argv: list[str], *, errors: Path, launch: Launch | None = None
    ) -> Peer:
        """`errors`: file for its stderr. `launch`: None starts a process that has everything yet to load."""
        began = time.monotonic()
        with errors.open("w") as stderr:
            process = (launch or popen)(lab, host, argv, stdout=subprocess.PIPE, stderr=stderr, text=True)
        peer = cls(number, host, process, errors, began)
        peer._reader = threading.Thread(target=peer._read, daemon=True)
        peer._reader.start()
        return peer

    def wait(self) -> None:
        """It is about to end: until it has, and all that it said is read."""
        self.process.wait(END_S)
        if self._reader is not None:
            self._reader.join(END_S)

    def of(self, kind: str) -> list[Line]:
        return [line for line in list(self.lines) if line[1].get("event") == kind]

    def last(self, kind: str, key: str, default: Any = 0) -> Any:
        for _, event in reversed(list(self.lines)):
            if event.get("event") == kind:
                return event.get(key, default)
        return default

    def points(self, key: str) -> list[Point]:
        """`tokens` or `swarm_tokens`, as it told them."""
        return [(at, event[key]) for at, event in self.of("progress")]

    def is_ready(self) -> bool:
        return bool(self.of("ready"))

    def is_running(self) -> bool:
        return self.process.poll() is None

    def complaint(self) -> str:
        """What it said in the end."""
        with contextlib.suppress(OSError):
            text = " / ".join(self.errors.read_text(errors="replace").split("\n")[-12:]).strip(" /")
            return text[-QUOTED_CHARS:]
        return ""

    def how_it_ended(self) -> str:
        reason = self.last("left", "reason", "")
        return "; ".join(filter(None, [f"code {self.process.returncode}", reason, self.complaint()]))

    def where(self) -> str:
        """How far it has come."""
        if not self.lines:
            return self.complaint() or "has said nothing"
        if not self.is_ready():
            return f"last said {json.dumps(self.lines[-1][1])[:200]}"
        return f"{self.last('progress', 'tokens')} tokens trained, {self.last('progress', 'swarm_tokens')} committed"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            now = time.monotonic()
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    self.lines.append((now, event))


def popen(lab: Lab, host: str, argv: list[str], **streams: Any) -> subprocess.Popen[Any]:
    """A process on a host of the lab, with this checkout's code. From the main thread only: it ends with it.

    A process group of its own, but no session: Linux shares the processor out by session first (sched(7), autogroup),
    and a peer's round would have to wait for its share while other peers do nothing but train. On machines of their own
    they would not stand in its way; in one session the niceness of training sees to that."""
    return subprocess.Popen(
        lab.command(host, argv), cwd=ROOT, preexec_fn=on_its_own,
        env={**os.environ, **lab.environment(host), "PYTHONPATH": str(ROOT)}, **streams,
    )


def on_its_own() -> None:
    """Ctrl+C on the terminal is this program's alone; should it be killed, its peers finish as after Ctrl+C (Linux)."""
    os.setpgid(0, 0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
