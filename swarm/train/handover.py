"""Leaving well: what was learnt goes into rounds, others get what they lack, and peers that leave together agree."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

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
        statuses, heads = directory.alive().values(), averager.heads()
        needed = any(needs_us(status, heads) for status in statuses) or spares_need_us(statuses, heads)
        if loop.time() >= soonest and not needed:
            break
        await asyncio.sleep(LOOK_S)
    return max(averager.pending(), default=0)


def spares_need_us(statuses: Iterable[Status], heads: list[Head | None]) -> bool:
    """We are the last to hold a fragment, and somebody who stays has a spare copy of it, but nobody the newest one:
    they hurry once they hear that we leave."""
    staying = [status for status in statuses if not status.leaving]
    for index, ours in enumerate(heads):
        copies = [copy for status in staying if (copy := status.spare(index)) is not None]
        held = any(status.head(index) is not None for status in staying)
        if ours is not None and copies and not held and max(copy.tokens for copy in copies) < ours.tokens:
            return True
    return False


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
