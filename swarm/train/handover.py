"""Leaving well: what was learnt goes into rounds, others get what they lack, and peers that leave together agree."""

from __future__ import annotations

import asyncio

from swarm.averaging.averager import Averager
from swarm.network.directory import Directory
from swarm.network.records import Head, Status

SETTLE_S = 30.0
HAND_OVER_S = 20.0
"""others that leave as well may still have microbatches under way"""
LINGER_S = 1.0
"""others that reach the same end notice it a moment later"""
LOOK_S = 0.3


async def tell_all(directory: Directory) -> None:
    """Everybody alive hears our status now; the DHT can wait."""
    await asyncio.gather(*(directory.tell(peer_id) for peer_id in directory.alive()))


async def hand_over(averager: Averager, directory: Directory) -> int:
    """After training has ended. Returns the tokens that stay behind: nobody made a round of them in time."""
    await directory.tell_all()
    await averager.settle(deadline_s=SETTLE_S)
    loop = asyncio.get_running_loop()
    soonest, deadline = loop.time() + LINGER_S, loop.time() + HAND_OVER_S
    while directory.alive() and loop.time() < deadline:
        await tell_all(directory)
        needed = any(needs_us(status, averager.heads()) for status in directory.alive().values())
        if loop.time() >= soonest and not needed:
            break
        await asyncio.sleep(LOOK_S)
    return max(averager.pending(), default=0)


def needs_us(status: Status, heads: list[Head | None]) -> bool:
    """Of the fragments that both hold: somebody lacks a round that we are part of, or leaves as well and has not
    finished (trains what is under way, has something pending), or has finished a round that we lack: stay a moment
    longer. Peers that leave together, as at the end of a run, end with the same weights."""
    both = [
        (theirs.tokens, ours.tokens, pending)
        for theirs, ours, pending in zip(status.heads, heads, status.pending, strict=False)
        if theirs is not None and ours is not None
    ]
    behind, ahead = any(theirs < ours for theirs, ours, _ in both), any(theirs > ours for theirs, ours, _ in both)
    busy = any(pending for _, _, pending in both) or (bool(both) and status.tokens_per_s > 0)
    return behind or (status.leaving and (ahead or busy))
