"""Peers as processes of their own that need not import anything: forked from one that has loaded the libraries.

A start of `python -m swarm.peer` takes 4 to 5 s of a processor until torch, transformers and hivemind are there, and
the tests start some two hundred peers. Python's own fork server loads them once for each worker of the tests; a peer is
then a fork of it, in a session of its own, that runs the same `main`. It starts in tens of milliseconds, and all else
is as ever: sockets, p2pd, signals, SIGKILL. Tests of the start itself have it: `Swarm(..., forked=False)`.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection

LOADED = ["swarm.peer", "swarm.monitor.console", "swarm.monitor.journal", "swarm.train.participant"]

_context = get_context("forkserver")
_context.set_forkserver_preload(LOADED)


class Forked:
    """As much of `subprocess.Popen` as the tests use."""

    def __init__(self, arguments: list[str]) -> None:
        """`arguments`: of `python -m swarm.peer`."""
        (out, out_end), (err, err_end) = _context.Pipe(duplex=False), _context.Pipe(duplex=False)
        self._process = _context.Process(target=_peer, args=(arguments, out_end, err_end))
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


def _peer(arguments: list[str], out: Connection, err: Connection) -> None:
    os.setsid()
    for end, number in ((out, 1), (err, 2)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = ["swarm.peer", *arguments]

    from swarm import peer

    code = peer.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
