"""Who keeps spare copies of which fragments: a pure function that every peer computes for itself.

Each fragment should be on the disks of `SPARES` peers that do not hold it, so that it outlives all of its holders. Who
those are is decided by rendezvous hashing (Thaler, Ravishankar 1998) of fragment and peer id: whoever comes or goes
changes only what it keeps itself. Only where disk budgets bind do others matter: then the fragments with fewest holders
come first, all of them once before any twice, and what is on a full disk moves where that makes room (by augmenting
paths).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarm.network.records import MAX_SPARES

SPARES = 2
"""copies of each fragment, beside those of its holders"""
MAX_MOVES = 64
"""peers that are asked to make room for one copy"""


@dataclass(frozen=True)
class Keeper:
    """A peer of the run, as far as spare copies go."""

    held: frozenset[int]
    """fragments that it holds, of which it needs no spare"""
    room_bytes: int
    """of its disk, for spares; 0: it keeps none"""


def assign(keepers: Mapping[str, Keeper], sizes: Sequence[int]) -> dict[str, list[int]]:
    """Peer id -> the fragments of which it keeps a spare, in order. `sizes`: of each fragment's copy, in bytes."""
    shelves = _Shelves(keepers, sizes)
    holders = [sum(index in keeper.held for keeper in keepers.values()) for index in range(len(sizes))]
    order = sorted(range(len(sizes)), key=lambda index: (holders[index], index))
    for _ in range(SPARES):
        for index in order:
            shelves.place(index, passed=set())
    return {peer_id: sorted(kept) for peer_id, kept in shelves.kept.items()}


def rank(peers: Sequence[str], *, fragment: int) -> list[str]:
    """Peers in the order in which they should keep a spare of a fragment; the same at everybody."""
    return sorted(peers, key=lambda peer_id: hashlib.sha256(f"spare/{fragment}/{peer_id}".encode()).digest())


class _Shelves:
    """What is assigned so far, and the room that is left."""

    def __init__(self, keepers: Mapping[str, Keeper], sizes: Sequence[int]) -> None:
        self.kept: dict[str, set[int]] = {peer_id: set() for peer_id in keepers}
        self._keepers, self._sizes = keepers, sizes
        self._room = {peer_id: keeper.room_bytes for peer_id, keeper in keepers.items()}
        self._ranked: dict[int, list[str]] = {}

    def place(self, index: int, *, passed: set[str]) -> bool:
        """Assign one more copy, at a peer that is not in `passed`. False: nobody has room, or can make it."""
        candidates = [p for p in self._candidates(index) if p not in passed and index not in self.kept[p]]
        for peer_id in candidates:
            if self._fits(peer_id, index):
                self._put(peer_id, index)
                return True
        if not any(room >= self._sizes[index] for room in self._room.values()):
            return False  # to move others would free nothing
        for peer_id in candidates:
            if len(passed) >= MAX_MOVES:
                return False
            if peer_id not in passed and self._makes_room(peer_id, index, passed):
                return True
        return False

    def _makes_room(self, peer_id: str, index: int, passed: set[str]) -> bool:
        """Put the fragment in the place of another one, which somebody else can keep."""
        passed.add(peer_id)
        for other in sorted(self.kept[peer_id]):
            self._take(peer_id, other)
            if self._fits(peer_id, index) and self.place(other, passed=passed):
                self._put(peer_id, index)
                return True
            self._put(peer_id, other)
        return False

    def _candidates(self, index: int) -> list[str]:
        if index not in self._ranked:
            able = [
                peer_id for peer_id, keeper in self._keepers.items()
                if index not in keeper.held and keeper.room_bytes >= self._sizes[index]
            ]
            self._ranked[index] = rank(able, fragment=index)
        return self._ranked[index]

    def _fits(self, peer_id: str, index: int) -> bool:
        return self._room[peer_id] >= self._sizes[index] and len(self.kept[peer_id]) < MAX_SPARES

    def _put(self, peer_id: str, index: int) -> None:
        self.kept[peer_id].add(index)
        self._room[peer_id] -= self._sizes[index]

    def _take(self, peer_id: str, index: int) -> None:
        self.kept[peer_id].remove(index)
        self._room[peer_id] += self._sizes[index]
