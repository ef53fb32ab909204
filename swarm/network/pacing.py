"""How many bytes of tensors one link may have on their way: few enough that a heartbeat behind them is not late.

Whatever is written to a link waits in libp2p, in the kernel and in the home router until the uplink has sent it, and
what is written after it waits behind it: up to several megabytes, which are seconds on 10 Mbit/s, and peers were taken
for dead while they sent (that is what ends torchft on such links; notes of ft-diloco, 2026). So the receiver says how
much has arrived, and when, and the sender keeps only so much under way that the delay there stays within `TARGET_S` of
the smallest that was seen: LEDBAT (RFC 6817), applied to a window as in TCP Vegas. Only the way there counts: what the
receiver says comes back behind its own bodies, and with round trips for a measure two peers that send to each other
both took the other's queue for theirs, and each of their lines was half empty. The two clocks need not agree, since
delays are compared with each other only. Until the path has once been full the window doubles each round trip, as in
slow start.

TCP itself starts anew after each pause, from 14 kB a round trip, and what waits for it looks like a full path. It is
none as long as more arrives each round trip than in the one before, which is how BBR (Cardwell et al. 2016) sees the
end of its start-up; the window is not made smaller before that. (It once was, and then neither TCP nor the window could
open up: 13 Mbit/s on a line of 100.)

Bodies that come one after another for hours, as microbatches do, are let go more carefully. As bursts they met in the
queues of the routers at either end, and on lines that are full both ways TCP lost packets there and then sent too
little for seconds, which held up the whole chain: four stages on `home-100` made 0.65 of what the line allows, and 0.70
to 0.79 so. (Letting them go at a little more than their mean rate gave 0.80 in some runs and 0.63 in others: then every
link is nearly a bottleneck, at whatever rate the chain is. Links held by hand to half the line's rate: 0.81.) Once both
sides know what their lines carry, a stream keeps to its share of them instead: line.py.

Pure: the clock is an argument, so a link, a test and a simulation run the same code.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

ACK_BYTES = 64 * 1024
"""the receiver answers after this many bytes of bodies; smaller ones are never answered, and need not be"""
MIN_WINDOW = 2 * ACK_BYTES
FIRST_WINDOW = 4 * ACK_BYTES
MAX_WINDOW = 64 * 1024 * 1024
TARGET_S = 0.1
"""of delay that our own bytes may add. Home routers buffer 100 ms and more; less would mistake a busy CPU for a
queue"""
STEADY_TARGET_S, STEADY_PACE, STEADY_BYTES = 0.04, 1.05, 256 * 1024
"""for bodies that come one after another, from this size on: what is taken for a queue by mistake costs a stream less
than a lost packet"""
STANDING_S = 0.2
"""A stream's queue is what none of its bytes has escaped for so long (CoDel, RFC 8289): bytes that waited for a turn of
a processor are late, and no queue. Every late one counted once, and windows were closed for a third of the time"""
OPENING_PROBE, PROBE, PROBE_AFTER_S = 1.6, 1.15, 1.0
"""A stream keeps to its share of the lines (line.py) while it finds a queue on its way, and so long after; else it goes
so many times as fast, because a share is only known as far as the line was ever full. The first: until there was a
queue at all"""
CATCH_UP, LAG_S = 1.2, 0.05
"""What a stream could not send in the last so many seconds it makes up for, so many times as fast"""
DELAY_MEMORY_S = 30.0
GROWTH = 0.25
"""a round trip, once the path has been full: doubling again would add a whole round trip of delay each time"""
PACE, BURST_S = 1.25, 0.01
"""Once the path has been full, bytes leave at most so many times as fast as it was then, or is now, in bursts of at
most so long. Else two peers that send to each other fall into step: what is said of one's bytes comes back behind a
whole window of the other's and lets go a whole window at once, and one of the lines is always empty. Simulated, 100
Mbit/s: both were three quarters full; now they are full, with a shorter queue"""
SLOWEST, FASTEST = float(MIN_WINDOW), 1e12
"""bytes a second: no less is paced by, and no more believed, whatever the other side says of its clock. A pause is thus
short, and the window alone makes a slow line slower"""
RATE_MEMORY_S = 2.0
"""the fastest of so long counts: a measured rate is too low where we had nothing to send or a machine was busy, and
never much too high (BBR, too)"""
OPENING = 1.25
"""times as much as before arrives in a round trip while TCP opens up, the queueing that it causes included"""
FLAT_ROUND_TRIPS = 2
"""in a row without that: now the path sets the pace"""


@dataclass(frozen=True, slots=True)
class _Mark:
    """The moment after a write."""

    sent: int
    at: float
    arrived: int
    """that the other side had said by then"""
    there_at: float | None
    """when that had arrived, by the other side's clock; None: we were idle, so that it says nothing of the rate"""


class Pacing:
    """One direction of one link. Times are seconds on the caller's clock, but for `there_at`."""

    def __init__(self) -> None:
        self.window = FIRST_WINDOW
        self.bytes_per_s = 0.0
        """that arrive at the other side: the most of the last seconds"""
        self.is_steady = False
        """what is sent now comes one after another"""
        self.told_share = 0.0
        """of the receiver's line, bytes a second, as it says; 0: it does not know"""
        self.sent = self.arrived = 0
        self.progress_at = float("-inf")
        """when something arrived last, or when bytes were sent after a pause"""
        self.left_at = float("-inf")
        """when what has arrived last left us, as far as the receiver's clock tells: without the path's delay"""
        self._marks: deque[_Mark] = deque()
        self._there_at: float | None = None
        self._free_at = self._caught_up_at = float("-inf")
        self._full_rate = 0.0
        self._delays: deque[tuple[float, float]] = deque()
        self._late: deque[tuple[float, float]] = deque()
        self._rates: deque[tuple[float, float]] = deque()
        self._limited = self._was_full = False
        self._queued_at = float("-inf")
        self._round_trip_ends = self._flat = 0
        self._best = self._reference = 0.0
        """rates: of this round trip, and the one that it must exceed"""

    def room(self) -> int:
        """Bytes that may be sent now; the last ones of a body are never acknowledged, so less than one `ACK_BYTES`
        under way counts as none."""
        free = self.window - (self.sent - self.arrived)
        if free <= 0:
            self._limited = True
        return free

    def wait_s(self, now: float) -> float:
        """How long the next bytes should wait although there is room for them; 0: not at all."""
        return max(0.0, self._free_at - now, self._caught_up_at - now)

    def on_sent(self, size: int, *, now: float, own_share: float = 0.0) -> None:
        """`own_share`: of this machine's line, bytes a second (line.py); 0: not known."""
        if self.sent - self.arrived < ACK_BYTES:  # idle until now, so TCP starts anew, and the rate is measured anew
            self.progress_at, self._there_at = now, None
            self._flat, self._best, self._reference = 0, 0.0, 0.0
            self._round_trip_ends = self.sent + size
        self.sent += size
        shares = [share for share in (own_share, self.told_share) if share > 0]
        if self.is_steady and shares:
            pace = max(self._probe(now) * min(shares), SLOWEST)
            self._free_at = max(self._free_at, now - LAG_S) + size / pace
            self._caught_up_at = max(self._caught_up_at, now - BURST_S) + size / (CATCH_UP * pace)
        elif self._was_full:  # after a pause too little is measured, so what was measured of a full path counts, too
            pace = (STEADY_PACE if self.is_steady else PACE) * max(self.bytes_per_s, self._full_rate, SLOWEST)
            self._free_at = max(self._free_at, now - BURST_S) + size / pace
        self._marks.append(_Mark(self.sent, now, self.arrived, self._there_at))

    def on_arrived(self, total: int, *, there_at: float, now: float) -> None:
        """The other side had `total` bytes of bodies at `there_at` of its own clock, whose zero is anywhere. A number
        that cannot be is ignored."""
        if not self.arrived < total <= self.sent:
            return
        newly, self.arrived = total - self.arrived, total
        self.progress_at, self._there_at, self.left_at = now, there_at, now
        mark = self._newest_mark(total)
        if mark is None:
            return
        rtt_s = now - mark.at
        elapsed_s = rtt_s if mark.there_at is None else there_at - mark.there_at
        if elapsed_s > 0:
            rate = min((total - mark.arrived) / elapsed_s, FASTEST)
            self.bytes_per_s = -_smallest(self._rates, -rate, now, memory_s=RATE_MEMORY_S)
            self._follow(rate)
        delay_s = there_at - mark.at
        least_s = _smallest(self._delays, delay_s, now, memory_s=DELAY_MEMORY_S)
        standing_s = _smallest(self._late, delay_s, now, memory_s=STANDING_S)
        self.left_at = min(max(there_at - least_s, mark.at), now)
        queue_s = (standing_s if self.is_steady else delay_s) - least_s
        empty_s = max(0.0, rtt_s - queue_s)  # the round trip without what our own bytes add to it
        target_s = STEADY_TARGET_S if self.is_steady else TARGET_S
        if queue_s > target_s:
            self._queued_at = now
            if self._flat >= FLAT_ROUND_TRIPS:
                self._was_full, self._full_rate = True, self.bytes_per_s
                self._resize(int(self.bytes_per_s * (empty_s + target_s / 2)))
        elif self._limited:
            filled = self._was_full and self.window >= self.bytes_per_s * empty_s
            self._resize(self.window + int(newly * (GROWTH if filled else 1)))
        self._limited = False

    def _probe(self, now: float) -> float:
        if self._queued_at == float("-inf"):
            return OPENING_PROBE
        return 1.0 if now - self._queued_at < PROBE_AFTER_S else PROBE

    def _newest_mark(self, total: int) -> _Mark | None:
        """Of the newest bytes that are known to have arrived."""
        mark = None
        while self._marks and self._marks[0].sent <= total:
            mark = self._marks.popleft()
        return mark

    def _follow(self, rate: float) -> None:
        """Does more arrive in each round trip than in the one before?"""
        self._best = max(self._best, rate)
        if self.arrived < self._round_trip_ends:
            return
        if self._best >= OPENING * self._reference:
            self._flat, self._reference = 0, self._best
        else:
            self._flat += 1
        self._best, self._round_trip_ends = 0.0, self.sent

    def _resize(self, window: int) -> None:
        self.window = min(max(window, MIN_WINDOW), MAX_WINDOW)


def _smallest(known: deque[tuple[float, float]], value: float, now: float, *, memory_s: float) -> float:
    """Add a value to those of the last `memory_s`, of which only possible minima are kept; returns the smallest."""
    while known and known[-1][0] >= value:
        known.pop()
    known.append((value, now))
    while now - known[0][1] > memory_s:
        known.popleft()
    return known[0][0]
