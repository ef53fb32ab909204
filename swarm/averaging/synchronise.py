"""Taking over the swarm's state: which head to believe, and downloading it.

Which one that is: attestation.py. The donor of the most tokens is asked for its newest head, since statuses are old.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from swarm.averaging.apply import Applier
from swarm.averaging.attestation import ATTEST_S, who_knows
from swarm.averaging.context import Context
from swarm.averaging.download import Shape, Wanted, download, newest_head
from swarm.averaging.fates import fates_in
from swarm.averaging.global_state import GlobalState, Ranked, outranks
from swarm.averaging.results import Fates
from swarm.errors import NetworkError, StateError
from swarm.events import Warning
from swarm.network.records import Head

TRIES = 5
FATES_S = 120.0
"""one that is alive and never says what it knows must not keep a peer in a history that has lost"""
AGAIN_S = 0.3

log = logging.getLogger(__name__)


async def _nothing(fragment: int, more_than: int) -> GlobalState | None:
    return None


async def _never(applier: Applier) -> bool:
    return False


class Synchroniser:
    def __init__(self, context: Context, appliers: Callable[[], Iterable[Applier]]) -> None:
        """`appliers`: of the fragments that this peer holds by now."""
        self._context, self._appliers = context, appliers
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        """bytes done and in all, of the fragment that is being downloaded"""
        self.attested_by_one = False
        """some state rests on the word of one peer, because there was no other to ask"""
        self.own_copy = _nothing
        """a fragment and a number of tokens -> the spare on this peer's own disk, if it has more than that"""
        self.rebuild: Callable[[Applier], Awaitable[bool]] = _never
        """makes a fragment anew of which there is no copy anywhere; False: there is"""
        self.rebuilt: list[int] = []
        self._untold: dict[int, tuple[float, float]] = {}
        """fragment -> when somebody was first and last silent about what is in its other history"""

    async def join(self) -> int:
        """Bring every fragment held to the swarm's newest head; returns the number of fragments that were downloaded.

        Raises StateError where a newer head exists and nobody can give it.
        """
        return sum(await asyncio.gather(*(self.bring_level(applier) for applier in self._appliers())))

    async def bring_level(self, applier: Applier) -> bool:
        """Download one fragment where others have more of it, or where our start is not the run's. False: there was no
        need, with what is on this peer's own disk. Raises StateError."""
        index = applier.fragment
        own = await self.own_copy(index, applier.ledger.state.tokens)
        if own is not None:
            await applier.adopt(own)
        if await self.rebuild(applier):
            self.rebuilt.append(index)
            return False
        newest = max((head.tokens for head in self.heads(index).values()), default=-1)
        if newest <= applier.ledger.state.tokens and applier.trusted:
            return False
        await self.download(applier)
        return True

    async def download(self, applier: Applier) -> None:
        """Download the head with most tokens and move over to it, keeping the drift. Raises StateError."""
        shape = Shape(applier.fragment, applier.layout.numel, len(applier.ledger.state.buffers))
        found = await self.fetch(shape, better_than=applier.ledger.state if applier.trusted else None)
        if found is not None:
            state, donors = found
            head = Head(version=state.version, digest=state.digest, tokens=state.tokens)
            adopted = False
            while not adopted:  # a round may end meanwhile
                adopted = await applier.adopt(state, await self._fates(applier, head, donors))
            statuses = self._context.directory.alive().values()
            if all(status.head(state.fragment) is None for status in statuses):
                self._context.emit(Warning(
                    f"fragment {state.fragment}: nobody here holds it; went on from a spare copy of version"
                    f" {state.version}, {state.tokens} tokens"
                ))

    async def _fates(self, applier: Applier, head: Head, donors: list[str]) -> Fates:
        """Raises StateError, for `FATES_S` at most."""
        now = asyncio.get_running_loop().time()
        first, last = self._untold.get(applier.fragment, (now, now))
        first = first if now - last < FATES_S else now  # that was another time
        try:
            return await fates_in(
                self._context, applier, head, donors=donors, patient=now - first < FATES_S
            )
        except StateError:
            self._untold[applier.fragment] = first, asyncio.get_running_loop().time()
            raise

    async def fetch(
        self, shape: Shape, *, better_than: Ranked | None
    ) -> tuple[GlobalState, list[str]] | None:
        """The head with most tokens, and who knows it. None: it is no better than what is here. Raises StateError."""
        problem: StateError | None = None
        for _ in range(TRIES):
            head, donors = await self._choose(shape)
            if better_than is not None and not outranks(head.tokens, head.digest, better_than):
                return None
            wanted = Wanted(shape.fragment, head.digest, shape.numel, shape.num_buffers)
            try:
                return await download(
                    self._context.endpoint, wanted, donors, maddrs=self._context.directory.maddrs,
                    on_progress=self.on_progress,
                ), donors
            except StateError as error:  # the round moved on while downloading: take a newer one
                log.info("download of fragment %d: %s", shape.fragment, error)
                problem = error
                await asyncio.sleep(0.5)
        assert problem is not None
        raise problem

    def heads(self, index: int) -> dict[str, Head]:
        """Of those who hold the fragment; and of spare copies that are newer than what any of them has: its holders
        have died, or have come after them."""
        statuses = self._context.directory.alive()
        held = {peer_id: head for peer_id, status in statuses.items() if (head := status.head(index)) is not None}
        newest = max((head.tokens for head in held.values()), default=-1)
        spares = {peer_id: head for peer_id, status in statuses.items() if (head := status.spare(index)) is not None}
        return held | {peer_id: head for peer_id, head in spares.items() if head.tokens > newest}

    async def _choose(self, shape: Shape) -> tuple[Head, list[str]]:
        """A head that two peers attest, of the peer with most tokens, and who knows it. Raises StateError."""
        index = shape.fragment
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ATTEST_S
        while True:
            heads = self.heads(index)
            if not heads:
                raise StateError(
                    f"nobody here holds fragment {index}, or a spare copy of it",
                    do="wait for another peer to come back",
                )
            source = min(heads, key=lambda peer_id: (-heads[peer_id].tokens, heads[peer_id].digest))
            endpoint, directory = self._context.endpoint, self._context.directory
            try:
                head = await newest_head(
                    endpoint, index, source, numel=shape.numel, num_buffers=shape.num_buffers,
                    maddrs=directory.maddrs,
                )
            except NetworkError as error:
                if loop.time() > deadline:
                    raise StateError(f"fragment {index}: nobody gives its newest version", why=str(error)) from None
                await asyncio.sleep(AGAIN_S)
                continue
            others = [peer_id for peer_id in heads if peer_id != source]
            knowing = [source]
            for _ in range(2):  # the others may be just about to apply it
                knowing = [source, *await who_knows(endpoint, directory, others, fragment=index, head=head)]
                if len(knowing) >= min(2, len(heads)):
                    self.attested_by_one = self.attested_by_one or len(knowing) == 1
                    return head, knowing
                await asyncio.sleep(AGAIN_S)
            if loop.time() > deadline:
                self._context.emit(Warning(
                    f"fragment {index}: only one peer knows version {head.version}; took it, nobody has more"
                ))
                return head, knowing
