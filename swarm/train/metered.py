"""How fast a trainer is and how well it does, over the last moments. Written by its threads, read by any."""

from __future__ import annotations

import time
from collections import deque

RECENT_LOSSES = 50
SPEED_WINDOW_S = 20.0


class Metered:
    """What trainers of a whole model and of a part have in common."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=RECENT_LOSSES)
        self._times: deque[tuple[float, float]] = deque([(time.monotonic(), 0.0)])

    @property
    def loss(self) -> float | None:
        """Mean of the recent steps or microbatches of its own, nats a token; None where there were none."""
        losses = list(self._losses)
        return sum(losses) / len(losses) if losses else None

    @property
    def tokens_per_s(self) -> float:
        (began, before), (now, tokens) = self._times[0], self._times[-1]
        return (tokens - before) / (now - began) if now > began else 0.0

    def _note(self, tokens: float) -> float:
        """It has trained so many in all by now. Returns the speed."""
        now = time.monotonic()
        self._times.append((now, tokens))
        while len(self._times) > 2 and now - self._times[0][0] > SPEED_WINDOW_S:
            self._times.popleft()
        return self.tokens_per_s
