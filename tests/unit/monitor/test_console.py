"""What people see: fixed shapes, whole join lines, no stranger at the controls, and no way to stop training."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading

import pytest

from swarm.errors import ConfigError
from swarm.events import Check
from swarm.monitor.console import PlainView, check_line, make_ui
from swarm.monitor.live import LiveView

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def shown(kind, *events, stream=None, **options):
    """All that `kind` writes for these events; (seconds, event) pairs set the clock."""
    stream = stream or io.StringIO()
    clock = Clock()
    ui = make_ui(kind, stream, clock=clock, **options)
    for event in events:
        clock.now, event = event if isinstance(event, tuple) else (clock.now, event)
        ui(event)
    ui.close(timeout_s=60)
    return stream.getvalue()


# --- plain


def test_the_checklist_is_aligned_with_its_seconds(run):
    lines = shown("plain", run.check(), run.check("reachable", "yes", 12.34)).splitlines()
    assert lines[0].startswith("  device      CPU, 2 threads (no CUDA device)")
    assert lines[1].startswith("  reachable   yes")
    assert lines[0].endswith("   0.4 s") and lines[1].endswith("  12.3 s")
    assert len(lines[0]) == len(lines[1])


def test_the_join_command_is_whole_and_alone_on_its_line(run):
    lines = shown("plain", run.ready()).splitlines()
    assert "Send this to a friend:" in lines
    assert f"  {run.JOIN}" in lines


def test_the_status_line_comes_at_most_every_few_seconds(run):
    events = [(t / 2, run.progress(tokens=300_000 + 1000 * t)) for t in range(40)]
    lines = shown("plain", *events, interval_s=5.0).splitlines()
    assert len(lines) == 4  # at 0, 5, 10 and 15 s
    assert lines[0] == run.LINE


def test_the_last_numbers_are_shown_before_the_end_and_not_twice(run):
    lines = shown("plain", (0, run.progress()), (1, run.progress(tokens=310_000)), (2, run.left())).splitlines()
    assert lines == [run.LINE, run.LINE.replace("300k", "310k"), "left: finished"]
    assert shown("plain", (0, run.progress()), (1, run.left())).splitlines() == [run.LINE, "left: finished"]


def test_rounds_are_told_one_by_one_only_with_verbose(run):
    assert shown("plain", run.committed(), run.committed(version=4)) == ""
    lines = shown("plain", run.committed(), run.committed(version=4), verbose=True).splitlines()
    assert [line[:7] for line in lines] == ["round 3", "round 4"]


def test_the_same_warning_is_shown_once_a_minute_with_its_count(run):
    events = [(t, run.warning("peer gone")) for t in range(0, 70, 10)] + [(70, run.warning("other"))]
    assert shown("plain", *events).splitlines() == [
        "warning: peer gone",
        "warning: peer gone (5 more times)",
        "warning: other",
    ]


def test_a_name_the_terminal_cannot_write_does_not_end_the_screen(run):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    ui = make_ui("plain", stream)
    ui(run.warning("caf\u00e9 is gone"))
    ui(run.left())
    ui.close(timeout_s=60)
    assert raw.getvalue() == b"warning: caf? is gone\nleft: finished\n"


@pytest.mark.parametrize("kind", ["plain", "live"])
def test_no_text_of_a_stranger_steers_the_terminal(run, kind):
    events = [run.check("state", run.EVIL), run.ready(run.EVIL), run.warning(run.EVIL), run.left(run.EVIL)]
    text = shown(kind, *events, stream=Terminal())
    assert "\x1b[2J" not in text and "\x1b]0" not in text and "\x07" not in text
    assert f"left: {run.EVIL_SHOWN}" in ANSI.sub("", text)
    assert not any(line.startswith("round 999") for line in ANSI.sub("", text).splitlines())


# --- json


def test_json_is_exactly_the_event_one_object_a_line(run):
    events = [run.check(), run.ready(), run.progress(), run.committed(), run.warning(run.EVIL), run.left()]
    lines = shown("json", *events).splitlines()
    assert [json.loads(line) for line in lines] == [event.as_json() for event in events]


def test_json_is_flushed_line_by_line(run):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader) as script:
        ui = make_ui("json", stream)
        ui(run.progress())
        assert json.loads(script.readline())["event"] == "progress"  # while the screen is still open
        ui.close(timeout_s=60)


# --- live


def test_live_shows_it_all_and_the_join_command_outside_the_panel(run):
    events = [run.check(), run.ready(), run.progress(), run.committed(), run.warning(), run.left()]
    lines = ANSI.sub("", shown("live", *events, stream=Terminal())).splitlines()
    assert f"  {run.JOIN}" in lines
    text = re.sub(r"[\s\u2502]+", " ", "\n".join(lines))
    for part in ("swarm demo-0123456789ab", "device CPU, 2 threads", "loss 3.412", "round 3 of fragment 0"):
        assert part in text
    assert "warning: peer amber-heron is gone" in text and "left: finished" in text


def test_live_puts_back_what_it_stood_in_for(run, monkeypatch):
    stdout, stderr = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    handler = logging.StreamHandler(stderr)
    logger = logging.getLogger("a.peer.under.test")
    logger.addHandler(handler)
    try:
        view = LiveView(stdout)
        view.show(run.progress(), 0.0)
        assert handler.stream is sys.stderr is not stderr
        logger.warning("in the log")
        print("printed")
        view.close()
        assert (sys.stdout, sys.stderr, handler.stream) == (stdout, stderr, stderr)
        lines = [line.strip() for line in ANSI.sub("", stdout.getvalue()).splitlines()]
        assert "in the log" in lines and "printed" in lines
    finally:
        logger.removeHandler(handler)


ON_A_TERMINAL = """
import logging, sys
from swarm.events import Progress
from swarm.monitor.console import make_ui
logging.basicConfig(format="%(message)s")
ui = make_ui("auto", sys.stdout)
for n in range(30):
    ui(Progress(tokens=n, swarm_tokens=n, loss=1.0, tokens_per_s=1.0, peers=1))
    logging.warning("log line %d.", n)
ui.close(60)
print("after", flush=True)
"""


def test_on_a_real_terminal_logs_come_out_whole_above_the_panel():
    master, slave = os.openpty()
    environ = {**os.environ, "PYTHONPATH": os.getcwd(), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    child = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stdout=slave, stderr=slave, env=environ)
    os.close(slave)
    written = b""
    try:
        while chunk := os.read(master, 65536):
            written += chunk
    except OSError:  # the terminal is gone with its last user
        pass
    os.close(master)
    assert child.wait() == 0
    lines = [line.strip() for line in ANSI.sub("", written.decode()).replace("\r", "\n").split("\n")]
    assert [line for line in lines if line.startswith("log line")] == [f"log line {n}." for n in range(30)]
    assert [line for line in lines if line][-1] == "after"
    assert "\u256d" in written.decode()  # the panel's corner: it was live


# --- choosing


def test_auto_is_live_on_a_terminal_and_plain_elsewhere(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert view_of("auto", Terminal()) is LiveView
    assert view_of("auto", io.StringIO()) is PlainView
    monkeypatch.setenv("TERM", "dumb")
    assert view_of("auto", Terminal()) is PlainView


def view_of(kind, stream):
    ui = make_ui(kind, stream)
    ui.close(timeout_s=60)
    return type(ui.view)


def test_an_unknown_kind_is_a_usage_error():
    with pytest.raises(ConfigError, match="--ui web"):
        make_ui("web", io.StringIO())


# --- never in the way of training


class Paused(io.StringIO):
    """A terminal after Ctrl+S: a write returns only once somebody reads again."""

    def __init__(self):
        super().__init__()
        self.reading = threading.Event()

    def write(self, text):
        assert self.reading.wait(60)
        return super().write(text)


@pytest.mark.parametrize("kind", ["plain", "json"])
def test_a_paused_terminal_holds_up_nobody(run, kind):
    stream = Paused()
    ui = make_ui(kind, stream)
    for _ in range(20_000):  # more than is queued: the surplus is let go
        ui(run.warning())
    ui.close(timeout_s=0.01)
    assert stream.getvalue() == ""
    stream.reading.set()


@pytest.mark.parametrize("kind", ["plain", "live", "json"])
def test_a_closed_stream_is_no_error(run, kind):
    stream = Terminal()
    ui = make_ui(kind, stream)
    stream.close()
    for _ in range(100):
        ui(run.warning())
    ui.close(timeout_s=60)
    ui.close()
    ui(run.left())


READER_GONE = """
import sys
from swarm.events import Left, Warning
from swarm.monitor.console import make_ui
ui = make_ui(sys.argv[1], sys.stdout)
ui(Warning("first"))
sys.stdin.readline()
for n in range(2000):
    ui(Warning(f"w{n} " + "x" * 100))
ui(Left("finished"))
ui.close(60)
print("trained to the end", file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["plain", "live", "json"])
def test_a_reader_that_goes_away_costs_neither_training_nor_the_exit_code(kind):
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    child = subprocess.Popen([sys.executable, "-c", READER_GONE, kind], env=environ, **pipes)
    child.stdout.close()
    _, errors = child.communicate(b"\n")
    assert child.returncode == 0
    assert errors.decode() == "trained to the end\n"


def test_what_was_queued_is_shown_even_without_a_close(run):
    program = (
        "import sys\nfrom swarm.events import Left\nfrom swarm.monitor.console import make_ui\n"
        "make_ui('plain', sys.stdout)(Left('an error'))\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ)
    assert (done.stdout, done.stderr, done.returncode) == ("left: an error\n", "", 0)


def test_a_table_in_a_check_stays_a_table() -> None:
    line = check_line(Check("memory", "fragments 0:2 of 4: they fit\nweights   2 MB\ngradients 2 MB", 1.25))
    first, *rows = line.split("\n")
    assert first.startswith("  memory      fragments 0:2 of 4: they fit ") and first.endswith(" 1.2 s")
    assert rows == [" " * 14 + "weights   2 MB", " " * 14 + "gradients 2 MB"]
