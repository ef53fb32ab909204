"""Events to status: pure, bounded, and the same line every time."""

import dataclasses
import functools

import pytest

from swarm.events import Event
from swarm.monitor.status import KEPT_ROUNDS, KEPT_WARNINGS, Status, round_line, status_line, update


def reduced(*events):
    return functools.reduce(update, events, Status())


def test_the_status_line_has_its_fixed_shape(run):
    assert status_line(reduced(run.progress())) == run.LINE


def test_there_is_no_status_line_before_there_is_something_to_say(run):
    assert status_line(reduced(run.check(), run.ready())) == ""


def test_the_checklist_keeps_its_order_and_each_name_once(run):
    status = reduced(run.check("device"), run.check("state", "10 of 20 MB"), run.check("state", "20 of 20 MB"))
    assert [(c.name, c.text) for c in status.checks] == [
        ("device", "CPU, 2 threads (no CUDA device)"),
        ("state", "20 of 20 MB"),
    ]


def test_the_round_number_is_the_highest_version_and_never_falls(run):
    assert reduced(run.committed(version=5)).version == 5
    assert reduced(run.committed(version=5), run.progress(versions=(4, 6, 4))).version == 6
    assert reduced(run.progress(versions=(7,)), run.committed(version=5)).version == 7
    assert reduced(run.progress(versions=())).version == 0


def test_only_the_last_rounds_and_warnings_are_kept(run):
    events = [run.committed(version=v) for v in range(100)] + [run.warning(f"w{n}") for n in range(100)]
    status = reduced(*events)
    assert [r.version for r in status.rounds] == list(range(100 - KEPT_ROUNDS, 100))
    assert status.warnings == tuple(f"w{n}" for n in range(100 - KEPT_WARNINGS, 100))


def test_a_repeated_warning_is_kept_once_and_counts_as_new(run):
    assert reduced(run.warning("a"), run.warning("b"), run.warning("a")).warnings == ("b", "a")


def test_leaving_and_readiness_are_kept(run):
    status = reduced(run.ready(), run.left("finished"))
    assert (status.ready, status.left) == (run.ready(), "finished")


def test_unknown_events_change_nothing(run):
    before = reduced(run.progress())
    assert update(before, Event()) is before


def test_a_status_cannot_be_changed_in_place(run):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Status().version = 3
    first = Status()
    update(first, run.progress())
    assert first == Status()


def test_a_round_is_told_in_one_line(run):
    assert round_line(run.committed(version=3, fragment=1)) == (
        "round 3 of fragment 1  3 contributed 20k tokens  1.2 s  up 250 kB  down 260 kB  abcdef012345"
    )


def test_a_loss_that_is_no_number_is_shown_as_such(run):
    assert "loss nan" in status_line(reduced(run.progress(loss=float("nan"))))
