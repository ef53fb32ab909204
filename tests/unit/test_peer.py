"""The process's end: what the signals do at which time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from swarm.peer import CalledOff, Stop


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stop]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", ended)
    made = Stop()
    made.install()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(
    stop: Stop, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not stop.asked
    signal.raise_signal(number)
    assert stop.asked and "again to stop now" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="130"):
        signal.raise_signal(number)


def test_while_joining_the_first_signal_calls_it_off(stop: Stop, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CalledOff), stop.at_once():
        signal.raise_signal(signal.SIGINT)
    assert stop.asked and not capfd.readouterr().err, "there is nothing to finish"
    with pytest.raises(CalledOff), stop.at_once():
        raise AssertionError("what was called off does not begin")
