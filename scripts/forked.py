"""Peers as processes of their own that need not import anything: forked from one that has loaded the libraries.

A start of `python -m swarm.peer` takes 4 to 5 s of a processor until torch, transformers and hivemind are there. The
tests start some two hundred peers, and benchmarks restart them on a machine that plays six. Python's own fork server
loads them once; a peer is then a fork of it that runs the same `main`. It starts in tens of milliseconds, and all else
is as ever: sockets, p2pd, signals, SIGKILL.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection

from swarm.restart import LIBRARIES

LOADED = ["swarm.peer", *LIBRARIES]

_context = get_context("forkserver")
_context.set_forkserver_preload(LOADED)


class Forked:
    """As much of `subprocess.Popen` as is needed of it."""

    def __init__(
        self, main: Callable[[list[str]], int], arguments: Sequence[str], *, enter: Callable[[], object] = os.setsid
    ) -> None:
        """`main`: what runs with `arguments` and returns an exit code. `enter`: what is done in the new process before.
        """
        (out, out_end), (err, err_end) = _context.Pipe(duplex=False), _context.Pipe(duplex=False)
        self._process = _context.Process(target=_run, args=(main, list(arguments), enter, out_end, err_end))
        self._process.start()
        out_end.close()
        err_end.close()
        self.stdout, self.stderr = _text(out), _text(err)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("swarm.peer", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _text(end: Connection) -> io.TextIOWrapper:
    file = os.fdopen(os.dup(end.fileno()), "r")
    end.close()
    assert isinstance(file, io.TextIOWrapper)
    return file


def peer(arguments: list[str]) -> int:
    """As `python -m swarm.peer` does."""
    from swarm.peer import main

    sys.argv = ["swarm.peer", *arguments]
    return main(arguments)


def _run(
    main: Callable[[list[str]], int], arguments: list[str], enter: Callable[[], object], out: Connection,
    err: Connection,
) -> None:
    for end, number in ((out, 1), (err, 2)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    enter()
    code = main(arguments)
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
