"""What this machine's line can carry, and the share of it that each stream of bodies may take.

In a chain of stages each line carries activations to one neighbour and gradients to the other, and receives as many.
Senders that each find out by delays how fast a body may leave (pacing.py) are done before they know, and begin anew
with the next one: four stages on lines of 50 Mbit/s made 0.66 of what the line allows, where links held by hand to half
the line made 0.85. So each machine measures what passes while its line is busy, divides it by the streams that are
there now, and tells senders their share with each acknowledgement; a sender keeps to the smaller of that and its own
line's.

Pure: the clock is an argument.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable

WINDOW_S = 1.0
"""of a busy line makes a measurement. Shorter ones found twice the line's rate where bytes had waited for a busy
processor; with that for a share the outer streams of a chain took the line from the inner ones, whose windows closed"""
LEAST_BURST_S, GAP_S = 0.12, 0.1
"""Only bursts that last so long count, and a pause of more than so much ends one. (With any burst: twice the line's
rate again. With 0.3 s, more than a microbatch takes on 100 Mbit/s, the rate is not known for the first minute)"""
WINDOWS = 30
RARE = 0.05
"""of the measurements are faster than what the line can carry"""
MEMORY_S, STREAM_BYTES = 2.0, 256 * 1024
"""A stream counts while the bytes that it brought, each weighing less the longer ago it came (to a third in the first),
are so many: microbatches follow each other sooner, and who only trickles takes no share from others"""


class Line:
    """One direction of it. `stream`: whatever tells the streams apart; bytes are those of bodies."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        """that it can carry, as far as it was ever full; 0: not known"""
        self._rates: deque[float] = deque(maxlen=WINDOWS)
        self._last = float("-inf")
        self._bytes, self._busy_s = 0, 0.0
        """of the measurement"""
        self._burst_bytes, self._burst_s = 0, 0.0
        self._brought: dict[Hashable, tuple[float, float]] = {}
        """stream -> (weighed bytes, when that was)"""

    def passed(self, stream: Hashable, size: int, *, now: float) -> None:
        """So many bytes have come to their end. Of our own the receivers say when, so `now` may go back a little."""
        self._brought[stream] = self._weighed(stream, now) + size, now
        pause_s, self._last = now - self._last, max(now, self._last)
        if pause_s > GAP_S:
            self._end_burst()
            return  # when these began is not known: what counts is what follows
        self._burst_bytes += size
        self._burst_s += max(0.0, pause_s)
        if self._burst_s >= LEAST_BURST_S and self._busy_s + self._burst_s >= WINDOW_S:
            self._end_burst()

    def share(self, stream: Hashable, *, now: float) -> float:
        """Bytes a second; 0: not known."""
        self._brought = {other: said for other, said in self._brought.items() if now - said[1] < 10 * MEMORY_S}
        busy = {other for other in self._brought if self._weighed(other, now) >= STREAM_BYTES}
        return self.bytes_per_s / len(busy | {stream})

    def _weighed(self, stream: Hashable, now: float) -> float:
        weighed, at = self._brought.get(stream, (0.0, now))
        return weighed * math.exp((at - now) / MEMORY_S)

    def _end_burst(self) -> None:
        if self._burst_s >= LEAST_BURST_S:
            self._bytes, self._busy_s = self._bytes + self._burst_bytes, self._busy_s + self._burst_s
        self._burst_bytes, self._burst_s = 0, 0.0
        if self._busy_s >= WINDOW_S:
            self._rates.append(self._bytes / self._busy_s)
            self.bytes_per_s = sorted(self._rates)[-1 - int(RARE * len(self._rates))]
            self._bytes, self._busy_s = 0, 0.0
