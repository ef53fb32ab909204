"""How long an opener waits for the others: by what recent rounds took, and longer where that was not enough.

Fixed timeouts are guesses (hivemind issue 676), so deadlines follow from the rounds before (`plan.deadline_s`). But
a round that comes to nothing leaves no time behind: where everybody is slower than the first guess, or one peer slower
than the others, none would ever be long enough. So whoever lives and was too late makes the next deadline twice as
long, up to four times, for whoever opens next, since an opening says how long its opener waits; rounds in which all
were in time shorten it again.
"""

from __future__ import annotations

from collections import deque

from swarm.averaging import plan

ANSWER_S = 2.0
"""an opening is answered as soon as the contribution is taken: whoever is silent for much longer than all of late, and
for this long, is left out; what it has learnt goes into the next round"""
GREETING_S = 2.0
"""for the opening's own way, before it is known how long answers take"""
LONGER, MOST, SHORTER = 2.0, 4.0, 0.9


class Patience:
    """Of one fragment's openers, as one peer knows them. `bytes_each`: of one peer's contribution."""

    def __init__(self, bytes_each: int) -> None:
        self._bytes_each = bytes_each
        self._times = 1.0
        self._round_s: deque[float] = deque(maxlen=16)
        self._answer_s: deque[float] = deque(maxlen=16)
        """until all members had answered"""

    def push_s(self) -> float:
        """That a part's contributions may take to reach its owner."""
        return min(plan.LONGEST_S, self._times * self._usual_s())

    def answer_s(self, push_s: float) -> float:
        """That an opening which says `push_s` waits for answers."""
        if len(self._answer_s) < plan.FEWEST:
            return push_s + GREETING_S
        return self._times * plan.deadline_s(list(self._answer_s), bytes_each=0, floor_s=ANSWER_S)

    def all_answered(self, seconds: float) -> None:
        self._answer_s.append(seconds)

    def committed(self, seconds: float, *, whole: bool) -> None:
        """A round of this opener; `whole`: all that were invited are in it."""
        self._round_s.append(seconds)
        if whole:
            self._times = max(1.0, SHORTER * self._times)

    def too_short(self) -> None:
        """Somebody who lives was too late."""
        self._times = min(MOST, LONGER * self._times)

    def heard(self, push_s: float) -> None:
        """Another peer's opening waits so long."""
        self._times = max(self._times, min(MOST, push_s / self._usual_s()))

    def _usual_s(self) -> float:
        return plan.deadline_s(list(self._round_s), bytes_each=self._bytes_each)
