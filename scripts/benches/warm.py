"""Peers of the lab whose libraries are loaded already, so that a restart costs the others nothing.

On machines of their own, a peer that starts loads its libraries with its own processor. Where one machine plays six
peers, it takes that time from the five others, and three times as long: what a benchmark measures then is imports. So
peers are forked from a process that has everything (scripts/forked.py), and sleep for a set time instead.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable
from typing import Any, TextIO

from forked import Forked
from wanlab import namespaces
from wanlab.lab import Lab

from benches.labpeer import ROOT, Launch, on_its_own

LOADING_S = 4.5
"""for imports: what `bench.py join` found (4.3 s), rounded up. It is no law: months of libraries later, and on a slower
day, the same imports took 9 to 11 s on the machine whose figures are in the README"""
CLONE_NEWNET = 0x40000000


def launcher(main: Callable[[list[str]], int], *, loading_s: float = LOADING_S) -> Launch:
    """A `launch` of LabSwarm. `main` runs in place of the program that the command names."""

    def launch(lab: Lab, host: str, argv: list[str], *, stderr: TextIO, **_: Any) -> Forked:
        enter = functools.partial(
            enter_host, str(namespaces.NETNS / f"{lab.name}.{host}"), lab.environment(host), stderr.name, loading_s
        )
        return Forked(main, argv[2:], enter=enter)  # without the interpreter and the file

    return launch


def enter_host(namespace: str, environment: dict[str, str], errors: str, loading_s: float) -> None:
    """Makes this process one of that host, with its stderr in the file `errors`. Raises OSError."""
    on_its_own()
    os.environ.update(environment, PYTHONPATH=str(ROOT))
    os.chdir(ROOT)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    held = os.open(namespace, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(held, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter {namespace}: {os.strerror(number)}")
    finally:
        os.close(held)
    time.sleep(loading_s)
