"""How many bytes of tensors one link may have on their way: few enough that a heartbeat behind them is not late.

Whatever is written to a link waits in libp2p, in the kernel and in the home router until the uplink has sent it, and
what is written after it waits behind it: up to several megabytes, which are seconds on 10 Mbit/s, and peers were taken
for dead while they sent (that is what ends torchft on such links; notes of ft-diloco, 2026). So the receiver says how
much has arrived, and the sender keeps only so much under way that the delay stays within `TARGET_S` of the smallest
that was seen: the idea of LEDBAT (RFC 6817), applied to a window as in TCP Vegas. Until the path has once been full the
window doubles each round trip, as in slow start.

Pure: the clock is an argument, so a link, a test and a simulation run the same code.
"""

from __future__ import annotations

from collections import deque

ACK_BYTES = 64 * 1024
"""the receiver answers after this many bytes of bodies; smaller ones are never answered, and need not be"""
MIN_WINDOW = 2 * ACK_BYTES
FIRST_WINDOW = 4 * ACK_BYTES
MAX_WINDOW = 64 * 1024 * 1024
TARGET_S = 0.06
"""of delay that our own bytes may add. Home routers buffer 100 ms and more; less would mistake a busy CPU for a
queue"""
RTT_MEMORY_S = 30.0
GROWTH = 0.25
"""a round trip, once the path has been full: doubling again would add a whole round trip of delay each time"""
RATE_S = 0.5
"""the rate is measured over this long"""


class Pacing:
    """One direction of one link. Times are seconds on the caller's clock."""

    def __init__(self) -> None:
        self.window = FIRST_WINDOW
        self.bytes_per_s = 0.0
        """that arrive at the other side, measured while we had more to send than was let go"""
        self.sent = self.arrived = 0
        self.progress_at = float("-inf")
        """when something arrived last, or when bytes were sent after a pause"""
        self._marks: deque[tuple[int, float]] = deque()
        """(bytes sent up to then, when)"""
        self._arrivals: deque[tuple[int, float]] = deque()
        self._rtts: deque[tuple[float, float]] = deque()
        self._limited = self._was_full = False

    def room(self) -> int:
        """Bytes that may be sent now; the last ones of a body are never acknowledged, so less than one `ACK_BYTES`
        under way counts as none."""
        free = self.window - (self.sent - self.arrived)
        if free <= 0:
            self._limited = True
        return free

    def on_sent(self, size: int, *, now: float) -> None:
        if self.sent - self.arrived < ACK_BYTES:  # idle until now: nothing that arrives later measures a rate before
            self._arrivals.clear()
            self._arrivals.append((self.arrived, now))
            self.progress_at = now
        self.sent += size
        self._marks.append((self.sent, now))

    def on_arrived(self, total: int, *, now: float) -> None:
        """The other side has `total` bytes of bodies by now. A number that cannot be is ignored."""
        if not self.arrived < total <= self.sent:
            return
        newly, self.arrived = total - self.arrived, total
        self.progress_at = now
        rtt_s = self._rtt_s(total, now)
        self._arrivals.append((total, now))
        while len(self._arrivals) > 2 and now - self._arrivals[1][1] > RATE_S:
            self._arrivals.popleft()
        before, since = self._arrivals[0]
        elapsed_s = now - since
        if elapsed_s > 0 and self._limited:
            self.bytes_per_s = (total - before) / elapsed_s
        if rtt_s is None:
            return
        floor_s = self._smallest(rtt_s, now)
        if rtt_s > floor_s + TARGET_S:
            self._was_full = True
            self._resize(int(self.bytes_per_s * (floor_s + TARGET_S / 2)))
        elif self._limited:
            self._resize(self.window + int(newly * (GROWTH if self._was_full else 1)))
        self._limited = False

    def _rtt_s(self, total: int, now: float) -> float | None:
        """Since the newest bytes that are known to have arrived were sent."""
        sent_at = None
        while self._marks and self._marks[0][0] <= total:
            sent_at = self._marks.popleft()[1]
        return None if sent_at is None else now - sent_at

    def _smallest(self, rtt_s: float, now: float) -> float:
        while self._rtts and self._rtts[-1][0] >= rtt_s:
            self._rtts.pop()
        self._rtts.append((rtt_s, now))
        while now - self._rtts[0][1] > RTT_MEMORY_S:
            self._rtts.popleft()
        return self._rtts[0][0]

    def _resize(self, window: int) -> None:
        self.window = min(max(window, MIN_WINDOW), MAX_WINDOW)
