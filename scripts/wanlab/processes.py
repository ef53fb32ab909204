"""Finds the lab's own processes, and ends no others.

A pid alone may name another process by the time it is used. So each is first held by a pidfd, then looked at once
more, and only then is the signal sent, through the pidfd.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from swarm.errors import SwarmError

END_S = 5.0


def in_namespace(namespace: Path) -> list[int]:
    """Processes whose network namespace is this one."""
    return [pid for pid in _pids() if _is_in(pid, namespace)]


def end_in_namespace(namespace: Path) -> None:
    """SIGKILL whatever runs there."""
    deadline = time.monotonic() + END_S
    while pids := in_namespace(namespace):  # again, because they may start others meanwhile
        if time.monotonic() > deadline:
            why = f"not even by SIGKILL (a hung disk can do that); pids: {', '.join(map(str, pids))}"
            raise SwarmError(f"processes in {namespace.name} do not end", why=why, do="try again when they have")
        for pid in pids:
            _end(pid, lambda pid: _is_in(pid, namespace))


def with_command(command: list[str]) -> list[int]:
    """Processes that were started with exactly these words."""
    return [pid for pid in _pids() if _command(pid) == command]


def end_with_command(command: list[str]) -> None:
    for pid in with_command(command):
        _end(pid, lambda pid: _command(pid) == command)


def _end(pid: int, is_ours: Callable[[int], bool]) -> None:
    try:
        held = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            if is_ours(pid):
                signal.pidfd_send_signal(held, signal.SIGKILL)
                select.select([held], [], [], END_S)
    finally:
        os.close(held)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_in(pid: int, namespace: Path) -> bool:
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), namespace.stat())
    except OSError:  # it, or the namespace, is gone
        return False


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []
