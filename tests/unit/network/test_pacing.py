"""Pacing on simulated paths: a rate, a latency, a queue of any length, and what our own bytes add to it."""

import random

import pytest

from swarm.network.pacing import ACK_BYTES, MAX_WINDOW, MIN_WINDOW, TARGET_S, Pacing

FRAME = 64 * 1024


def transfer(pacing, total, *, bytes_per_s, rtt_s, jitter_s=0.0, start=0.0, seed=0):
    """Send `total` bytes through a bottleneck with an endless queue; returns (seconds, largest delay in the queue)."""
    dice = random.Random(seed)
    now, free_at, sent, largest, came = start, start, 0, 0.0, 0
    acks = []  # (time, total that has arrived)
    unacknowledged = 0
    first = pacing.sent
    while came < total:
        while sent < total and pacing.room() > 0:
            size = min(FRAME, total - sent)
            pacing.on_sent(size, now=now)
            sent += size
            free_at = max(free_at, now) + size / bytes_per_s
            largest = max(largest, free_at - now - size / bytes_per_s)
            unacknowledged += size
            if unacknowledged >= ACK_BYTES or sent == total:
                unacknowledged = 0
                acks.append((free_at + rtt_s + dice.uniform(0, jitter_s), first + sent))
        now, arrived = acks.pop(0)
        came = arrived - first
        pacing.on_arrived(arrived, now=now)
    return now - start, largest


@pytest.mark.parametrize("mbit", [2, 10, 20, 100, 1000])
@pytest.mark.parametrize("rtt_s", [0.01, 0.08, 0.25])
def test_it_fills_the_path_and_adds_little_delay(mbit, rtt_s):
    rate, pacing = mbit * 1e6 / 8, Pacing()
    size = max(4_000_000, int(rate * 8))
    first_s, _ = transfer(pacing, size, bytes_per_s=rate, rtt_s=rtt_s)
    seconds, queue_s = transfer(pacing, size, bytes_per_s=rate, rtt_s=rtt_s, start=first_s)
    assert size / rate / (seconds - rtt_s) > 0.8, "the share of the rate that is used"
    smallest_s = MIN_WINDOW / rate  # below one window it does not go
    assert queue_s <= max(1.5 * TARGET_S + rtt_s, smallest_s) + FRAME / rate
    assert pacing.bytes_per_s == pytest.approx(rate, rel=0.2)


def test_without_it_the_queue_would_be_the_whole_body():
    """What it is for: 40 MB at once on 10 Mbit/s is half a minute in which no heartbeat gets through."""
    pacing = Pacing()
    _, queue_s = transfer(pacing, 40_000_000, bytes_per_s=1.25e6, rtt_s=0.12)
    assert 40_000_000 / 1.25e6 > 30 and queue_s < 0.25


def test_it_starts_as_quickly_as_tcp_does():
    """80 ms and 1 Gbit/s: the window doubles each round trip."""
    pacing = Pacing()
    seconds, _ = transfer(pacing, 60_000_000, bytes_per_s=125e6, rtt_s=0.08)
    assert seconds < 60 / 125 + 8 * 0.08


def test_a_path_that_gets_slower_is_followed():
    pacing = Pacing()
    transfer(pacing, 20_000_000, bytes_per_s=12.5e6, rtt_s=0.08)
    wide = pacing.window
    seconds, _ = transfer(pacing, 10_000_000, bytes_per_s=1.25e6, rtt_s=0.08, start=100.0)
    assert pacing.window < wide and 10 / 1.25 / seconds > 0.8
    assert pacing.bytes_per_s == pytest.approx(1.25e6, rel=0.2)


def test_jitter_does_not_throttle_it_to_nothing():
    pacing = Pacing()
    transfer(pacing, 20_000_000, bytes_per_s=12.5e6, rtt_s=0.08, jitter_s=0.05)
    seconds, _ = transfer(pacing, 20_000_000, bytes_per_s=12.5e6, rtt_s=0.08, jitter_s=0.05, start=100.0, seed=1)
    assert 20 / 12.5 / seconds > 0.5


@pytest.mark.parametrize("total", [-1, 0, 10, 10**15])
def test_a_lie_about_what_arrived_changes_nothing(total):
    pacing = Pacing()
    pacing.on_sent(1000, now=0.0)
    pacing.on_arrived(500, now=1.0)
    room = pacing.room()
    pacing.on_arrived(total, now=2.0)
    assert pacing.room() == room and pacing.arrived == 500
    assert MIN_WINDOW <= pacing.window <= MAX_WINDOW


def test_a_pause_is_not_taken_for_a_slow_path():
    pacing = Pacing()
    end, _ = transfer(pacing, 10_000_000, bytes_per_s=12.5e6, rtt_s=0.02)
    before = pacing.bytes_per_s
    transfer(pacing, 10_000_000, bytes_per_s=12.5e6, rtt_s=0.02, start=end + 100)
    assert pacing.bytes_per_s == pytest.approx(before, rel=0.2)
