"""From a commit to new weights: check it, gather the result bytes by hash from whoever has them, take the outer step.

Also the answer to "somebody is ahead of me": ask for the commits since my version, and where two commits of one
version exist, move over to the one that everybody prefers. Every peer applies the same bytes in the same way, so equal
versions have equal digests (I1).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable

import torch

from swarm.averaging import outer
from swarm.averaging.context import Context, nobody_asks
from swarm.averaging.global_state import GlobalState, outranks
from swarm.averaging.layout import Layout
from swarm.averaging.ledger import Ledger
from swarm.averaging.messages import Commit, Opening, Part
from swarm.averaging.results import COMMITS_AT_ONCE, Fates, History
from swarm.errors import BadMessage, NetworkError, PeerRefused
from swarm.events import Round
from swarm.network import codec, frames, records
from swarm.network.codec import BLOCK

PUSHED_S, SLOW_BYTES_PER_S = 3.0, 128e3
"""results that owners have pushed are waited for so long before they are fetched, and for their bytes on 1 Mbit/s"""
FETCH_S = 30.0
LOOK_S = 0.5
"""while waiting for a result that its owner is sending: whether the owner is still there"""
MAX_COMMITS_BYTES = 1024 * 1024
CLAIM_LIMIT = 16
"""times the run's tokens per round: the most that one contribution may claim"""

log = logging.getLogger(__name__)


class Applier:
    def __init__(self, context: Context, *, fragment: int, layout: Layout, ledger: Ledger) -> None:
        self.fragment, self.layout, self.ledger = fragment, layout, ledger
        self.history = History()
        self.history.saw(ledger.state.version, ledger.state.digest)
        self.trusted = True
        """False: the start that this machine drew is not the run's, so it must be downloaded before anything else"""
        self.max_claim = CLAIM_LIMIT * context.run.averaging.tokens_per_round
        self.on_applied: list[Callable[[Commit], None]] = []
        self.expects: Callable[[str], bool] = lambda opening_id: False
        """do the owners of that opening push their results to this peer, and does it take them?"""
        self._context = context
        # outer steps of `local` runs do not decay, and the mask is as large as the weights
        self._decay = layout.decay_mask() if context.run.averaging.mode == "sync" else torch.zeros(0)
        self._prepared: dict[int, tuple[str, asyncio.Task[torch.Tensor]]] = {}
        """part -> (hash of its newest result, its values)"""
        self._worse = ""
        """hash of a commit with as many tokens as the newest one, that leads to a higher digest: not tried again"""
        self._lock = asyncio.Lock()

    async def consider(self, commit: Commit, *, began_at: float | None = None, source: str = "") -> bool:
        """Apply a commit if it leads on from this peer's version, or replaces the newest one with a better one.

        Returns whether it is part of this peer's history now. Raises BadMessage where it is malformed, NetworkError
        where nobody has its result bytes; then nothing has changed and a later status brings it up again.
        """
        # shielded: a round that is overtaken is cancelled, but never between moving the weights and noting it down
        considering = self._context.spawn(self._consider(commit, began_at, source))
        considering.add_done_callback(nobody_asks)
        return await asyncio.shield(considering)

    async def _consider(self, commit: Commit, began_at: float | None, source: str) -> bool:
        clock = asyncio.get_running_loop().time
        began = clock() if began_at is None else began_at
        commit.check(self.layout.num_blocks, max_claim=self.max_claim)
        async with self._lock:
            state, previous = self.ledger.state, self.ledger.previous
            version, base = commit.opening.version, commit.opening.base
            mine = self.history.commit(version)
            if mine is not None and mine.hash == commit.hash:
                return True
            replaces = previous is not None and version == state.version and base == previous.digest
            if replaces:
                assert mine is not None and previous is not None
                if commit.tokens < mine.tokens or commit.hash == self._worse:
                    return False
                state = previous
            elif version != state.version + 1 or base != state.digest:
                return False
            included = commit.includes(self._context.keypair.peer_id)
            async with self._context.applying:
                average = await self._gather(commit, source)
                new_state = await asyncio.to_thread(self._step, state, commit, average)
                del average
                # as between heads (outranks): two rules, and each of two peers could go where the other one came from
                if replaces and not outranks(new_state.tokens, new_state.digest, self.ledger.state):
                    self._worse = commit.hash
                    return False

                def move() -> None:
                    if replaces:
                        self.ledger.take_back()
                    self.ledger.apply(new_state, commit.opening.id, included=included)

                await self._context.at_boundary(move)
            self.history.add(commit, new_state.digest)
        for listener in self.on_applied:
            listener(commit)
        self._emit_round(commit, clock() - began)
        return True

    def prepare(self, opening: Opening, index: int, data: bytes, result_hash: str) -> None:
        """A result has come: decode it while the others are still on their way, and there is nothing else to do. What
        no commit names is dropped with the next one."""
        known = self._prepared.get(index)
        if known is None or known[0] != result_hash:
            decoding = self._context.spawn(self._decode(opening.parts[index], data))
            decoding.add_done_callback(nobody_asks)
            self._prepared[index] = result_hash, decoding

    async def _gather(self, commit: Commit, source: str) -> torch.Tensor:
        """The average of all parts, fp32 [numel], from the bytes that the owners have signed for."""
        opening = commit.opening
        holders = [opening.opener, *opening.members, *([source] if source else [])]
        if self.expects(opening.id):
            # they were sent to all when they were sent to the opener: what is missing for longer was lost on its way
            size = sum(self.part_bytes(part) for part in opening.parts)
            limit_s = min(opening.push_s, PUSHED_S + size / SLOW_BYTES_PER_S)
            await asyncio.gather(*(
                self._await_pushed(result.hash, opening.owner(part), limit_s)
                for part, result in zip(opening.parts, commit.results, strict=True)
            ))

        async def values(index: int, part: Part, result_hash: str) -> torch.Tensor:
            known = self._prepared.get(index)
            if known is not None and known[0] == result_hash:
                return await known[1]
            data = await self._fetch(result_hash, [opening.owner(part), *holders], self.part_bytes(part))
            return await self._decode(part, data)

        decoded = await asyncio.gather(*(
            values(index, part, result.hash)
            for index, (part, result) in enumerate(zip(opening.parts, commit.results, strict=True))
        ))
        self._prepared.clear()
        return await self._context.compute(lambda: torch.cat(decoded), num_values=self.layout.numel)

    async def _decode(self, part: Part, data: bytes) -> torch.Tensor:
        num_blocks, fine = part.end - part.start, self.layout.fine_in(part.start, part.end)
        return await self._context.compute(
            lambda: codec.decode(data, num_blocks, fine, self._bits), num_values=num_blocks * BLOCK
        )

    async def _await_pushed(self, result_hash: str, owner: str, limit_s: float) -> None:
        """Owners push their results to all members of a round: do not fetch what is on its way already."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        while loop.time() < deadline and self._context.endpoint.is_linked(owner):
            if await self._context.results.arrival(result_hash, timeout_s=LOOK_S):
                return

    async def _fetch(self, result_hash: str, holders: list[str], size: int) -> bytes:
        data = self._context.results.get(result_hash)
        me, endpoint = self._context.keypair.peer_id, self._context.endpoint
        problem: NetworkError = PeerRefused("nobody else was in that round")
        alive = self._context.directory.alive()  # to dial the dead takes long
        for holder in sorted(dict.fromkeys(holders), key=lambda peer_id: peer_id not in alive):
            if data is not None:
                break
            if holder == me:
                continue
            try:
                _, body = await endpoint.call(
                    holder, "result", {"hash": result_hash}, deadline_s=FETCH_S, max_answer=size,
                    maddrs=self._context.directory.maddrs(holder),
                )
                if hashlib.sha256(body).hexdigest() != result_hash:
                    raise BadMessage(f"{holder[-6:]} sent other bytes than the hash says")
                data = body
            except NetworkError as error:
                problem = error
        if data is None:
            raise problem
        self._context.results.put(data)  # from here others can fetch it too
        return data

    def part_bytes(self, part: Part) -> int:
        fine = self.layout.fine_in(part.start, part.end)
        return codec.encoded_bytes(fine, part.end - part.start - fine, self._bits)

    @property
    def _bits(self) -> int:
        return self._context.run.averaging.bits

    def _step(self, state: GlobalState, commit: Commit, average: torch.Tensor) -> GlobalState:
        members = commit.opening.members
        contributions = {members[contributor.member]: contributor.tokens for contributor in commit.contributors}
        new = outer.advance(self._context.run, state, contributions, average, self._decay)
        new.digest  # noqa: B018 - hash here, in a worker thread
        return new

    # -- catching up ------------------------------------------------------------------------------------------------

    async def catch_up(self, peer_id: str) -> bool:
        """Follow a peer's commits from the version before ours (it may have replaced our newest). False where its
        history does not lead on from ours: then only a download helps."""
        moved = False
        for commit in await self.commits_of(peer_id, since=max(0, self.ledger.state.version - 1)):
            moved = await self.consider(commit, source=peer_id) or moved
        return moved

    async def commits_of(self, peer_id: str, *, since: int) -> list[Commit]:
        """Those after version `since` that it keeps, checked but for their base. Raises NetworkError."""
        _, body = await self._context.endpoint.call(
            peer_id, "commits", {"fragment": self.fragment, "since": since}, deadline_s=FETCH_S,
            max_answer=MAX_COMMITS_BYTES, maddrs=self._context.directory.maddrs(peer_id),
        )
        raw = frames.parse_head(body).get("commits")
        if not isinstance(raw, list) or len(raw) > COMMITS_AT_ONCE:
            raise BadMessage("a list of commits that is none")
        commits = [records.parse(Commit, item) for item in raw]
        for commit in commits:
            commit.check(self.layout.num_blocks, max_claim=self.max_claim)
        return commits

    async def adopt(self, state: GlobalState, fates: Fates | None = None) -> bool:
        """Jump to a downloaded state (already checked against its digest); see `Ledger.adopt`. `fates`: of what this
        peer has contributed before, if anything. False: there is more of that by now, so find out again."""
        async with self._lock:
            if outranks(state.tokens, state.digest, self.ledger.state) or not self.trusted:
                if fates is not None and not fates.known >= self.ledger.recent().keys():
                    return False
                self.trusted = True
                fates = fates or Fates()
                absorbed, lost = fates.absorbed, fates.lost
                await self._context.at_boundary(lambda: self.ledger.adopt(state, absorbed=absorbed, lost=lost))
                self.history.move_over(fates, state.version, state.digest)
        return True

    def _emit_round(self, commit: Commit, seconds: float) -> None:
        sent, received = self._context.bytes_since_last_round()
        self._context.emit(Round(
            fragment=self.fragment, version=commit.opening.version, digest=self.ledger.state.digest,
            contributors=len(commit.contributors), tokens=commit.tokens,
            bytes_sent=sent, bytes_received=received, seconds=round(seconds, 3),
        ))
