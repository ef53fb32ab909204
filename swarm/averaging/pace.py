"""How many tokens a peer may well have trained, by what it has had in earlier rounds.

Tokens are a peer's own word, and weigh its contribution. Its pace is what it usually has of them, in medians of a
round's contributors a version: nobody's clock is asked, and whoever has seen the same commits comes to the same. A peer
is believed up to twice its pace, times the rounds since its last contribution (what misses a round goes into the next);
who has no past up to the median, or twice that where most have none. What is remembered is what was believed, so that a
lie is no past: a new peer that is nine times as fast as the others is believed so after some eight rounds.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

MIN_CONTRIBUTORS = 3
"""of fewer there is no middle to measure by"""
SLACK = 2.0
"""times its pace: rounds are of unequal length, and a computer may have been busy with something else"""
REMEMBERED = 8
"""rounds of a peer, of which the median counts"""
MAX_GAP = 16
"""rounds that a peer may have missed and still be believed to have trained through"""
MAX_PEERS = 256
"""the ones that have not contributed for longest are forgotten"""


@dataclass
class _Past:
    last: int
    """version of its newest contribution"""
    paces: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """(version, believed tokens as a multiple of the median, for each round since the contribution before)"""


class Paces:
    """Of the contributors to one fragment, as one peer has seen its commits."""

    def __init__(self) -> None:
        self._pasts: dict[str, _Past] = {}
        """the longest silent first"""

    def believed(self, tokens: Mapping[str, int], *, version: int) -> dict[str, int]:
        """Of the tokens that contributors to the round to `version` claim, by peer: those that their pasts support."""
        if len(tokens) < MIN_CONTRIBUTORS:
            return dict(tokens)
        usual, supports = statistics.median(tokens.values()), [self._support(peer_id, version) for peer_id in tokens]
        unknown = 1.0 if 2 * supports.count(None) < len(tokens) else SLACK
        return {
            peer_id: max(1, min(count, int(usual * (unknown if support is None else support))))
            for (peer_id, count), support in zip(tokens.items(), supports, strict=True)
        }

    def saw(self, tokens: Mapping[str, int], *, version: int) -> None:
        """A commit of this version was applied. It may replace an earlier one of the same version."""
        self._forget_since(version)
        believed, usual = self.believed(tokens, version=version), statistics.median(tokens.values())
        for peer_id, count in believed.items():
            past = self._pasts.pop(peer_id, None) or _Past(last=version - 1)
            if len(tokens) >= MIN_CONTRIBUTORS:
                past.paces.append((version, count / usual / _gap(past, version)))
            past.last = version
            self._pasts[peer_id] = past
        while len(self._pasts) > MAX_PEERS:
            del self._pasts[next(iter(self._pasts))]

    def _support(self, peer_id: str, version: int) -> float | None:
        """Medians of this round that its past supports; None: it has none."""
        past = self._pasts.get(peer_id)
        if past is None or not past.paces:
            return None
        return SLACK * statistics.median(pace for _, pace in past.paces) * _gap(past, version)

    def _forget_since(self, version: int) -> None:
        for past in self._pasts.values():
            while past.paces and past.paces[-1][0] >= version:
                past.paces.pop()
            past.last = min(past.last, version - 1)


def _gap(past: _Past, version: int) -> int:
    return min(max(version - past.last, 1), MAX_GAP)
