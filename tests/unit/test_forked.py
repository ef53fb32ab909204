"""Peers that are forked from a process with everything loaded, in the tests and in the lab of the benchmarks."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.forked import Forked

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches import warm

END_S = 60


def loaded(arguments: list[str]) -> int:
    """What a peer would find: the words, its session, and whether libraries are there already."""
    print(*arguments, os.getsid(0) == os.getpid(), "torch" in sys.modules, flush=True)
    print("to stderr", file=sys.stderr)
    return 7


def endless(arguments: list[str]) -> int:
    print("begun", flush=True)
    time.sleep(10 * END_S)
    return 0


def failing() -> None:
    raise OSError("cannot enter")


def test_it_is_a_process_as_popen_starts_one() -> None:
    forked = Forked(loaded, ["one", "two"])
    assert forked.stdout.read() == "one two True True\n" and forked.stderr.read() == "to stderr\n"
    assert forked.wait(END_S) == forked.poll() == forked.returncode == 7
    forked.send_signal(signal.SIGTERM)  # no harm: it has ended


@pytest.mark.parametrize(("end", "code"), [(Forked.kill, -signal.SIGKILL), (Forked.terminate, -signal.SIGTERM)])
def test_it_can_be_ended(end: Callable[[Forked], None], code: int) -> None:
    forked = Forked(endless, [])
    assert forked.stdout.readline() == "begun\n" and forked.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        forked.wait(0.0)
    end(forked)
    assert forked.wait(END_S) == code and forked.stdout.read() == ""


def test_what_fails_before_it_begins_is_said() -> None:
    forked = Forked(endless, [], enter=failing)
    assert "cannot enter" in forked.stderr.read() and forked.wait(END_S) == 1 and forked.stdout.read() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_nobody_enters_a_host_that_is_not_there(tmp_path: Path) -> None:
    enter = functools.partial(warm.enter_host, str(tmp_path / "none"), {}, str(tmp_path / "said"), 0.0)
    forked = Forked(endless, [], enter=enter)
    assert forked.wait(END_S) == 1 and forked.stdout.read() == ""
    assert "FileNotFoundError" in (tmp_path / "said").read_text()
