"""Following whoever is ahead: by the commits that lead on from this peer's version, else by a download.

A peer misses commits while it is cut off, suspended or slow. It learns of it from statuses, or from an invited peer
that answers that it is elsewhere.
"""

from __future__ import annotations

import asyncio
import logging

from swarm.averaging.context import Context
from swarm.averaging.global_state import outranks
from swarm.averaging.held import HeldFragment
from swarm.averaging.synchronise import Synchroniser
from swarm.errors import NetworkError, StateError
from swarm.network.records import Head

FOLLOW_AFTER_S = 0.5
"""a commit usually arrives by itself within this time"""
DISTRUST_S = 5.0
"""a peer that claims another version, but gives nothing that leads there, is not invited for this long"""

log = logging.getLogger(__name__)


class Follower:
    def __init__(self, context: Context, synchroniser: Synchroniser) -> None:
        self._context, self._synchroniser = context, synchroniser

    def heard(self, fragment: HeldFragment, peer_id: str, head: Head) -> None:
        """A peer says that this is its head."""
        if fragment.ready and self._is_ahead(fragment, head) and not fragment.following:
            fragment.following = True
            self._context.spawn(self._follow(fragment, peer_id, head))

    async def see_what_it_has(self, fragment: HeldFragment, peer_id: str) -> None:
        """A peer said that it is at another version than the round's base: follow it, or do without it for a while."""
        state = fragment.ledger.state
        try:
            moved = await fragment.applier.catch_up(peer_id) or await self._jump(fragment, peer_id)
        except (NetworkError, StateError):
            moved = False
        if not moved and fragment.ledger.state is state:
            fragment.distrusted_until[peer_id] = asyncio.get_running_loop().time() + DISTRUST_S

    def _is_ahead(self, fragment: HeldFragment, head: Head) -> bool:
        state = fragment.ledger.state
        return head.digest != state.digest and head.tokens >= state.tokens

    async def _follow(self, fragment: HeldFragment, peer_id: str, head: Head) -> None:
        try:
            await asyncio.sleep(FOLLOW_AFTER_S)
            if not self._is_ahead(fragment, head):
                return
            if not await fragment.applier.catch_up(peer_id):
                await self._jump(fragment, peer_id)
        except (NetworkError, StateError) as error:
            log.info("cannot follow %s yet: %s", peer_id[-6:], error)
        finally:
            fragment.following = False

    async def _jump(self, fragment: HeldFragment, peer_id: str) -> bool:
        """Download, where a peer's history does not lead on from ours and outranks it. Meanwhile this peer opens
        no rounds: they would only prolong a history that is about to end."""
        before = fragment.ledger.state
        status = self._context.directory.alive().get(peer_id)
        head = status.head(fragment.index) or status.spare(fragment.index) if status is not None else None
        if head is None or not outranks(head.tokens, head.digest, before):
            return False
        if not fragment.downloading:
            fragment.downloading = True
            try:
                await self._synchroniser.download(fragment.applier)
            finally:
                fragment.downloading = False
        return fragment.ledger.state is not before
