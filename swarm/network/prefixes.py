"""Places of peers in a prefix tree: how a swarm of any size is cut into neighbourhoods of at most 64, without anybody
who cuts it.

A peer's place is the SHA-256 of its id, read bit by bit. All whose places begin alike are neighbours; where there are
more than 64 of them, the next bit tells them apart. So whoever knows its neighbours knows where it belongs, a swarm
that doubles adds one bit, and who joins or leaves moves nobody but a few. Two things are made of it: keys of the DHT
whose records do not grow with the swarm (neighbourhood.py), and groups in which more than 64 peers average
(averaging/groups.py). Tries over hashed keys: Fagin et al., Extendible Hashing (TODS 4(3), 1979); split by what is
there, not by a number of peers that nobody could count.

Anybody can make keys until one lies where it wants. What a neighbourhood decides must bear that its peers chose it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache

MOST = 64
"""peers of one neighbourhood"""
FEWEST = 16
"""with fewer, neighbours join those next to them again. 65 that split are 32 each, give or take 4, so nobody splits and
joins over and over"""
MAX_DEPTH = 16
"""bits; 4 million peers"""


@lru_cache(maxsize=16384)
def place(peer_id: str) -> str:
    """'0' and '1', `MAX_DEPTH` of them: the same at every peer."""
    head = int.from_bytes(hashlib.sha256(f"swarm place/{peer_id}".encode()).digest()[:4], "big")
    return f"{head:032b}"[:MAX_DEPTH]


def neighbourhoods(peer_ids: Iterable[str], *, prefix: str = "", most: int = MOST) -> dict[str, list[str]]:
    """Prefix -> who is there, sorted: the fewest neighbourhoods of at most `most` (but for what no bit can tell apart).
    `peer_ids`: all those whose places begin with `prefix`. Where there are none, one empty neighbourhood."""
    inside = sorted(peer_ids)
    if len(inside) <= most or len(prefix) >= MAX_DEPTH:
        return {prefix: inside}
    found: dict[str, list[str]] = {}
    for bit in "01":
        half = [peer_id for peer_id in inside if place(peer_id).startswith(prefix + bit)]
        if half:
            found |= neighbourhoods(half, prefix=prefix + bit, most=most)
    return found


def settled_depth(my_place: str, found: Mapping[int, Iterable[str]], *, depth: int, most: int = MOST) -> int:
    """How many bits name this peer's neighbourhood, by whom else it finds on its way down the tree.

    `found`: depth -> peers that say they live there, under the first so many bits of `my_place`; `depth`: where this
    peer has lived so far. One more bit where there are more than `most`, one less where there would still be few. Who
    lives deeper stands for as many as its neighbourhood is part of: it has not split for nothing.
    """
    lives = {peer_id: level for level in sorted(found) for peer_id in found[level]}

    def within(level: int) -> int:
        return 1 + sum(
            1 << theirs - level if theirs >= level else int(place(peer_id).startswith(my_place[:level]))
            for peer_id, theirs in lives.items()
        )

    while depth < MAX_DEPTH and within(depth) > most:
        depth += 1
    while depth > 0 and within(depth - 1) < 2 * FEWEST * most // MOST:
        depth -= 1
    return depth
