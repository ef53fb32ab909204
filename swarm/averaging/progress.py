"""What the holders of a fragment have trained since its last commit, as far as this peer can tell.

Statuses come every 1.5 s; in between a peer is assumed to go on at its speed. After a commit what it absorbed is
taken off, rather than waiting for the next status, or rounds would lag the tokens by a heartbeat.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swarm.averaging.messages import Commit

MAX_EXTRAPOLATION_S = 3.0
STALE_S = 2.5
"""a status takes no longer than this to arrive"""


@dataclass
class _Entry:
    version: int
    digest: str
    pending: float
    tokens_per_s: float
    heard_at: float
    leaving: bool


class Progress:
    """Of one fragment. Times are seconds on the caller's clock."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def heard(
        self, peer_id: str, *, version: int, digest: str, pending: int, tokens_per_s: float, leaving: bool, now: float
    ) -> None:
        known = self._entries.get(peer_id)
        if known is not None and known.version > version and now - known.heard_at < STALE_S:
            return  # sent before a commit that it is known to be part of (later it means that it went back)
        self._entries[peer_id] = _Entry(version, digest, pending, tokens_per_s, now, leaving)

    def committed(self, commit: Commit, digest: str, *, now: float) -> None:
        """Members of a commit move on with it: the version it makes, less what it absorbed."""
        opening = commit.opening
        absorbed = {opening.members[c.member]: c.tokens for c in commit.contributors}
        for peer_id in opening.members:
            entry = self._entries.get(peer_id)
            if entry is not None and entry.version == opening.version - 1:
                left = max(0.0, _estimate(entry, now) - absorbed.get(peer_id, 0))
                self._entries[peer_id] = _Entry(
                    opening.version, digest, left, entry.tokens_per_s, now, entry.leaving
                )

    def at(self, digest: str, alive: Iterable[str]) -> list[str]:
        """Who of `alive` is at the version with this digest."""
        return [peer_id for peer_id in alive if peer_id in self._entries and self._entries[peer_id].digest == digest]

    def pending(self, peers: Iterable[str], *, now: float) -> dict[str, float]:
        """Estimated tokens in the drift of each peer."""
        return {peer_id: _estimate(self._entries[peer_id], now) for peer_id in peers if peer_id in self._entries}

    def leaving(self, peers: Iterable[str]) -> bool:
        """Somebody leaves and still has something to contribute."""
        return any(
            self._entries[peer_id].leaving and self._entries[peer_id].pending > 0
            for peer_id in peers if peer_id in self._entries
        )

    def forget(self, peer_id: str) -> None:
        """It does not hold the fragment, or not any more."""
        self._entries.pop(peer_id, None)


def _estimate(entry: _Entry, now: float) -> float:
    if entry.leaving:
        return entry.pending  # it has stopped training
    return entry.pending + entry.tokens_per_s * min(max(0.0, now - entry.heard_at), MAX_EXTRAPOLATION_S)
