"""Pacing on simulated paths: a rate, a latency, a queue of any length, and what our own bytes add to it."""

import heapq
import random
from collections import deque

import pytest

from swarm.network.pacing import (
    ACK_BYTES,
    BURST_S,
    CATCH_UP,
    LAG_S,
    MAX_WINDOW,
    MIN_WINDOW,
    OPENING_PROBE,
    PACE,
    PROBE,
    PROBE_AFTER_S,
    SLOWEST,
    STANDING_S,
    STEADY_PACE,
    STEADY_TARGET_S,
    TARGET_S,
    Pacing,
)

FRAME = 64 * 1024


class Tcp:
    """Slow start after a pause: ten segments a round trip, twice as many in each one after it, without losses."""

    def __init__(self, segment=1448):
        self.segment, self.cwnd, self.under_way = segment, 10 * segment, 0
        self.acks = deque()

    def leaves(self, size, *, now, free_at, bytes_per_s, rtt_s):
        """When the last of so many bytes has left the bottleneck."""
        for begin in range(0, size, self.segment):
            part = min(self.segment, size - begin)
            at = now
            while self.acks and (self.acks[0][0] <= at or self.under_way + part > self.cwnd):
                acked_at, acked = self.acks.popleft()
                at = max(at, acked_at)
                self.under_way -= acked
                self.cwnd += acked
            free_at = max(free_at, at) + part / bytes_per_s
            self.under_way += part
            self.acks.append((free_at + rtt_s, part))
        return free_at


THEIR_ZERO_S = -12_345.0
"""the other side's clock shows something else"""


def transfer(pacing, total, *, bytes_per_s, rtt_s, jitter_s=0.0, start=0.0, seed=0, tcp=None):
    """Send `total` bytes through a bottleneck with an endless queue; returns (seconds, largest delay in the queue)."""
    dice = random.Random(seed)
    now, free_at, sent, largest, came = start, start, 0, 0.0, 0
    acks = []  # (time, total that has arrived)
    unacknowledged = 0
    first = pacing.sent
    while came < total:
        while sent < total and pacing.room() > 0:
            if (wait_s := pacing.wait_s(now)) and acks and acks[0][0] < now + wait_s:
                break
            now += wait_s
            size = min(FRAME, total - sent)
            pacing.on_sent(size, now=now)
            sent += size
            if tcp is None:
                free_at = max(free_at, now) + size / bytes_per_s
            else:
                free_at = tcp.leaves(size, now=now, free_at=free_at, bytes_per_s=bytes_per_s, rtt_s=rtt_s)
            largest = max(largest, free_at - now - size / bytes_per_s)
            unacknowledged += size
            if unacknowledged >= ACK_BYTES or sent == total:
                unacknowledged = 0
                acks.append((free_at + rtt_s + dice.uniform(0, jitter_s), free_at + rtt_s / 2, first + sent))
        now, there_at, arrived = acks.pop(0)
        came = arrived - first
        pacing.on_arrived(arrived, there_at=there_at + THEIR_ZERO_S, now=now)
    return now - start, largest


class Line:
    """A home line's way up, with an endless queue: what goes into it comes out in the same order."""

    def __init__(self, bytes_per_s):
        self.bytes_per_s, self.free_at, self.used_s, self.longest_s = bytes_per_s, 0.0, 0.0, 0.0

    def leaves(self, size, *, now):
        self.longest_s = max(self.longest_s, self.free_at - now)
        self.free_at = max(self.free_at, now) + size / self.bytes_per_s
        self.used_s += size / self.bytes_per_s
        return self.free_at


def exchange(ways, *, bytes_per_s, latency_s, seconds):
    """Everybody always has something to send on its `ways` [(sender, receiver)]; what a receiver says of it waits in
    its own line. Returns each peer's line, from its half time on."""
    lines = {peer: Line(bytes_per_s) for way in ways for peer in way}
    pacings = {way: Pacing() for way in ways}
    arrived, said = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    events, count, halved, again = [], 0, False, dict.fromkeys(ways, 0.0)

    def later(at, *what):
        nonlocal count
        heapq.heappush(events, (at, count := count + 1, *what))

    def send(now):
        open_ways = list(ways)
        while open_ways:
            open_ways = [way for way in open_ways if pacings[way].room() > 0]
            for way in list(open_ways):
                if wait_s := pacings[way].wait_s(now):
                    open_ways.remove(way)
                    if again[way] <= now:
                        again[way] = now + wait_s
                        later(again[way], "again", way, None)
                else:
                    pacings[way].on_sent(FRAME, now=now)
                    later(lines[way[0]].leaves(FRAME, now=now) + latency_s, "body", way, FRAME)

    send(0.0)
    while events and events[0][0] < seconds:
        now, _, what, way, value = heapq.heappop(events)
        if now > seconds / 2 and not halved:
            halved = True
            for line in lines.values():
                line.used_s = line.longest_s = 0.0
        if what == "body":
            arrived[way] += value
            if arrived[way] - said[way] >= ACK_BYTES:
                said[way] = arrived[way]
                at = lines[way[1]].leaves(25, now=now) + latency_s
                later(at, "said", way, (arrived[way], now + THEIR_ZERO_S))
        elif what == "said":
            total, there_at = value
            pacings[way].on_arrived(total, there_at=there_at, now=now)
        send(now)
    return lines


@pytest.mark.parametrize("mbit", [10, 100])
@pytest.mark.parametrize("ways", [
    [("a", "b"), ("b", "a")],
    [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("c", "d"), ("d", "c")],
])
def test_lines_that_are_used_in_both_directions_are_full(ways, mbit):
    """What is said of arrived bytes waits behind bodies: it is no queue of the one who sent them."""
    lines = exchange(ways, bytes_per_s=mbit * 1e6 / 8, latency_s=0.04, seconds=30.0)
    for line in lines.values():
        assert line.used_s > 0.9 * 15.0
        assert line.longest_s < 3 * TARGET_S + 2 * MIN_WINDOW / line.bytes_per_s


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
    assert 40_000_000 / 1.25e6 > 30 and queue_s < 0.35


def test_it_starts_as_quickly_as_tcp_does():
    """80 ms and 1 Gbit/s: the window doubles each round trip."""
    pacing = Pacing()
    seconds, _ = transfer(pacing, 60_000_000, bytes_per_s=125e6, rtt_s=0.08)
    assert seconds < 60 / 125 + 8 * 0.08


@pytest.mark.parametrize("mbit", [20, 100, 400])
def test_tcps_own_opening_is_not_taken_for_a_full_path(mbit):
    """Each transfer comes after a pause, as rounds do. It must take little longer than TCP takes by itself."""
    rate, rtt_s, size, pacing = mbit * 1e6 / 8, 0.08, 5_000_000, Pacing()
    by_itself_s = Tcp().leaves(size, now=0.0, free_at=0.0, bytes_per_s=rate, rtt_s=rtt_s) + rtt_s
    assert by_itself_s > size / rate + 3 * rtt_s or mbit == 20, "there is something to be mistaken about"
    for number in range(5):
        seconds, _ = transfer(pacing, size, bytes_per_s=rate, rtt_s=rtt_s, start=100.0 * number, tcp=Tcp())
        assert seconds < 1.2 * by_itself_s + 2 * rtt_s


def test_one_slow_sample_does_not_halve_the_window():
    """A burst after a moment without anything to send waits for itself, and says nothing about the path."""
    pacing = Pacing()
    end, _ = transfer(pacing, 20_000_000, bytes_per_s=12.5e6, rtt_s=0.08)
    wide = pacing.window
    for number in range(10):
        transfer(pacing, 1_000_000, bytes_per_s=12.5e6, rtt_s=0.08, start=end + 0.3 * (number + 1))
    assert pacing.window > 0.7 * wide


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
    pacing.on_arrived(500, there_at=1.0, now=1.0)
    room = pacing.room()
    pacing.on_arrived(total, there_at=2.0, now=2.0)
    assert pacing.room() == room and pacing.arrived == 500
    assert MIN_WINDOW <= pacing.window <= MAX_WINDOW


def test_a_stream_is_let_go_with_more_care_and_fills_the_path_all_the_same():
    found = {}
    for is_steady in (False, True):
        pacing = Pacing()
        pacing.is_steady = is_steady
        end, _ = transfer(pacing, 30_000_000, bytes_per_s=12.5e6, rtt_s=0.08)
        assert pacing._was_full
        found[is_steady] = transfer(pacing, 60_000_000, bytes_per_s=12.5e6, rtt_s=0.08, start=end)
    assert found[True][1] < 0.7 * found[False][1], "of the queue"
    assert found[True][0] < 1.1 * 60_000_000 / 12.5e6
    pauses = []
    for is_steady in (False, True):
        pacing = Pacing()
        transfer(pacing, 30_000_000, bytes_per_s=12.5e6, rtt_s=0.08)
        pacing.is_steady = is_steady
        pacing.on_sent(10 * FRAME, now=1000.0)
        pauses.append(pacing.wait_s(1000.0) + BURST_S)
    assert pauses[1] / pauses[0] == pytest.approx(PACE / STEADY_PACE)


def pace_of(pacing, *, start, frames=12, **shares):
    """Bytes a second of a stream that has always something to send, once it has made up for the time before."""
    now = start
    for number in range(2 * frames):
        if number == frames:
            began = now
        pacing.on_sent(FRAME, now=now, **shares)
        now += pacing.wait_s(now)
    return frames * FRAME / (now - began)


@pytest.mark.parametrize(("own", "told", "kept_to"), [
    (2e6, 0.0, 2e6), (0.0, 2e6, 2e6), (2e6, 3e6, 2e6), (3e6, 2e6, 2e6), (1.0, 3e6, SLOWEST), (1e6, 1e-9, SLOWEST),
])
def test_a_stream_keeps_to_its_share_of_the_narrower_line(own, told, kept_to):
    pacing = Pacing()
    pacing.is_steady, pacing.told_share = True, told
    pace = pace_of(pacing, start=1000.0, own_share=own)
    assert pace == pytest.approx(max(OPENING_PROBE * min(filter(None, (own, told))), SLOWEST))
    assert 0.999 * kept_to <= pace <= 1.001 * OPENING_PROBE * kept_to


def queue_on_the_way(pacing, *, at, late_s):
    """What it sends from `at` on arrives so much later than the quickest; returns when that is known."""
    for frame in range(4):
        pacing.on_sent(FRAME, now=at + 0.1 * frame)
        pacing.on_arrived(pacing.sent, there_at=at + 0.1 * frame + late_s, now=at + 0.1 * frame + late_s)
    return at + 0.3 + late_s


def test_a_share_is_exceeded_only_while_nothing_waits_on_the_way():
    """Or a line that was never full would stay as narrow as it was found."""
    pacing = Pacing()
    pacing.is_steady = True
    share = {"own_share": 1e6}
    assert pace_of(pacing, start=0.0, **share) == pytest.approx(OPENING_PROBE * 1e6), "there was no queue so far"
    queue_on_the_way(pacing, at=100.0, late_s=0.0)
    known = queue_on_the_way(pacing, at=110.0, late_s=2 * STEADY_TARGET_S)
    assert pace_of(pacing, start=known, frames=6, **share) == pytest.approx(1e6)
    assert pace_of(pacing, start=known + PROBE_AFTER_S, **share) == pytest.approx(PROBE * 1e6)


def test_what_is_late_now_and_then_waited_for_a_processor_and_is_no_queue():
    pacing = Pacing()
    pacing.is_steady = True
    now = 0.0
    for number in range(200):
        late_s = 0.5 * STANDING_S if number % 4 == 3 else 0.0
        pacing.on_sent(FRAME, now=now)
        pacing.on_arrived(pacing.sent, there_at=now + late_s, now=now + late_s)
        now += STANDING_S / 3
    assert pace_of(pacing, start=now, own_share=1e6) == pytest.approx(OPENING_PROBE * 1e6)


@pytest.mark.parametrize("behind_s", [0.02, LAG_S, 10.0])
def test_a_stream_makes_up_for_a_moment_and_not_in_one_burst(behind_s):
    pacing, share = Pacing(), 2e6
    pacing.is_steady = True
    known = queue_on_the_way(pacing, at=100.0, late_s=0.0)
    pacing.on_sent(FRAME, now=known, own_share=share)
    now = start = known + pacing.wait_s(known) + behind_s  # it might have sent so long ago
    pacing._queued_at = start
    sent = 0
    while now < start + 0.9 * PROBE_AFTER_S:
        pacing.on_sent(FRAME, now=now, own_share=share)
        sent += FRAME
        assert sent <= CATCH_UP * share * (now - start + BURST_S) + 1.001 * FRAME
        now += pacing.wait_s(now)
    assert sent / share == pytest.approx(now - start + min(behind_s, LAG_S), abs=FRAME / share)


@pytest.mark.parametrize("their_clock", [-1e12, 0.0, 1e12])
def test_bytes_left_between_their_sending_and_now_whatever_the_receiver_says(their_clock):
    pacing = Pacing()
    for second, there_at in enumerate((0.0, their_clock, -their_clock, their_clock + 5)):
        pacing.on_sent(FRAME, now=float(second))
        pacing.on_arrived(pacing.sent, there_at=there_at, now=second + 0.5)
        assert second <= pacing.left_at <= second + 0.5


def test_a_body_of_a_round_does_not_keep_to_shares():
    pacing = Pacing()
    pacing.told_share = 1e6
    pacing.on_sent(FRAME, now=0.0, own_share=1e6)
    assert pacing.wait_s(0.0) == 0.0


def test_a_pause_is_not_taken_for_a_slow_path():
    pacing = Pacing()
    end, _ = transfer(pacing, 10_000_000, bytes_per_s=12.5e6, rtt_s=0.02)
    before = pacing.bytes_per_s
    transfer(pacing, 10_000_000, bytes_per_s=12.5e6, rtt_s=0.02, start=end + 100)
    assert pacing.bytes_per_s == pytest.approx(before, rel=0.2)


@pytest.mark.parametrize("their_clock", [
    lambda number: 0.0, lambda number: number * 1e300, lambda number: number * 1e-300, lambda number: -float(number),
    lambda number: (-1.0) ** number * 1.7e308,
])
def test_a_receiver_that_lies_about_its_clock_neither_stops_nor_breaks_us(their_clock):
    pacing, now = Pacing(), 0.0
    transfer(pacing, 20_000_000, bytes_per_s=12.5e6, rtt_s=0.08)
    assert pacing._was_full
    for number in range(1, 400):
        while pacing.room() > 0:
            wait_s = pacing.wait_s(1000.0 + now)
            assert wait_s <= 1.0, "no pause that a stalled link would hide behind"
            now += wait_s
            pacing.on_sent(FRAME, now=1000.0 + now)
        now += 0.05
        pacing.on_arrived(pacing.arrived + FRAME, there_at=their_clock(number), now=1000.0 + now)
        assert MIN_WINDOW <= pacing.window <= MAX_WINDOW
