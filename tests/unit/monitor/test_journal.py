"""The journal: every event, in order, readable after any end, and never in the way of training."""

import json
import os
import subprocess

import pytest

from swarm.events import Bus, Warning
from swarm.monitor.journal import FILE_NAME, Journal, json_line


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def warnings():
    return []


def test_every_event_is_a_json_line_with_its_time(tmp_path, run, warnings):
    times = iter([100.0, 101.12345])
    journal = Journal(tmp_path, warn=warnings.append, clock=lambda: next(times))
    journal(run.progress())
    journal(run.left())
    assert lines_of(tmp_path / FILE_NAME) == [
        {"time": 100.0, **run.progress().as_json()},
        {"time": 101.123, "event": "left", "reason": "finished"},
    ]
    journal.close()
    journal.close()
    assert warnings == []


def test_it_is_on_the_disk_at_once_for_a_peer_may_be_killed(tmp_path, run, warnings):
    journal = Journal(tmp_path, warn=warnings.append)
    journal(run.committed())
    assert len(lines_of(tmp_path / FILE_NAME)) == 1
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600
    journal.close()


def test_a_restart_goes_on_below_even_after_half_a_line(tmp_path, run, warnings):
    (tmp_path / FILE_NAME).write_text('{"event": "left"}\n{"event": "prog')
    journal = Journal(tmp_path, warn=warnings.append)
    journal(run.left())
    journal.close()
    text = (tmp_path / FILE_NAME).read_text().splitlines()
    assert text[:2] == ['{"event": "left"}', '{"event": "prog']
    assert json.loads(text[2])["reason"] == "finished"


def test_events_after_the_close_are_let_go(tmp_path, run, warnings):
    journal = Journal(tmp_path, warn=warnings.append)
    journal.close()
    journal(run.left())
    assert lines_of(tmp_path / FILE_NAME) == []
    assert warnings == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_on_a_full_disk_it_stops_with_one_warning(tmp_path, run, warnings):
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    journal = Journal(tmp_path, warn=warnings.append)
    for _ in range(3):
        journal(run.progress())
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert "training goes on" in warnings[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_its_warning_may_come_back_to_it_as_an_event(tmp_path, run):
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    bus, seen = Bus(), []
    bus.listen(Journal(tmp_path, warn=lambda text: bus.emit(Warning(text))))
    bus.listen(seen.append)
    bus.emit(run.progress())
    bus.emit(run.left())
    assert [event.kind for event in seen] == ["warning", "progress", "left"]


def test_a_disk_that_fills_up_keeps_every_whole_line(tmp_path, run, warnings):
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "swarm-test", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a small disk here")
    try:
        journal = Journal(tmp_path, warn=warnings.append)
        for _ in range(1000):
            journal(run.progress())
        assert len(warnings) == 1
        whole = (tmp_path / FILE_NAME).read_text().split("\n")[:-1]
        assert len(whole) > 20
        assert all(json.loads(line)["event"] == "progress" for line in whole)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_folder_that_is_gone_is_a_warning_too(tmp_path, run, warnings):
    journal = Journal(tmp_path / "gone", warn=warnings.append)
    journal(run.progress())
    journal.close()
    assert len(warnings) == 1


def test_a_line_is_valid_json_whatever_the_numbers_and_names(run):
    line = json_line(run.progress(loss=float("nan")))
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert json.loads(json_line(run.progress(loss=float("-inf"))))["loss"] is None
    line = json_line(run.warning(run.EVIL + "\u2028"))
    assert line.isascii() and line.count("\n") == 1 and "\x1b" not in line
    assert json.loads(line)["text"] == run.EVIL + "\u2028"
