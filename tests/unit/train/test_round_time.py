"""The time of a round: against rounds that were measured, by hand where that is easy, and what must hold for any."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.train.lines import Line, Lines, Pair, parse_line, read_topology
from swarm.train.round_time import (
    FIRST_BYTES,
    LEGS,
    MAX_UNDER_WAY_BYTES,
    SHARE,
    TCP_OVER_PAYLOAD,
    pieces_of,
    round_time,
    send_s,
)

MEASURED = [
    ("1M", 4, 2, 0.57, 0.59), ("1M", 4, 4, 0.57, 0.59), ("1M", 8, 2, 1.08, 0.72), ("1M", 8, 4, 1.08, 0.77),
    ("1M", 32, 2, 4.30, 1.30), ("1M", 32, 4, 4.30, 1.60), ("10M", 4, 2, 5.11, 1.64), ("10M", 4, 4, 5.11, 2.48),
    ("10M", 8, 2, 10.03, 2.50), ("10M", 8, 4, 10.03, 3.43), ("10M", 32, 2, 39.83, 7.16), ("10M", 32, 4, 39.83, 9.89),
]  # fmt: skip
"""README's table of rounds on home-100: parameters, bits, peers, MB encoded, seconds. The peers shared two cores"""
VALUES = {"1M": 1_075_000, "10M": 9_957_500}


@pytest.mark.parametrize(("size", "bits", "peers", "megabytes", "seconds"), MEASURED)
def test_rounds_that_were_measured_are_foretold(
    size: str, bits: int, peers: int, megabytes: float, seconds: float
) -> None:
    found = round_time(
        read_topology("home-100").first(peers), round_bytes=int(megabytes * 1e6), num_values=VALUES[size],
        cores=2 / peers,
    )
    assert found.total_s == pytest.approx(seconds, rel=0.15)


def test_tcp_doubles_until_the_line_is_full() -> None:
    rate, rtt_s = 1e6, 0.1
    assert send_s(FIRST_BYTES, rate, rtt_s=rtt_s) == pytest.approx(FIRST_BYTES / rate), "one go"
    three = FIRST_BYTES * (1 + 2) + 1000
    assert send_s(three, rate, rtt_s=rtt_s) == pytest.approx(2 * rtt_s + 1000 / rate)
    long = send_s(50e6, rate, rtt_s=rtt_s)
    assert 50 < long < 50 + 4 * rtt_s, "nothing but the line counts in the end"


def test_more_connections_begin_with_more() -> None:
    one, three = (send_s(1e6, math.inf, rtt_s=0.1, connections=count) for count in (1, 3))
    assert three < one
    assert send_s(1e6, 1e6, rtt_s=0.0) == 1 and send_s(1e6, math.inf, rtt_s=0.0) == 0


def test_one_connection_has_so_much_under_way_at_most() -> None:
    seconds = send_s(1e9, math.inf, rtt_s=0.1)
    assert 1e9 / seconds == pytest.approx(MAX_UNDER_WAY_BYTES / 0.1, rel=0.05)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e3, 1e9), st.floats(1e4, 1e8), st.floats(0.001, 0.5), st.integers(1, 63))
def test_sending_is_never_faster_than_the_line_and_grows_with_size(
    size: float, rate: float, rtt_s: float, connections: int
) -> None:
    seconds = send_s(size, rate, rtt_s=rtt_s, connections=connections)
    assert seconds >= size / rate * (1 - 1e-9) or math.isclose(seconds, size / rate)
    assert send_s(2 * size, rate, rtt_s=rtt_s, connections=connections) >= seconds


def test_a_round_by_hand_on_lines_without_delay() -> None:
    lines = Lines((Line("a", 8e6, 8e6, 0.0), Line("b", 8e6, 8e6, 0.0)))
    found = round_time(lines, round_bytes=1_000_000, num_values=256)
    assert found.wire_bytes == pytest.approx(TCP_OVER_PAYLOAD * 1e6), "half to the other, and half of the result"
    assert found.sending_s == found.line_s == pytest.approx(TCP_OVER_PAYLOAD / SHARE) and found.legs_s == 0
    assert 0 < found.arithmetic_s < 1e-4


def test_the_slowest_line_up_or_down_and_the_slowest_path_count() -> None:
    fast = Lines((Line("a", 1e9, 1e9), Line("b", 1e9, 1e9), Line("c", 1e9, 1e9)))
    def seconds(lines: Lines) -> float:
        return round_time(lines, round_bytes=10_000_000, num_values=10_000).sending_s

    base = seconds(fast)
    up = seconds(Lines((*fast.lines[:2], Line("c", 1e7, 1e9))))
    down = seconds(Lines((*fast.lines[:2], Line("c", 1e9, 1e7))))
    path = seconds(Lines(fast.lines, (Pair(("a", "b"), bits_per_s=1e7),)))
    assert up == down > 10 * base and base < path < up
    far = Lines(fast.lines, (Pair(("a", "c"), latency_s=0.2),))
    assert round_time(far, round_bytes=1000, num_values=256).legs_s == pytest.approx(LEGS * 0.2)


def test_alone_there_is_arithmetic_only() -> None:
    found = round_time(Lines((parse_line("20/100/30ms"),)), round_bytes=10**6, num_values=10**6)
    assert found.legs_s == found.sending_s == found.line_s == found.wire_bytes == 0
    assert found.total_s == pytest.approx(found.cpu_s) and found.cpu_s > 0.01


def test_while_tcp_starts_others_have_room() -> None:
    found = round_time(read_topology("home-100"), round_bytes=300_000, num_values=600_000)
    assert found.line_s == pytest.approx(found.wire_bytes * 8 / (SHARE * 100e6)) and found.line_s < found.sending_s / 3
    unlimited = Lines((Line("a"), Line("b")))
    assert round_time(unlimited, round_bytes=300_000, num_values=600_000).line_s == 0


def test_half_a_core_takes_twice_as_long_and_costs_as_much() -> None:
    lines = read_topology("home-100")
    whole, half = (round_time(lines, round_bytes=10**7, num_values=10**7, cores=cores) for cores in (1.0, 0.5))
    assert half.arithmetic_s == pytest.approx(2 * whole.arithmetic_s) and half.cpu_s == pytest.approx(whole.cpu_s)
    assert round_time(lines, round_bytes=10**7, num_values=10**7, cores=64) == whole, "one thread does it"


def test_without_momentum_less_is_hashed() -> None:
    lines = read_topology("home-100")
    with_it, without = (round_time(lines, round_bytes=10**7, num_values=10**7, buffers=count) for count in (1, 0))
    assert without.arithmetic_s < with_it.arithmetic_s and without.sending_s == with_it.sending_s


def test_a_slow_core_rather_than_a_fast_line_may_set_the_pace() -> None:
    lines = Lines((Line("a", latency_s=0.0), Line("b", latency_s=0.0)))
    found = round_time(lines, round_bytes=10**8, num_values=2 * 10**8)
    assert found.sending_s + found.arithmetic_s == pytest.approx(found.cpu_s), "nothing hides it"


def test_pieces_are_those_of_the_protocol() -> None:
    assert pieces_of(256, 4) == 1, "a block is not cut"
    assert pieces_of(10_000_000, 4) == 4 and pieces_of(1_075_000, 2) == 2
    assert pieces_of(10**9, 64) == 1, "64 parts in all"


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 64), st.integers(1, 10**9))
def test_what_one_sends_hardly_grows_with_the_members(count: int, size: int) -> None:
    found = round_time(Lines((parse_line("20/100/30ms"),)).first(count), round_bytes=size, num_values=size)
    assert found.wire_bytes == pytest.approx(TCP_OVER_PAYLOAD * 2 * size * (count - 1) / count)
    assert found.total_s > found.wire_bytes * 8 / 20e6
