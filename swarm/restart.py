"""`python -m swarm.peer --restart`: a peer that is started again whatever ends it.

A process loads the libraries, forks the peer and waits. It has no sockets and no tensors, so little can end it. A peer
that was in the swarm and is killed (by a system short of memory, a fault in a driver), or ends by an error, is forked
again and goes on from its home folder; without the four seconds that a start takes for libraries. What somebody asked
for is not undone: Ctrl+C, a run that is complete, a mistake on the command line.
"""

from __future__ import annotations

import dataclasses
import importlib
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from swarm.config import PeerConfig
from swarm.errors import ConfigError

LIBRARIES = ("swarm.monitor.console", "swarm.monitor.journal", "swarm.train.participant", "swarm.train.text")
"""what a peer loads when it starts, and with it torch, transformers and hivemind"""
DONE, USAGE, STOPPED_NOW = 0, 2, 130
"""exit codes of a peer after which there is nothing to do"""
STOPS = (signal.SIGINT, signal.SIGTERM)
FORWARDED = (*STOPS, signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else STOPS
"""what this process gets is meant for the peer"""
PAUSE_S, MAX_PAUSE_S = 0.1, 60.0
SOUND_S = 60.0
"""who lives that long has nothing that ends it at once"""
ALIVE_S = 1.0
"""how often the peer looks whether the process that started it is there"""

Live = Callable[[PeerConfig, Callable[[], object]], int]
"""Be the peer, call the function once it is in the swarm, return the exit code."""


def watch(config: PeerConfig, live: Live) -> int:
    """Run peers, one after the other, until one has ended for good; returns its exit code. Raises ConfigError where
    processes cannot be forked. From the main thread only."""
    if not hasattr(os, "fork"):
        raise ConfigError("--restart cannot work on this system", why="it has no fork()", do="leave it out")
    for name in LIBRARIES:
        importlib.import_module(name)
    ready = mmap.mmap(-1, 1)  # shared with every fork
    current, asked = 0, False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = asked or number in STOPS
        if current:
            os.kill(current, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    early = 0
    while True:
        began = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # none may come between the fork and its being known here
        current = _fork(config, live, ready)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        code = os.waitstatus_to_exitcode(os.waitpid(current, 0)[1])
        current = 0
        early = 0 if time.monotonic() - began > SOUND_S else early + 1
        pause_s = None if asked else pause_before_next(code, was_ready=ready[0] == 1, early=early)
        if pause_s is None:
            return code if code >= 0 else 128 - code  # as shells say it
        print(f"the peer has ended ({how(code)}); it is started again in {pause_s:.1f} s", file=sys.stderr, flush=True)
        over = time.monotonic() + pause_s
        while time.monotonic() < over:
            time.sleep(min(pause_s, ALIVE_S))
            if asked:
                return DONE
        config = resuming(config)


def pause_before_next(code: int, *, was_ready: bool, early: int) -> float | None:
    """Seconds until a peer that has ended is started again; None: not at all. `code`: its exit code, or minus the
    signal; `was_ready`: a peer of this command has been in the swarm; `early`: how many in a row have ended soon."""
    if not was_ready or code in (DONE, USAGE, STOPPED_NOW):
        return None
    return min(MAX_PAUSE_S, PAUSE_S * 2.0 ** max(0, early - 1))


def how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-code}"


def resuming(config: PeerConfig) -> PeerConfig:
    """The same peer's next start: with the run that its home has now, whoever of those it ever met is there."""
    return dataclasses.replace(config, new_swarm=False, run=None, initial_peers=[])


def _fork(config: PeerConfig, live: Live, ready: mmap.mmap) -> int:
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)  # Ctrl+C goes to the parent alone, which passes it on once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
        code = live(config, lambda: ready.__setitem__(0, 1))
    except KeyboardInterrupt:
        code = STOPPED_NOW
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with(parent: int) -> None:
    """Finish, as after Ctrl+C, when the process that would start this peer again is gone."""
    while os.getppid() == parent:
        time.sleep(ALIVE_S)
    os.kill(os.getpid(), signal.SIGTERM)
