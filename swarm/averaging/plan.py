"""Decisions of a round, as pure functions: who opens, who reduces what, with which weights, and how long to wait."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Collection, Mapping, Sequence

from swarm.config import AveragingConfig, RunConfig

PIECES = 4
"""parts of one owner: while the last one still arrives, the first one's result is on its way"""
MIN_PIECE_BLOCKS = 1024
"""128 kB at 4 bits; the messages of smaller parts would cost more than they save"""
MAX_PARTS = 64
"""of one round: each costs a hash and a signature in its commit"""
MAX_MEMBERS = 64
"""of one round: every member sends to every owner, and all of them are named in the commit"""
WEIGHT_CAP = 2.0
"""a contribution weighs at most this many times the median, so that nobody takes a round over by claiming tokens"""


def rank(peers: Sequence[str], *, fragment: int, version: int) -> list[str]:
    """Peers in the order in which they may open the round to `version`: rendezvous hashing (Thaler, Ravishankar 1998),
    so every peer computes the same order and each round has another first."""
    def weight(peer_id: str) -> bytes:
        return hashlib.sha256(f"{fragment}/{version}/{peer_id}".encode()).digest()

    return sorted(peers, key=weight)


def leaders(reaches: Mapping[str, str], *, others_outbound: bool = False) -> list[str]:
    """Who may open rounds and own parts, of peers with their `reach` (network/reachability.py): those that all others
    can dial. Two peers behind routers meet by hole punching, but not where one of them is outbound (`others_outbound`:
    there is such a peer that we have only heard of). Where nobody is left by that rule, everybody may."""
    outbound = others_outbound or "outbound" in reaches.values()
    allowed = ("public", "") if outbound else ("public", "punched", "")
    return [peer_id for peer_id, reach in reaches.items() if reach in allowed] or list(reaches)


def invited(peers: Sequence[str], *, first: Collection[str] = (), fragment: int, version: int, most: int) -> list[str]:
    """Which `most` of these peers have a place in the round to `version`: all in their order if there is room, else
    those in `first` and then by rank, so that others have their turn each time. Whoever has none applies the result
    like everybody, and its drift waits for a later round. Rounds are due by the tokens of all, so they come the more
    often, and each peer is in one about as often as in a small swarm."""
    if len(peers) <= most:
        return list(peers)
    order = rank(peers, fragment=fragment, version=version)
    return sorted(order, key=lambda peer_id: peer_id not in first)[:most]  # stable: by rank among each


def target_tokens(run: RunConfig, *, fragment: int, version: int, tokens: int, staggered: bool) -> int:
    """Swarm tokens since the last commit at which a fragment is due that has trained `tokens` in `version` rounds.

    The first round is shorter by the fragment's place, and so fragments take turns from then on: the uplink is used
    evenly and results are fresh. Growing rounds keep that order, for all grow by the same rule. What is left of the
    run after a round is never too little for one: all fragments end with the run, in a round of half to one and a half
    times the usual tokens, which is the plain average (outer.py).
    """
    if not staggered:
        return run.averaging.tokens_per_round
    length = round_tokens(run.averaging, tokens)
    if version == 0:
        length = max(1, length * (fragment + 1) // run.fragments)
    left = run.train.total_tokens - tokens
    return left if 0 < 2 * left < 3 * length else length


def round_tokens(averaging: AveragingConfig, tokens: int) -> int:
    """Tokens of a usual round, once so many are trained: from `first_round_tokens` up in a straight line. A fresh model
    wants short rounds (H of 20 inner steps cost nothing from cold where 65 cost 12 %, and 9 % with a ramp; once
    it is trained, 65 cost nothing)."""
    first, full = averaging.first_round_tokens, averaging.tokens_per_round
    if not first or tokens >= averaging.ramp_tokens:
        return full
    return first + (full - first) * tokens // averaging.ramp_tokens


def split(num_blocks: int, owners: Sequence[str]) -> list[tuple[int, int, str]]:
    """Parts (first block, end block, owner): equal runs of blocks, one each, a long run in up to `PIECES` parts.
    Owners in excess of blocks, or of `MAX_PARTS`, get none."""
    owners = sorted(owners)[:min(num_blocks, MAX_PARTS)]
    pieces = min(PIECES, MAX_PARTS // len(owners), num_blocks // len(owners) // MIN_PIECE_BLOCKS) or 1
    count = pieces * len(owners)
    edges = [num_blocks * i // count for i in range(count + 1)]
    return [(edges[i], edges[i + 1], owners[i // pieces]) for i in range(count)]


def waves(owners: Sequence[int]) -> list[list[int]]:
    """The order in which a member sends parts with these owners: the first one of every owner, then the second ones."""
    order: dict[int, list[int]] = {}
    seen: dict[int, int] = {}
    for part, owner in enumerate(owners):
        seen[owner] = seen.get(owner, -1) + 1
        order.setdefault(seen[owner], []).append(part)
    return list(order.values())


def weights(tokens: Mapping[str, int], warmth: Mapping[str, float] | None = None) -> dict[str, float]:
    """Share of each contribution in the average, by tokens, capped; they add up to 1. `warmth`: see `counted`."""
    counts = counted(tokens, warmth)
    total = math.fsum(counts.values())
    return {peer_id: count / total for peer_id, count in counts.items()}


def counted(tokens: Mapping[str, int], warmth: Mapping[str, float] | None = None) -> dict[str, float]:
    """Tokens of each contribution, as far as they count. `warmth` (roll.py): for which part of its tokens each one
    does, over 0 and at most 1; who is not named counts in full."""
    cap = WEIGHT_CAP * statistics.median(tokens.values())
    warm = warmth or {}
    return {peer_id: min(float(count), cap) * warm.get(peer_id, 1.0) for peer_id, count in sorted(tokens.items())}


def deadline_s(recent_s: Sequence[float], *, bytes_each: int, floor_s: float = 3.0, ceiling_s: float = 600.0) -> float:
    """How long to wait for a step of a round: median + 6 MAD of the recent ones, twice over; before there are any,
    10 s and the bytes at 128 kB/s (a 1 Mbit/s uplink). Fixed timeouts are guesses (hivemind issue 676)."""
    if len(recent_s) < 3:
        guess = 10.0 + bytes_each / 128e3
    else:
        middle = statistics.median(recent_s)
        spread = statistics.median(abs(value - middle) for value in recent_s)
        guess = 2 * (middle + 6 * spread)
    return min(max(guess, floor_s), ceiling_s)
