"""A member of a round: contributes its drift part by part, and takes the results (the protocol: round.py).

It is in one round of a fragment at a time. Of two openers the better-ranked one gets it, everywhere, so that one round
comes about rather than two halves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from swarm.averaging import plan
from swarm.averaging.apply import Applier
from swarm.averaging.context import Context, nobody_asks
from swarm.averaging.layout import Layout
from swarm.averaging.messages import Commit, Contributor, Opening, PartResult
from swarm.averaging.packed import Packed
from swarm.averaging.part import Contributors, PartOwner, contributors_of
from swarm.errors import BadMessage, NetworkError, PeerGone, PeerRefused
from swarm.network import codec, records
from swarm.network.codec import BLOCK

RETRY_S = 0.5
"""before a contribution is sent again whose way was cut off"""
BUSY = "busy"
KEPT_OVER, MAX_ID = 16, 64
MAX_TAKEN = 256
"""openings of one version that are remembered, the newest; to refuse more would let one peer stop all rounds"""


@dataclass
class _Current:
    """The round that this peer is busy with. Until it ends, only a better-ranked opener gets its part."""

    opening: Opening
    until: float
    pushing: list[asyncio.Task[None]] = field(default_factory=list)


class Member:
    """Of one fragment at one peer; `owner`: what it does for the parts that it owns."""

    def __init__(self, context: Context, applier: Applier) -> None:
        self._context, self._applier = context, applier
        self._fragment, self._me = applier.fragment, context.keypair.peer_id
        self._layout: Layout = applier.layout
        self._bits = context.run.averaging.bits
        self.owner = PartOwner(
            context, applier, is_current=self._is_current, on_result=self._has_result, send=context.tell
        )
        applier.expects = lambda opening_id: self.owner.opening(opening_id) is not None
        self.on_opening: Callable[[str], None] = lambda opening_id: None
        """this peer is in that opening from now on, and in no other"""
        self.on_result: Callable[[Opening, int, Contributors, PartResult], None] = lambda *result: None
        """a part's result is made, here or by another owner"""
        self._current: _Current | None = None
        self._taken: dict[str, tuple[int, asyncio.Task[dict[str, Any]]]] = {}
        """openings of the version to come that this peer has been in -> (that version, what it answers)"""
        self._over: deque[tuple[str, str]] = deque(maxlen=KEPT_OVER)
        """(opening, who said so): the end of an opening may come before its beginning"""

    def refuse_reason(self, opening: Opening) -> str | None:
        """Why this peer cannot take part, or None. Of two openers the better-ranked one wins at every member."""
        state = self._applier.ledger.state
        if opening.version != state.version + 1 or opening.base != state.digest:
            return f"this peer is at version {state.version}"
        current = self._current.opening.opener if self._current is not None and self.in_round() else opening.opener
        if opening.opener != self._me and not self._context.has_room_for(self._fragment):
            return f"{BUSY} with the round of another fragment: no memory for both"
        order = plan.rank([current, opening.opener], fragment=self._fragment, version=opening.version)
        return None if order[0] == opening.opener else f"{BUSY} with the round of {current[-6:]}"

    def in_round(self) -> bool:
        """A round of this fragment is on its way, and its opener is alive."""
        if self._current is None or asyncio.get_running_loop().time() >= self._current.until:
            return False
        opener = self._current.opening.opener
        return opener == self._me or self._context.endpoint.is_linked(opener)

    def _is_current(self, opening_id: str) -> bool:
        return self._current is not None and self._current.opening.id == opening_id

    def abort(self, opening_id: object, *, by: str) -> None:
        """The opener gave up: nothing was committed, everything is still in the drift."""
        if isinstance(opening_id, str) and len(opening_id) <= MAX_ID:
            self._over.append((opening_id, by))
        if self._current is not None and self._current.opening.id == opening_id and self._current.opening.opener == by:
            self._leave_current()

    def _leave_current(self) -> None:
        for pushing in self._current.pushing if self._current is not None else []:
            pushing.cancel()  # what is not on its way yet would only be in the way of what comes next
        self._current = None

    async def take_part(self, opening: Opening) -> dict[str, Any]:
        """Contribute to an opening; answers with the tokens as soon as the contribution is taken. Its bytes follow.

        Once, however often it is asked: a second contribution to one opening would be another one than its owners have,
        and the commit would take more off the drift than is in it. Raises PeerRefused where it is over already."""
        if opening.id not in self._taken:
            if (opening.id, opening.opener) in self._over:
                raise PeerRefused("that opening is over")
            self.on_opening(opening.id)
            self._leave_current()
            current = _Current(opening, asyncio.get_running_loop().time() + 4 * opening.push_s + 4.0)
            self._current = current
            contributing = self._context.spawn(self._contribute(current))
            contributing.add_done_callback(nobody_asks)
            self._taken[opening.id] = opening.version, contributing
            if len(self._taken) > MAX_TAKEN:
                del self._taken[next(iter(self._taken))]
        return await asyncio.shield(self._taken[opening.id][1])

    async def _contribute(self, current: _Current) -> dict[str, Any]:
        opening = current.opening
        await self.owner.expect(opening)
        ledger = self._applier.ledger
        if ledger.pending_tokens == 0:
            self._push_all(current, 0, dict.fromkeys(range(len(opening.parts)), b""))
            return {"tokens": 0}
        contribution = await self._context.at_boundary(
            lambda: ledger.contribute(opening.id, opening.version, max_tokens=self._applier.max_claim)
        )
        encoded: dict[int, bytes] = {}
        offered, contribution.offered = contribution.offered, torch.zeros(0)
        for wave in plan.waves([part.owner for part in opening.parts]):
            size = sum(opening.parts[index].end - opening.parts[index].start for index in wave) * BLOCK
            done = await self._context.compute(
                partial(self._encode, opening, wave, offered), num_values=size
            )
            encoded.update(done)
            if self._current is current:  # another round may have come first
                self._push_all(current, contribution.tokens, done)
        if self._bits < 32:
            contribution.lost = await self._context.compute(
                lambda: Packed.of(offered), num_values=self._layout.numel
            )
        contribution.recall = lambda: self._decode(opening, encoded)
        return {"tokens": contribution.tokens}

    def _encode(self, opening: Opening, wave: list[int], offered: torch.Tensor) -> dict[int, bytes]:
        """Encode these parts of `offered`, fp32 [numel]; what their bytes do not say is what is left there."""
        encoded = {}
        for index in wave:
            part = opening.parts[index]
            span = slice(part.start * BLOCK, part.end * BLOCK)
            fine = self._layout.fine_in(part.start, part.end)
            encoded[index], said = codec.encode_and_read(offered[span], fine, self._bits)
            offered[span].sub_(said)
        return encoded

    def _decode(self, opening: Opening, encoded: dict[int, bytes]) -> torch.Tensor:
        return torch.cat([
            codec.decode(
                encoded[index], part.end - part.start, self._layout.fine_in(part.start, part.end), self._bits
            ) for index, part in enumerate(opening.parts)
        ])

    def _push_all(self, current: _Current, tokens: int, encoded: dict[int, bytes]) -> None:
        for index, data in encoded.items():
            current.pushing.append(self._context.spawn(self._push(current, index, tokens, data)))

    async def _push(self, current: _Current, index: int, tokens: int, data: bytes) -> None:
        opening = current.opening
        owner = opening.owner(opening.parts[index])
        header = {"fragment": self._fragment, "id": opening.id, "part": index, "tokens": tokens}
        clock = asyncio.get_running_loop().time
        while clock() < current.until:
            try:
                if owner == self._me:
                    await self.owner.keep(opening.id, index, owner, tokens, data)
                else:
                    await self._context.tell(owner, "push", header, data, 2 * opening.push_s)
                return
            except PeerGone:  # a link that ends, or does not open at once, must not cost the round
                await asyncio.sleep(RETRY_S)
            except NetworkError:
                return  # the opener sees that it is missing

    def reduced(self, header: dict[str, Any], data: bytes, *, sender: str) -> None:
        """An owner's result: kept until the commit that names it. Raises BadMessage where it is not what it should
        be."""
        opening, index, raw = self.owner.opening(header.get("id")), header.get("part"), header.get("contributors")
        if opening is None:
            return  # the round is over, or this peer came too late for it
        if type(index) is not int or not 0 <= index < len(opening.parts) or not isinstance(raw, list):
            raise BadMessage("a result of no part")
        part = opening.parts[index]
        if opening.owner(part) != sender or len(data) != self._applier.part_bytes(part):
            raise BadMessage("a result of somebody else's part, or of a wrong size")
        if len(raw) > len(opening.members):
            raise BadMessage("a result of too many contributors")
        result = records.parse(PartResult, {"hash": header.get("hash"), "signature": header.get("signature")})
        if self._context.results.put(data) != result.hash:
            raise BadMessage("a result that does not match its hash")
        parsed = [records.parse(Contributor, item) for item in raw]
        self._has_result(opening, index, contributors_of({c.member: c.tokens for c in parsed}), result)

    def _has_result(self, opening: Opening, part: int, contributors: Contributors, result: PartResult) -> None:
        data = self._context.results.get(result.hash)
        if data is not None and self._is_current(opening.id):
            self._applier.prepare(opening, part, data, result.hash)
        self.on_result(opening, part, contributors, result)

    def settled(self, commit: Commit) -> None:
        """A commit was applied: end a round that it has overtaken."""
        self.owner.settled(commit)
        self._taken = {key: taken for key, taken in self._taken.items() if taken[0] > commit.opening.version}
        if self._current is not None and self._current.opening.version <= commit.opening.version:
            self._leave_current()
