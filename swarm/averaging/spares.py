"""Spare copies of fragments that this peer does not hold: which ones, kept fresh, and given to whoever needs them.

A copy is downloaded once; from then on it follows the fragment's commits, whose result bytes anybody has and gives.
At 4 bits a result is 0.51 bytes a value, the state 8. So a spare receives 0.51 bytes a value and round, and the n
holders together send that `SPARES` times; in the round itself each of them sends 2(n - 1)/n times that. Measured in a
simulated swarm, in bytes that a holder sends a value and round, without spares and with: one holder 0 and 1.03, two
0.51 and 0.97, four 0.76 and 1.03. Where more rounds have passed than the state is worth, or the results are gone, the
state is downloaded again. Nothing is renewed more often than every `RENEW_S`, nor when there is nothing new.

Where nobody holds the fragment, or everybody who does is leaving, nothing is waited for: the copies come level with the
newest one at once. A copy that this peer should not keep any more stays until others have it (make before break).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from swarm.averaging import outer
from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.download import Shape
from swarm.averaging.global_state import GlobalState
from swarm.averaging.layout import Layout
from swarm.averaging.ledger import Ledger, Untrained
from swarm.averaging.results import History
from swarm.averaging.spare_choice import SPARES, Keeper, assign
from swarm.averaging.spare_copies import SpareCopies, Store
from swarm.averaging.synchronise import Synchroniser
from swarm.errors import NetworkError, StateError
from swarm.network.codec import encoded_bytes
from swarm.network.records import Head, Status

LOOK_S = 5.0
RENEW_S = 10.0
WRITTEN_BYTES_PER_S = 10e6
"""a copy is renewed no more often than that it writes so much to the disk: one of 600 MB once a minute"""
RENEW_SHARE = 0.1
"""of the time, at most, goes into renewing one copy"""
AGAIN_S = 600.0
"""after a copy could not be written"""
GONE_S = 60.0
"""a peer that is silent for longer is no keeper: a short silence must not move copies about"""
SOURCES = 2

log = logging.getLogger(__name__)
T = TypeVar("T")


async def _at_once(function: Callable[[], T]) -> T:
    return function()


class Spares:
    """One a peer, on the network's event loop; files are read and written beside it."""

    def __init__(
        self, context: Context, store: Store, layouts: Mapping[int, Layout], synchroniser: Synchroniser,
        held: Callable[[], Collection[int]],
    ) -> None:
        """`layouts`: of all fragments of the run; `held`: those that this peer holds, or is about to."""
        self._context, self._store, self._layouts, self._held = context, store, layouts, held
        self._synchroniser = synchroniser
        self.copies = SpareCopies(store, held)
        self._quiet = replace(context, emit=lambda event: None, at_boundary=_at_once)
        self._quiet.results, self._quiet.applying = context.results, context.applying  # the peer's, not its own
        """rounds that a copy follows are not this peer's, and training does not wait for them"""
        self._num_buffers = outer.num_buffers(context.run)
        self._not_before: dict[int, float] = {}
        self._full_until = float("-inf")
        self._keepers: dict[str, tuple[Keeper, float]] = {}
        self._chosen: tuple[dict[str, Keeper], list[int]] = {}, []

    async def look_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except Exception:  # spares are a precaution: whatever goes wrong here must not end anything else
                log.exception("cannot look after the spare copies")

    async def look(self) -> None:
        """Keep what this peer should keep, one copy at a time, and let go of what others keep by now."""
        now = asyncio.get_running_loop().time()
        self.copies.close_idle()
        wanted = await self._wanted(now)
        for index in sorted(wanted, key=lambda index: (len(self._copies(index)), index)):
            if self._is_due(index, now) and await self._make_room(index, wanted):
                await self._renew(index)
        mine = self._store.heads()
        for index in sorted(set(mine) - set(wanted)):
            level = [head for head in self._spares_of(index).values() if head.tokens >= mine[index].tokens]
            if len(level) >= SPARES:
                await self.copies.drop(index)

    async def _wanted(self, now: float) -> list[int]:
        me = self._context.keypair.peer_id
        for peer_id, status in self._alive().items():
            room = 0 if status.leaving else status.spare_room_bytes
            self._keepers[peer_id] = Keeper(frozenset(status.held()), room), now
        self._keepers = {p: (keeper, at) for p, (keeper, at) in self._keepers.items() if now - at < GONE_S}
        keepers = {p: keeper for p, (keeper, _) in self._keepers.items()}
        keepers[me] = Keeper(frozenset(self._held()), self._store.room_bytes)
        if keepers != self._chosen[0]:
            sizes = [self._store.size_bytes(index) for index in range(self._context.run.fragments)]
            self._chosen = keepers, (await asyncio.to_thread(assign, keepers, sizes))[me]
        return self._chosen[1]

    def _is_due(self, index: int, now: float) -> bool:
        """Has anybody more of it, and is it time, or is nobody left who will go on with it?"""
        mine = self._store.heads().get(index)
        newest = max((head.tokens for head in self._copies(index).values()), default=-1)
        if now < self._full_until or newest <= (-1 if mine is None else mine.tokens):
            return False
        staying = any(s.head(index) is not None and not s.leaving for s in self._alive().values())
        return now >= self._not_before.get(index, now) or not staying

    async def _make_room(self, index: int, wanted: Collection[int]) -> bool:
        """Let go of copies that this peer should not keep any more, if there are more of them than of this one."""
        while not self._store.has_room_for(index):
            others = [other for other in self._store.heads() if other not in wanted]
            most = max(others, key=lambda other: (len(self._copies(other)), other), default=None)
            if most is None or len(self._copies(most)) <= min(SPARES, len(self._copies(index))):
                return False
            await self.copies.drop(most)
        return True

    async def _renew(self, index: int) -> None:
        """Bring a copy level with the newest one that anybody alive has, or make it."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            newer = await self._follow(index) or await self._download(index)
            if newer is not None and not await self.copies.write(*newer):
                self._full_until = loop.time() + AGAIN_S
        except (NetworkError, StateError) as error:
            log.info("spare copy of fragment %d: %s", index, error)
        now = loop.time()
        write_s = self._store.size_bytes(index) / WRITTEN_BYTES_PER_S
        self._not_before[index] = now + max(RENEW_S, write_s, (now - began) / RENEW_SHARE)

    async def _follow(self, index: int) -> tuple[GlobalState, History] | None:
        """By the commits since; None: they are not worth it, or nobody gives them."""
        mine = self._store.heads().get(index)
        copies = self._copies(index)
        ahead = [peer_id for peer_id, head in copies.items() if mine is not None and head.tokens > mine.tokens]
        if mine is None or not ahead:
            return None
        behind = max(copies[peer_id].version for peer_id in ahead) - mine.version
        if not 0 < behind * self._result_bytes(index) < self._store.size_bytes(index):
            return None
        state = await self.copies.read(index)
        if state is None:
            return None
        ledger = Ledger(state, Untrained(), self._quiet.keep)
        applier = Applier(self._quiet, fragment=index, layout=self._layouts[index], ledger=ledger)
        applier.history = self.copies.history(index).copy()
        for source in self._ranked(index, ahead)[:SOURCES]:
            try:
                before = None
                while ledger.state is not before:
                    before = ledger.state
                    await applier.catch_up(source)
            except NetworkError as error:
                log.info("spare copy of fragment %d, commits of %s: %s", index, source[-6:], error)
        return (ledger.state, applier.history) if ledger.state is not state else None

    async def _download(self, index: int) -> tuple[GlobalState, History] | None:
        mine = self._store.heads().get(index)
        shape = Shape(index, self._layouts[index].numel, self._num_buffers)
        found = await self._synchroniser.fetch(shape, better_than=mine)
        if found is None:
            return None
        state, _ = found
        history = History()
        history.saw(state.version, state.digest)
        return state, history

    def _alive(self) -> dict[str, Status]:
        return self._context.directory.alive()

    def _copies(self, index: int) -> dict[str, Head]:
        """What others alive have of a fragment, holders and spares."""
        found = {p: status.head(index) or status.spare(index) for p, status in self._alive().items()}
        return {peer_id: head for peer_id, head in found.items() if head is not None}

    def _spares_of(self, index: int) -> dict[str, Head]:
        found = {p: status.spare(index) for p, status in self._alive().items() if status.head(index) is None}
        return {peer_id: head for peer_id, head in found.items() if head is not None}

    def _ranked(self, index: int, peers: Collection[str]) -> list[str]:
        """Another order at each keeper: not all of them ask the same peer."""
        me = self._context.keypair.peer_id
        return sorted(peers, key=lambda peer_id: hashlib.sha256(f"{index}/{me}/{peer_id}".encode()).digest())

    def _result_bytes(self, index: int) -> int:
        """Of one round."""
        layout = self._layouts[index]
        fine = layout.num_fine_blocks
        return encoded_bytes(fine, layout.num_blocks - fine, self._context.run.averaging.bits)
