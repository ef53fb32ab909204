"""What other peers may ask of this one: its part in rounds, commits and results that it has, its state.

Every request is checked before anything is done (I4); who asks too early is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from swarm.averaging.context import Context
from swarm.averaging.download import Donor
from swarm.averaging.held import HeldFragment
from swarm.averaging.messages import Commit, Invitation
from swarm.averaging.results import History
from swarm.averaging.spare_copies import SpareCopies
from swarm.errors import BadMessage, NetworkError, PeerRefused
from swarm.network import records
from swarm.network.link import Answer, Link

CATCH_UP_S = 5.0
"""an invited peer that is behind may take this long to come level; the round waits for it no longer"""


class Answers:
    def __init__(
        self, context: Context, fragments: Mapping[int, HeldFragment], is_serving: Callable[[], bool]
    ) -> None:
        """`fragments`: those held, by their index in the run; they may change. `is_serving`: is this peer's own state
        the swarm's by now?"""
        self._context, self._fragments, self._is_serving = context, fragments, is_serving
        self.spares: SpareCopies | None = None
        """copies of other fragments, whose states and commits are given as well"""
        self._introducing: asyncio.Task[None] | None = None

    def register(self) -> None:
        """Again whenever a fragment has come: the largest one held bounds what others may send."""
        endpoint = self._context.endpoint
        numels = [fragment.applier.layout.numel for fragment in self._fragments.values()]
        largest = 4 * max(numels, default=0) + 1024
        endpoint.on("open", self._on_open)
        endpoint.on("push", self._on_push, max_body=largest)
        endpoint.on("reduce", self._on_reduce)
        endpoint.on("reduced", self._on_reduced, max_body=largest)
        endpoint.on("abort", self._on_abort)
        endpoint.on("commit", self._on_commit)
        endpoint.on("commits", self._on_commits)
        endpoint.on("result", self._on_result)
        endpoint.on("state", self._on_state)
        endpoint.on("chunk", self._on_chunk)
        endpoint.on("knows", self._on_knows)

    def _index(self, header: dict[str, Any]) -> int:
        index = header.get("fragment")
        if type(index) is not int or not 0 <= index < self._context.run.fragments:  # True is an int
            raise BadMessage("there is no such fragment")
        if not self._is_serving():
            raise PeerRefused("this peer is still joining")
        return index

    def _fragment(self, header: dict[str, Any]) -> HeldFragment:
        index = self._index(header)
        fragment = self._fragments.get(index)
        if fragment is None:
            raise PeerRefused(f"this peer does not hold fragment {index}")
        if not fragment.ready:
            raise PeerRefused(f"this peer is still downloading fragment {index}")
        return fragment

    def _spares(self, header: dict[str, Any]) -> SpareCopies | None:
        """Where a copy is asked for, and not what this peer holds."""
        index = self._index(header)
        fragment = self._fragments.get(index)
        held = fragment is not None and fragment.ready
        return self.spares if self.spares is not None and not held and self.spares.has(index) else None

    async def _donor(self, header: dict[str, Any]) -> Donor:
        spares = self._spares(header)
        return await spares.donor(header["fragment"]) if spares is not None else self._fragment(header).donor

    def _history(self, header: dict[str, Any]) -> History:
        spares = self._spares(header)
        return spares.history(header["fragment"]) if spares is not None else self._fragment(header).applier.history

    async def _on_open(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        invitation = records.parse(Invitation, header)
        opening = invitation.opening
        fragment = self._fragment({"fragment": opening.fragment})
        opening.check(fragment.applier.layout.num_blocks)
        if opening.opener != link.peer_id or self._context.keypair.peer_id not in opening.members:
            raise BadMessage("an opening by somebody else, or for somebody else")
        if fragment.ledger.state.version < opening.version - 1:
            with contextlib.suppress(asyncio.TimeoutError, NetworkError):
                await asyncio.wait_for(fragment.applier.catch_up(link.peer_id), min(CATCH_UP_S, opening.push_s / 2))
        state = fragment.ledger.state
        if state.version >= opening.version or (state.version == opening.version - 1 and state.digest != opening.base):
            return {"elsewhere": True}, b""
        reason = fragment.rounds.member.refuse_reason(opening)
        if reason is not None:
            raise PeerRefused(reason)
        for contact in invitation.contacts:
            if contact.peer_id in opening.members:
                self._context.directory.meet(contact.peer_id, contact.maddrs, contact.reach)
        if self._introducing is None or self._introducing.done():  # one at a time, or openings could flood the DHT
            self._introducing = self._context.spawn(self._context.directory.introduce(opening.members))
        return await fragment.rounds.member.take_part(opening), b""

    async def _on_push(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        await self._fragment(header).rounds.member.owner.push(header, body, sender=link.peer_id)
        return {}, b""

    async def _on_reduce(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        return await self._fragment(header).rounds.member.owner.reduce(header, asker=link.peer_id), b""

    async def _on_reduced(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        self._fragment(header).rounds.member.reduced(header, body, sender=link.peer_id)
        return {}, b""

    async def _on_abort(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        self._fragment(header).rounds.member.abort(header.get("id"), by=link.peer_id)
        return {}, b""

    async def _on_commit(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        commit = records.parse(Commit, header.get("commit"))
        fragment = self._fragment({"fragment": commit.opening.fragment})
        if commit.opening.version - fragment.ledger.state.version in (0, 1):  # others are not worth their signatures
            self._context.spawn(self._consider(fragment, commit, link.peer_id))
        return {}, b""

    async def _consider(self, fragment: HeldFragment, commit: Commit, source: str) -> None:
        with contextlib.suppress(NetworkError):  # the next status brings it up again
            await fragment.applier.consider(commit, source=source)

    async def _on_commits(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        return {}, self._history(header).answer(header.get("since"))

    async def _on_result(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        data = self._context.results.get(str(header.get("hash")))
        if data is None:
            raise PeerRefused("this peer does not have those bytes")
        return {}, data

    async def _on_state(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        return (await self._donor(header)).manifest(header.get("digest"))

    async def _on_chunk(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        return {}, (await self._donor(header)).chunk(header.get("digest"), header.get("index"))

    async def _on_knows(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        version, digest = header.get("version"), header.get("digest")
        if not isinstance(version, int) or not isinstance(digest, str):
            raise BadMessage("a head without version and digest")
        return {"known": self._history(header).knows(version, digest)}, b""
