"""Records of all peers of a run in the DHT, on a tree of keys: no record grows with the swarm.

    KEY           up to 64 peers: everybody's entry, as in every small swarm
    KEY/01...     more: those whose places (prefixes.py) begin with these bits

A peer leaves its entry under the first bits of its own place, as many as its neighbourhood takes, and reads there, a
bit above and a bit below: it finds its neighbours even while some of them have split, or joined again, and others not
yet; and now and then at another depth, should some have lost sight of the others. A newcomer reads the root, which is
all in a small swarm; where nobody is there, it reads all the way down its own place. So nobody reads everything, no key
is read by all, and none needs to say how large the swarm is. Gossip (directory.py) tells of other neighbourhoods.

Many who come at the same moment all find nobody, and leave their entries at the root until their next look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from swarm.network.prefixes import MAX_DEPTH, MOST, place, settled_depth

ELSEWHERE = 4
"""every so many looks of a swarm that fills less than half of the root are at one more depth; else all"""


class Publish(Protocol):
    def __call__(self, key: str, payload: str, *, ttl_s: float) -> Awaitable[bool]: ...


class Neighbourhood:
    """Of one peer, on the tree of one key."""

    def __init__(
        self, key: str, *, me: str, entries: Callable[[str], Awaitable[dict[str, str]]], publish: Publish,
        most: int = MOST,
    ) -> None:
        """`entries` of a key: peer id -> payload, signed by that peer; see `Dht`. `most`: of one record."""
        self._key, self._me, self._entries, self._publish, self._most = key, me, entries, publish, most
        self.depth = 0
        """bits in this peer's key; 0: the swarm is small, as far as it knows"""
        self._looks = self._elsewhere = 0
        self._is_small = True

    def key_at(self, depth: int) -> str:
        return f"{self._key}/{place(self._me)[:depth]}" if depth else self._key

    async def look(self) -> dict[str, str]:
        """Neighbours' entries, this peer's own among them: peer id -> payload. Sees to it that this peer lives at the
        right depth from now on."""
        depths = {max(0, self.depth - 1), self.depth, self.depth + 1} if self.depth else {0}
        if self._looks and (not self._is_small or self._looks % ELSEWHERE == 0):
            depths.add(1 + self._elsewhere % MAX_DEPTH)
            self._elsewhere += 1
        found = await self._read(depths)
        if not self._looks and not set(found[0]) - {self._me}:
            found |= await self._read(range(1, MAX_DEPTH + 1))
        self._looks += 1
        others = {depth: set(peers) - {self._me} for depth, peers in found.items()}
        self.depth = settled_depth(place(self._me), others, depth=self.depth, most=self._most)
        self._is_small = self.depth == 0 and len(set().union(*others.values())) < self._most // 2
        return {peer_id: payload for depth in sorted(found) for peer_id, payload in found[depth].items()}

    async def publish(self, payload: str, *, ttl_s: float) -> bool:
        """Leave this peer's entry with its neighbours'; False where nobody took it. ValueError: it is too long."""
        return await self._publish(self.key_at(self.depth), payload, ttl_s=ttl_s)

    async def _read(self, depths: Iterable[int]) -> dict[int, dict[str, str]]:
        inside = [depth for depth in depths if depth <= MAX_DEPTH]
        found = await asyncio.gather(*(self._entries(self.key_at(depth)) for depth in inside))
        return dict(zip(inside, found, strict=True))
