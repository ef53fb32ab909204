"""What a line can carry is found from what passes while it is busy, and divided among the streams that are there."""

from __future__ import annotations

import random

import pytest

from swarm.network.line import (
    GAP_S,
    LEAST_BURST_S,
    MEMORY_S,
    RARE,
    STREAM_BYTES,
    WINDOW_S,
    WINDOWS,
    Line,
)

FRAME = 64 * 1024
LINE = 6e6
"""bytes a second"""


def body(line: Line, *, size: int, bytes_per_s: float, start: float, stream: str = "a") -> float:
    """It arrives frame by frame; returns when it is there."""
    for number in range(size // FRAME):
        line.passed(stream, FRAME, now=start + number * FRAME / bytes_per_s)
    return start + size / bytes_per_s


def test_nothing_is_known_before_something_passed() -> None:
    line = Line()
    assert line.bytes_per_s == line.share("a", now=0.0) == 0.0
    line.passed("a", FRAME, now=1.0)  # one frame has no rate
    assert line.share("a", now=1.0) == 0.0


@pytest.mark.parametrize("size", [2**20, 2**23])
def test_the_rate_of_a_busy_line_is_found_and_pauses_do_not_count(size: int) -> None:
    line, now = Line(), 0.0
    for _ in range(30):
        now = body(line, size=size, bytes_per_s=LINE, start=now) + 1.0
    assert line.bytes_per_s == pytest.approx(LINE, rel=0.02)


def test_bursts_too_short_to_measure_are_left_out() -> None:
    line, now = Line(), 0.0
    for _ in range(500):
        now = body(line, size=2**20, bytes_per_s=2**20 / (0.9 * LEAST_BURST_S), start=now) + 2 * GAP_S
    assert line.bytes_per_s == 0.0


def test_two_streams_are_measured_together_and_share() -> None:
    line = Line()
    for number in range(400):
        line.passed("ab"[number % 2], FRAME, now=number * FRAME / LINE)
    now = 400 * FRAME / LINE
    assert line.bytes_per_s == pytest.approx(LINE, rel=0.02)
    assert line.share("a", now=now) == line.share("b", now=now) == line.bytes_per_s / 2
    assert line.share("new", now=now) == line.bytes_per_s / 3, "who asks will be one of them"


def test_who_has_sent_nothing_for_a_while_has_no_share_any_more() -> None:
    line = Line()
    end = body(line, size=2**22, bytes_per_s=LINE, start=0.0, stream="gone")
    end = body(line, size=2**22, bytes_per_s=LINE, start=end, stream="here")
    assert line.share("here", now=end) == line.bytes_per_s / 2
    assert line.share("new", now=end + MEMORY_S) == line.bytes_per_s / 3
    assert line.share("anybody", now=end + 100 * MEMORY_S) == line.bytes_per_s, "what is known of the line stays"


@pytest.mark.parametrize("bytes_each_s", [1, STREAM_BYTES // 4])
def test_strangers_who_trickle_take_no_share_from_a_stream(bytes_each_s: int) -> None:
    line, now = Line(), 0.0
    for second in range(60):
        now = body(line, size=2**22, bytes_per_s=LINE, start=float(second))
        for stranger in range(50):
            line.passed(f"stranger {stranger}", bytes_each_s, now=now)
    assert line.share("a", now=now) == line.bytes_per_s
    assert len(line._brought) == 51
    assert line.share("a", now=now + 100 * MEMORY_S) and not line._brought, "nobody is remembered for good"


def test_short_pauses_belong_to_a_burst() -> None:
    """The other stream has the line then, or the sender waits for a processor: it is not faster between them."""
    line, now = Line(), 0.0
    for _ in range(100):
        now = body(line, size=4 * FRAME, bytes_per_s=2 * LINE, start=now) + 4 * FRAME / (2 * LINE)
    assert line.bytes_per_s == pytest.approx(LINE, rel=0.1)


def test_what_receivers_say_of_our_bytes_comes_in_any_order() -> None:
    line, dice = Line(), random.Random(1)
    for number in range(1000):
        line.passed("ab"[number % 2], FRAME, now=number * FRAME / LINE - 0.05 * dice.random())
    assert line.bytes_per_s == pytest.approx(LINE, rel=0.05)


def test_a_line_that_was_seldom_full_is_known_by_its_best_hours() -> None:
    line, now, dice = Line(), 0.0, random.Random(0)
    for _ in range(WINDOWS // 2):
        slow = dice.random() < 0.8  # the sender was slower than the line
        rate = LINE * (0.4 if slow else 1.0)
        now = body(line, size=int(2 * WINDOW_S * rate), bytes_per_s=rate, start=now)
    assert line.bytes_per_s == pytest.approx(LINE, rel=0.02)


def test_bytes_that_waited_for_a_busy_processor_are_no_faster_line() -> None:
    """They come all at once, after a pause."""
    line, now = Line(), 0.0
    for number in range(200):
        fast = number % round(2 / RARE) == 0
        rate = LINE * (5.0 if fast else 1.0)
        now = body(line, size=int(1.05 * WINDOW_S * rate), bytes_per_s=rate, start=now)
    assert line.bytes_per_s == pytest.approx(LINE, rel=0.05)


def test_a_line_that_became_slower_is_found_so() -> None:
    line, now = Line(), 0.0
    now = body(line, size=int(40 * WINDOW_S * 2 * LINE), bytes_per_s=2 * LINE, start=now)
    now = body(line, size=int((WINDOWS + 2) * WINDOW_S * LINE), bytes_per_s=LINE, start=now)
    assert line.bytes_per_s == pytest.approx(LINE, rel=0.02)
