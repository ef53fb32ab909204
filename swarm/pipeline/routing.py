"""Which peer next, and where to hand over: a peer's own estimates of the others, from what it has asked them itself.

The next peer is the one where the microbatch is expected to be through first (join the shortest expected queue), so
work is shared in proportion to speed without anybody measuring anything beforehand. Random and sticky paths end at the
same loss (measured), so only speed counts. Nothing a peer says of its speed is believed beyond its next microbatches:
times are taken on the sender's clock, and what is said about queues only adds to them.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RECENT, RECENT_S = 0.2, 2.0
"""weight of the newest sample in a running mean: at least this, more where the one before is older than so many seconds
"""
FIRST_SERVICE_S = 0.1
"""of a fragment, before anything was measured"""
TRY_AGAIN_S = 5.0
"""a peer that was not asked for so long is asked once, however slow it was: it may have had a bad moment, and nobody
would ever notice that it is over"""
TRY_ONE_IN = 10
"""at most so often"""
FIRST_BAN_S, LONGEST_BAN_S = 1.0, 60.0
SAMPLE = 16
"""candidates that are compared; of more, so many at random (the power of two choices, and some)"""


@dataclass(frozen=True)
class Holder:
    """A peer that could go on with a microbatch at any fragment of [first, end)."""

    peer_id: str
    first: int
    end: int
    leaving: bool = False
    """about to go: asked only where nobody else holds the fragment"""


@dataclass
class Estimate:
    """What this peer knows of another one."""

    service_s: float | None = None
    """computing, a fragment: forward and backward"""
    link_s: float = 0.0
    """a microbatch and its gradient on the way"""
    queue: int = 0
    """waiting there, by its last answer"""
    outstanding: int = 0
    """sent there by this peer and not answered"""
    asked_at: float = float("-inf")
    answered_at: float = float("-inf")
    failures: int = 0
    """in a row, those during a ban not counted"""
    banned_until: float = float("-inf")


class Router:
    """`clock` in seconds. Not thread-safe: it lives on the network's event loop."""

    def __init__(self, *, clock: Callable[[], float], rng: random.Random) -> None:
        self._clock, self._rng = clock, rng
        self._estimates: dict[str, Estimate] = {}
        self._since_trial = TRY_ONE_IN

    def of(self, peer_id: str) -> Estimate:
        return self._estimates.setdefault(peer_id, Estimate())

    def choose(self, holders: Sequence[Holder], fragment: int, *, excluded: Sequence[str] = ()) -> Holder | None:
        """Who is expected to be through with the stage that begins at `fragment` first, a fragment; None: nobody is
        left. A peer that has failed is left alone for a while, ever longer, but is better than nobody."""
        able = [h for h in holders if h.first <= fragment < h.end and h.peer_id not in excluded]
        able = [h for h in able if not h.leaving] or able
        if len(able) > SAMPLE:
            able = self._rng.sample(able, SAMPLE)
        now = self._clock()
        free = [h for h in able if self.of(h.peer_id).banned_until <= now]
        if not free:
            return min(able, key=lambda h: self.of(h.peer_id).banned_until, default=None)
        order = self._rng.sample(free, len(free))  # of equals anyone
        self._since_trial += 1
        idle = [h for h in order if not self.of(h.peer_id).outstanding]
        longest = min(idle, key=lambda h: self.of(h.peer_id).asked_at, default=None)
        if longest and self._since_trial > TRY_ONE_IN and now - self.of(longest.peer_id).asked_at > TRY_AGAIN_S:
            self._since_trial = 0
            return longest
        return min(order, key=lambda h: self.expected_s(h, fragment) / (h.end - fragment))

    def expected_s(self, holder: Holder, fragment: int) -> float:
        """Until `holder` has done its fragments from this one on, if it got a microbatch now."""
        known = self.of(holder.peer_id)
        before = max(known.queue, known.outstanding)
        return known.link_s + (1 + before) * self._service_s(known) * (holder.end - fragment)

    def leave_at(
        self, holders: Sequence[Holder], *, start: int, end: int, queue: int, service_s: float, num_fragments: int
    ) -> int:
        """The boundary in (start, end] at which this peer hands over: early where it is busier than those after it.

        `end`: of its own stage; `queue`: microbatches that wait here; `service_s`: its own time a fragment."""
        if start + 1 >= end:
            return end
        usual_s = self._usual_s()

        def total_s(boundary: int) -> float:
            own_s = (1 + queue) * service_s * (boundary - start)
            if boundary == num_fragments:
                return own_s
            after = self.choose(holders, boundary)
            if after is None or self.is_banned(after.peer_id):
                return float("inf")
            return own_s + self.expected_s(after, boundary) + usual_s * (num_fragments - after.end)

        return min(range(end, start, -1), key=total_s)

    def is_banned(self, peer_id: str) -> bool:
        """It has failed, and is left alone for a while where there is another way."""
        return self.of(peer_id).banned_until > self._clock()

    def asked(self, peer_id: str) -> None:
        known = self.of(peer_id)
        known.outstanding += 1
        known.asked_at = self._clock()

    def answered(
        self, peer_id: str, *, fragments: int, total_s: float, inside_s: float, service_s: float, queue: int
    ) -> None:
        """`total_s` on our clock; the others as the answer says, of which only plausible parts count."""
        known = self.of(peer_id)
        known.outstanding -= 1
        known.failures, known.banned_until = 0, float("-inf")
        known.queue = queue
        inside_s = min(inside_s, total_s)
        sample_s = min(service_s, inside_s) / max(1, fragments)
        weight = max(RECENT, 1 - math.exp((known.answered_at - self._clock()) / RECENT_S))
        known.service_s = (1 - weight) * (known.service_s or 0.0) + weight * sample_s
        known.link_s = (1 - weight) * known.link_s + weight * (total_s - inside_s)
        known.answered_at = self._clock()

    def failed(self, peer_id: str) -> None:
        """It is gone, or silent, or broke the protocol. All that it was asked fails with it, and that counts once: else
        who is back after some seconds would be left alone for as long again as there were questions."""
        known = self.of(peer_id)
        known.outstanding -= 1
        if not self.is_banned(peer_id):
            known.banned_until = self._clock() + min(FIRST_BAN_S * 2**known.failures, LONGEST_BAN_S)
            known.failures += 1

    def refused(self, peer_id: str) -> None:
        """It is alive and said no, as when it has too much to do: no fault, but others come first for a moment."""
        known = self.of(peer_id)
        known.outstanding -= 1
        known.queue += 1

    def answered_guest(self, peer_id: str) -> None:
        """It is alive; what it took for a question that is not trained on says nothing of training."""
        known = self.of(peer_id)
        known.outstanding -= 1
        known.failures, known.banned_until = 0, float("-inf")

    def withdrawn(self, peer_id: str) -> None:
        """The answer is not wanted any more."""
        self.of(peer_id).outstanding -= 1

    def forget(self, alive: Sequence[str]) -> None:
        """Drop peers that are neither alive nor waited for."""
        for peer_id in [p for p, known in self._estimates.items() if p not in alive and not known.outstanding]:
            if self._estimates[peer_id].banned_until <= self._clock():
                del self._estimates[peer_id]

    def _service_s(self, known: Estimate) -> float:
        return self._usual_s() if known.service_s is None else known.service_s

    def _usual_s(self) -> float:
        measured = [known.service_s for known in self._estimates.values() if known.service_s is not None]
        return statistics.median(measured) if measured else FIRST_SERVICE_S
