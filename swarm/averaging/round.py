"""The round protocol of one fragment: how its holders make version v + 1 out of version v (DESIGN 8).

    opener                     members                          owners of parts
    open ------------------->  copy the drift, encode
                               push each part ---------------->  check, keep
         <-- tokens, delivered
    reduce (contributors) --------------------------------------> weigh, add up, quantise once
         <-------------------------------- signed hash of the result
    commit (signed) -------->  fetch the result bytes by hash, apply the outer step

All parts or nothing: a contribution is in a commit only if every owner has all of it, so it is in exactly one round or
still in its peer's drift (I2). Whoever fails is left out and the opener tries again at once; if the opener fails, the
next in rank opens. Every wait has a deadline from recent rounds (I3). Training goes on through all of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from swarm.averaging import codec, plan
from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.layout import BLOCK, Layout
from swarm.averaging.messages import Commit, Contributor, Opening, Part, PartResult, make_commit, result_message
from swarm.averaging.reduction import reduce_part
from swarm.errors import BadMessage, NetworkError, PeerRefused
from swarm.network import records

ATTEMPTS = 3
OPENING_KNOWN_S = 5.0
KEPT_OPENINGS = 8
BUSY = "busy"

log = logging.getLogger(__name__)


@dataclass
class _Gathered:
    """One opening at one member: the contributions to the part that it owns, if it owns one."""

    opening: Opening
    received: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    """contributor -> (tokens, decoded values of my part)"""
    new_feedback: torch.Tensor | None = None


@dataclass(frozen=True)
class _Current:
    """The round that this peer is busy with. Until it ends, only a better-ranked opener gets its part."""

    opening: Opening
    until: float


class FragmentRounds:
    def __init__(self, context: Context, applier: Applier) -> None:
        self._context, self._applier = context, applier
        self._fragment = applier.fragment
        self._layout: Layout = applier.layout
        self._bits = context.run.averaging.bits
        self._gathered: dict[str, _Gathered] = {}
        self._known = asyncio.Condition()
        self._feedback: dict[tuple[int, int], torch.Tensor] = {}
        self._silent: set[str] = set()
        """invited to the round that is being opened, and did not answer"""
        self.elsewhere: list[str] = []
        """invited peers that turned out to be at another version: the opener must first see what they have"""
        self._push_s: deque[float] = deque(maxlen=16)
        self._current: _Current | None = None
        self._attempting: tuple[str, asyncio.Task[tuple[Commit | None, set[str]]]] | None = None

    # -- the opener -------------------------------------------------------------------------------------------------

    async def open(self, members: list[str], owners: list[str]) -> Commit | None:
        """Open the round to the next version with these other members. Returns the commit, or None where it came to
        nothing; the drift of everyone is then as it was."""
        self._silent.clear()
        for _ in range(ATTEMPTS):
            opening = self._make_opening(members, owners)
            self._attempting = opening.id, asyncio.ensure_future(self._attempt(opening))
            try:
                commit, failed = await self._attempting[1]
            except asyncio.CancelledError:
                if not self._attempting[1].cancelled():
                    raise  # the peer is ending
                commit, failed = None, set()  # another round was first
            finally:
                self._attempting[1].cancel()
                self._attempting = None
            if commit is not None:
                return commit
            for peer_id in opening.members[1:]:
                self._context.spawn(self._tell(peer_id, "abort", {"fragment": self._fragment, "id": opening.id}))
            self.abort(opening.id, by=opening.opener)
            if not failed:
                return None
            names = ", ".join(peer_id[-6:] for peer_id in failed)
            log.info("fragment %d: trying again with nothing owned by %s", self._fragment, names)
            # who failed owns nothing now, but while it lives it is invited: it may have moved on, and then says so
            gone = failed - set(self._context.directory.alive())
            members = [peer_id for peer_id in members if peer_id not in gone]
            owners = [peer_id for peer_id in owners if peer_id not in failed]
        return None

    def _give_way(self, opening_id: str) -> None:
        """Another opening than our own is the one that counts now."""
        if self._attempting is not None and self._attempting[0] != opening_id:
            self._attempting[1].cancel()

    def _make_opening(self, members: list[str], owners: list[str]) -> Opening:
        me, state = self._context.keypair.peer_id, self._applier.ledger.state
        everyone = [me, *members]
        parts = [
            Part(start=start, end=end, owner=everyone.index(owner))
            for start, end, owner in plan.split(self._layout.num_blocks, owners or [me])
        ]
        size = codec.encoded_bytes(
            self._layout.num_fine_blocks, self._layout.num_blocks - self._layout.num_fine_blocks, self._bits
        )
        return Opening(
            fragment=self._fragment, version=state.version + 1, base=state.digest, members=everyone, parts=parts,
            nonce=secrets.token_hex(8), push_s=plan.deadline_s(list(self._push_s), bytes_each=size if members else 0),
        )

    async def _attempt(self, opening: Opening) -> tuple[Commit | None, set[str]]:
        """(commit, peers to try again without). Neither: another opener was first, or there is nothing to add."""
        clock = asyncio.get_running_loop().time
        began = clock()
        owners = {opening.owner(part) for part in opening.parts}
        contributors, failed = await self._contributions(opening)
        silent = self._silent & set(self._context.directory.alive())
        if len(silent) >= len(set(opening.members) - silent):
            return None, set()  # half of the living do not answer: they may be making history among themselves
        if not contributors or owners & failed:
            return None, failed  # an owner is gone: its part would be missing, so give it to another
        self._push_s.append(clock() - began)
        results = await asyncio.gather(
            *(self._reduce_at(opening, index, contributors) for index in range(len(opening.parts))),
            return_exceptions=True,
        )
        for part, result in zip(opening.parts, results, strict=True):
            if isinstance(result, NetworkError):
                log.info("fragment %d: %s cannot reduce: %s", self._fragment, opening.owner(part)[-6:], result)
                failed.add(opening.owner(part))
            elif isinstance(result, BaseException):
                raise result
        good = [result for result in results if isinstance(result, PartResult)]
        if len(good) < len(results):
            return None, failed
        commit = make_commit(self._context.keypair, opening, contributors, good)
        for peer_id in opening.members[1:]:
            self._context.spawn(self._tell(peer_id, "commit", {"commit": commit.model_dump()}))
        await self._applier.consider(commit, began_at=began)
        return commit, failed

    async def _contributions(self, opening: Opening) -> tuple[list[Contributor], set[str]]:
        """(whose contribution is at all owners, who failed). Ends early when an owner fails or another opener won."""
        me, wait_s = opening.opener, opening.push_s + 2.0
        owners = {opening.owner(part) for part in opening.parts}
        tasks = {
            asyncio.ensure_future(
                self.take_part(opening) if peer_id == me
                else self._call(peer_id, "open", opening.model_dump(), deadline_s=wait_s)
            ): index
            for index, peer_id in enumerate(opening.members)
        }
        contributors: list[Contributor] = []
        failed: set[str] = set()
        try:
            pending = set(tasks)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    peer_id = opening.members[tasks[task]]
                    try:
                        answer = task.result()
                    except NetworkError as error:
                        if isinstance(error, PeerRefused) and BUSY in str(error):
                            return [], set()
                        log.info("round of fragment %d: %s: %s", self._fragment, peer_id[-6:], error)
                        failed.add(peer_id)
                        if not isinstance(error, PeerRefused):
                            self._silent.add(peer_id)
                        continue
                    tokens, undelivered = answer.get("tokens"), answer.get("undelivered")
                    if type(tokens) is not int or not isinstance(undelivered, list):  # True is an int
                        failed.add(peer_id)
                    elif undelivered:
                        failed |= {other for other in undelivered if other in opening.members and other != me}
                    elif 0 < tokens <= self._applier.max_claim:
                        contributors.append(Contributor(member=tasks[task], tokens=tokens))
                if failed & owners:
                    break
            return sorted(contributors, key=lambda contributor: contributor.member), failed
        finally:
            for task in tasks:
                task.cancel()  # members see it and stop sending
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _reduce_at(self, opening: Opening, part: int, contributors: list[Contributor]) -> PartResult:
        owner = opening.owner(opening.parts[part])
        header = {
            "fragment": self._fragment, "id": opening.id, "part": part,
            "contributors": [contributor.model_dump() for contributor in contributors],
        }
        if owner == self._context.keypair.peer_id:
            answer = await self.reduce(header, asker=owner)
        else:
            answer = await self._call(owner, "reduce", header, deadline_s=opening.push_s + 2.0)
        return records.parse(PartResult, answer)

    async def _tell(self, peer_id: str, method: str, header: dict[str, Any]) -> None:
        with contextlib.suppress(NetworkError):  # whoever misses a commit sees the new head in a status and asks
            await self._call(peer_id, method, header, deadline_s=10.0)

    # -- a member ---------------------------------------------------------------------------------------------------

    def refuse_reason(self, opening: Opening) -> str | None:
        """Why this peer cannot take part, or None. Of two openers the better-ranked one wins at every member."""
        state = self._applier.ledger.state
        if opening.version != state.version + 1 or opening.base != state.digest:
            return f"this peer is at version {state.version}"
        current = self._current.opening.opener if self._current is not None and self.in_round() else opening.opener
        order = plan.rank([current, opening.opener], fragment=self._fragment, version=opening.version)
        return None if order[0] == opening.opener else f"{BUSY} with the round of {current[-6:]}"

    def in_round(self) -> bool:
        """A round of this fragment is on its way, and its opener is alive."""
        if self._current is None or asyncio.get_running_loop().time() >= self._current.until:
            return False
        opener = self._current.opening.opener
        return opener == self._context.keypair.peer_id or self._context.endpoint.is_linked(opener)

    def abort(self, opening_id: object, *, by: str) -> None:
        """The opener gave up: nothing was committed, everything is still in the drift."""
        if self._current is not None and self._current.opening.id == opening_id and self._current.opening.opener == by:
            self._current = None

    async def take_part(self, opening: Opening) -> dict[str, Any]:
        """Contribute to an opening; answers once all owners have confirmed their parts, or failed to."""
        self._give_way(opening.id)
        self._current = _Current(opening, asyncio.get_running_loop().time() + 2 * opening.push_s + 4.0)
        while len(self._gathered) >= KEPT_OPENINGS:
            del self._gathered[next(iter(self._gathered))]
        self._gathered[opening.id] = _Gathered(opening)
        async with self._known:
            self._known.notify_all()
        ledger = self._applier.ledger
        if ledger.pending_tokens == 0:
            return {"tokens": 0, "undelivered": []}
        contribution = await self._context.at_boundary(
            lambda: ledger.contribute(opening.id, opening.version, max_tokens=self._applier.max_claim)
        )
        tokens = contribution.tokens
        encoded, contribution.lost = await asyncio.to_thread(self._encode, opening, contribution.offered)
        contribution.recall = lambda: self._decode(opening, encoded)
        outcomes = await asyncio.gather(
            *(self._push(opening, index, tokens, data) for index, data in enumerate(encoded)), return_exceptions=True
        )
        undelivered = []
        for part, outcome in zip(opening.parts, outcomes, strict=True):
            if isinstance(outcome, NetworkError):
                undelivered.append(opening.owner(part))
            elif isinstance(outcome, BaseException):
                raise outcome
        if undelivered:
            ledger.withdraw(opening.id)
        return {"tokens": tokens, "undelivered": undelivered}

    def _encode(self, opening: Opening, offered: torch.Tensor) -> tuple[list[bytes], torch.Tensor]:
        """(encoded parts, what they do not say of `offered`)."""
        encoded = []
        for part in opening.parts:
            values = offered[part.start * BLOCK:part.end * BLOCK]
            encoded.append(codec.encode(values, self._layout.fine_in(part.start, part.end), self._bits))
        return encoded, offered - self._decode(opening, encoded)

    def _decode(self, opening: Opening, encoded: list[bytes]) -> torch.Tensor:
        return torch.cat([
            codec.decode(data, part.end - part.start, self._layout.fine_in(part.start, part.end), self._bits)
            for part, data in zip(opening.parts, encoded, strict=True)
        ])

    async def _push(self, opening: Opening, index: int, tokens: int, data: bytes) -> None:
        owner = opening.owner(opening.parts[index])
        if owner == self._context.keypair.peer_id:
            await self._keep(opening.id, owner, tokens, data)
        else:
            header = {"fragment": self._fragment, "id": opening.id, "tokens": tokens}
            await self._call(owner, "push", header, data, deadline_s=opening.push_s)

    # -- the owner of a part ----------------------------------------------------------------------------------------

    async def push(self, header: dict[str, Any], data: bytes, *, sender: str) -> dict[str, Any]:
        opening_id, tokens = header.get("id"), header.get("tokens")
        if not isinstance(opening_id, str) or not isinstance(tokens, int) or not 0 < tokens <= self._applier.max_claim:
            raise BadMessage("a push without id, or with an impossible number of tokens")
        async with self._known:  # a member may hear of the opening before we do
            try:
                await asyncio.wait_for(self._known.wait_for(lambda: opening_id in self._gathered), OPENING_KNOWN_S)
            except asyncio.TimeoutError:
                raise PeerRefused("this peer does not know that opening") from None
        await self._keep(opening_id, sender, tokens, data)
        return {}

    async def _keep(self, opening_id: str, sender: str, tokens: int, data: bytes) -> None:
        gathered = self._gathered[opening_id]
        part = self._my_part(gathered.opening)
        if sender not in gathered.opening.members or sender in gathered.received:
            raise PeerRefused("not a member of that opening, or a second push")
        fine = self._layout.fine_in(part.start, part.end)
        values = await asyncio.to_thread(codec.decode, data, part.end - part.start, fine, self._bits)
        gathered.received[sender] = (tokens, values)

    async def reduce(self, header: dict[str, Any], *, asker: str) -> dict[str, Any]:
        gathered = self._gathered.get(str(header.get("id")))
        if gathered is None or asker != gathered.opening.opener:
            raise PeerRefused("this peer does not know that opening, or the asker did not open it")
        if self._current is None or self._current.opening.id != gathered.opening.id:
            raise PeerRefused(f"{BUSY} with another round")
        opening, raw = gathered.opening, header.get("contributors")
        if not isinstance(raw, list) or not 0 < len(raw) <= len(opening.members):
            raise BadMessage("a reduction without contributors")
        contributors = [records.parse(Contributor, item) for item in raw]
        tokens = {opening.members[c.member]: c.tokens for c in contributors if c.member < len(opening.members)}
        missing = [peer_id for peer_id in tokens if peer_id not in gathered.received]
        if missing or any(gathered.received[peer_id][0] != count for peer_id, count in tokens.items()):
            raise PeerRefused("a contribution is missing here, or its tokens differ")
        part = self._my_part(opening)
        span = (part.start, part.end)
        feedback = self._feedback.get(span, torch.zeros((part.end - part.start) * BLOCK))
        data, gathered.new_feedback = await asyncio.to_thread(
            reduce_part, {peer_id: gathered.received[peer_id][1] for peer_id in tokens}, tokens, feedback,
            num_fine=self._layout.fine_in(*span), bits=self._bits,
        )
        result_hash = self._context.results.put(data)
        message = result_message(opening.id, opening.parts.index(part), contributors, result_hash)
        return {"hash": result_hash, "signature": self._context.keypair.sign(message).hex()}

    def _my_part(self, opening: Opening) -> Part:
        for part in opening.parts:
            if opening.owner(part) == self._context.keypair.peer_id:
                return part
        raise PeerRefused("this peer owns no part of that opening")

    # -- everybody --------------------------------------------------------------------------------------------------

    def settled(self, commit: Commit) -> None:
        """A commit was applied: end a round that it has overtaken, charge the owner's feedback, drop all openings
        of its version."""
        self._give_way(commit.opening.id)
        gathered = self._gathered.get(commit.opening.id)
        if gathered is not None and gathered.new_feedback is not None:
            part = self._my_part(gathered.opening)
            self._feedback = {(part.start, part.end): gathered.new_feedback}
        self._gathered = {
            key: other for key, other in self._gathered.items() if other.opening.version > commit.opening.version
        }
        if self._current is not None and self._current.opening.version <= commit.opening.version:
            self._current = None

    async def _call(
        self, peer_id: str, method: str, header: dict[str, Any], body: bytes = b"", *, deadline_s: float
    ) -> dict[str, Any]:
        maddrs = self._context.directory.maddrs(peer_id)
        answer, _ = await self._context.endpoint.call(
            peer_id, method, header, body, deadline_s=deadline_s, maddrs=maddrs
        )
        return answer


