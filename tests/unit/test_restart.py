"""Who ends is started again, unless somebody wanted the end: real processes, whose lives are scripted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.forked import Forked
from swarm import restart
from swarm.config import PeerConfig
from swarm.errors import ConfigError

END_S = 60
LONG_S = 10 * END_S


def scripted(arguments: list[str]) -> int:
    """`watch` over peers that live as the words say, one word a life; the last one is every later life's."""
    lives, words = Path(arguments[0]), arguments[1:]

    def live(config: PeerConfig, on_ready: Callable[[], object]) -> int:
        number = len(lives.read_text()) if lives.exists() else 0
        lives.write_text("x" * (number + 1))
        print(number, os.getpid(), "new" if config.new_swarm else "again", config.home, flush=True)
        for word in words[min(number, len(words) - 1)].split(","):
            if word == "ready":
                on_ready()
            elif word == "wait":
                time.sleep(LONG_S)
            elif word == "stoppable":
                signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
                print("stoppable", flush=True)
                time.sleep(LONG_S)
            elif word.startswith("kill"):
                os.kill(os.getpid(), int(word.removeprefix("kill")))
            elif word == "raise":
                raise RuntimeError("nobody expected this")
            else:
                return int(word)
        return 0

    return restart.watch(PeerConfig(new_swarm=True, run="run.yaml", initial_peers=["/a"], home="here"), live)


def lines(forked: Forked) -> list[str]:
    return forked.stdout.read().splitlines()


def test_the_killed_one_is_started_again_and_resumes(tmp_path: Path) -> None:
    forked = Forked(scripted, [str(tmp_path / "lives"), "ready,kill9", "ready,1", "ready,0"])
    said = [line.split() for line in lines(forked)]
    assert [(words[0], words[2], words[3]) for words in said] == [
        ("0", "new", "here"), ("1", "again", "here"), ("2", "again", "here")
    ]
    assert len({words[1] for words in said}) == 3 and forked.wait(END_S) == 0
    told = forked.stderr.read()
    assert "killed by SIGKILL" in told and "exit code 1" in told and told.count("started again in") == 2


@pytest.mark.parametrize(("life", "code"), [
    ("ready,0", 0), ("ready,2", 2), ("ready,130", 130),  # done, a mistake, told twice to stop
    ("1", 1), (f"kill{signal.SIGKILL:d}", 128 + signal.SIGKILL),  # it never was in the swarm
])
def test_what_was_wanted_or_never_worked_is_not_undone(tmp_path: Path, life: str, code: int) -> None:
    forked = Forked(scripted, [str(tmp_path / "lives"), life, "ready,wait"])
    assert len(lines(forked)) == 1 and forked.wait(END_S) == code


def test_who_was_in_the_swarm_is_started_again_until_it_is_there_again(tmp_path: Path) -> None:
    forked = Forked(scripted, [str(tmp_path / "lives"), "ready,kill9", "1", "1", "0"])
    assert len(lines(forked)) == 4 and forked.wait(END_S) == 0


def test_an_error_in_the_peer_is_no_second_peer(tmp_path: Path) -> None:
    """An exception must not run on in the fork as if that was the process that waits."""
    forked = Forked(scripted, [str(tmp_path / "lives"), "ready,raise", "ready,0"])
    assert [line.split()[0] for line in lines(forked)] == ["0", "1"] and forked.wait(END_S) == 0
    assert "exit code 1" in forked.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_stop_is_passed_on_and_is_the_end(tmp_path: Path, number: signal.Signals) -> None:
    forked = Forked(scripted, [str(tmp_path / "lives"), "ready,wait"])
    forked.stdout.readline()
    forked.send_signal(number)
    assert forked.wait(END_S) in (130, 128 + number) and forked.stdout.read() == ""


def test_a_peer_that_stops_well_is_a_command_that_ends_well(tmp_path: Path) -> None:
    forked = Forked(scripted, [str(tmp_path / "lives"), "ready,stoppable"])
    forked.stdout.readline()
    assert forked.stdout.readline() == "stoppable\n"
    forked.send_signal(signal.SIGTERM)
    assert forked.wait(END_S) == 0


def test_it_can_be_stopped_between_two_lives(tmp_path: Path) -> None:
    """Who fails at once again and again has long pauses; Ctrl+C need not wait for their end."""
    forked = Forked(scripted, [str(tmp_path / "lives"), "ready,1", "1"])
    told = ""
    while "in 3.2 s" not in told:
        told = forked.stderr.readline()
    forked.terminate()
    assert forked.wait(END_S) == 0


def test_a_peer_ends_when_nobody_is_left_to_start_it_again(tmp_path: Path) -> None:
    forked = Forked(scripted, [str(tmp_path / "lives"), "ready,stoppable"])
    forked.stdout.readline()
    forked.stdout.readline()
    forked.kill()
    assert forked.stdout.read() == ""  # the end of its last process: it held the pipe


@pytest.mark.parametrize(("code", "was_ready", "early", "pause_s"), [
    (-9, True, 1, 0.1), (1, True, 0, 0.1), (1, True, 4, 0.8), (-11, True, 100, 60.0),
    (0, True, 1, None), (2, True, 1, None), (130, True, 1, None), (-9, False, 1, None), (1, False, 1, None),
])
def test_pauses_grow_while_it_ends_soon(code: int, was_ready: bool, early: int, pause_s: float | None) -> None:
    assert restart.pause_before_next(code, was_ready=was_ready, early=early) == pytest.approx(pause_s)


def test_ends_are_told_in_words() -> None:
    assert restart.how(3) == "exit code 3" and restart.how(-signal.SIGSEGV) == "killed by SIGSEGV"
    assert restart.how(-(signal.NSIG + 5)) == f"killed by signal {signal.NSIG + 5}"


def test_the_next_start_resumes_what_the_home_has() -> None:
    config = PeerConfig(initial_peers=["/a"], home="h", run_id="demo-0123456789ab", threads=3, restart=True)
    assert restart.resuming(config) == PeerConfig(home="h", run_id="demo-0123456789ab", threads=3, restart=True)
    assert not restart.resuming(PeerConfig(new_swarm=True, run="r.yaml")).new_swarm


def test_where_nothing_can_be_forked_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ConfigError, match="--restart"):
        restart.watch(PeerConfig(), lambda config, on_ready: 0)
