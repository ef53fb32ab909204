"""Taking over the swarm's state: which head to believe, and downloading it.

Which one that is: attestation.py. The donor of the most tokens is asked for its newest head, since statuses are old.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

from swarm.averaging.apply import Applier
from swarm.averaging.attestation import ATTEST_S, who_knows
from swarm.averaging.context import Context
from swarm.averaging.download import Wanted, download, newest_head
from swarm.averaging.global_state import outranks
from swarm.averaging.messages import Commit
from swarm.averaging.results import COMMITS_AT_ONCE
from swarm.errors import NetworkError, StateError
from swarm.events import Warning
from swarm.network.records import Head

TRIES = 5
AGAIN_S = 0.3

log = logging.getLogger(__name__)


class Synchroniser:
    def __init__(self, context: Context, appliers: Callable[[], Iterable[Applier]]) -> None:
        """`appliers`: of the fragments that this peer holds by now."""
        self._context, self._appliers = context, appliers
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        """bytes done and in all, of the fragment that is being downloaded"""
        self.attested_by_one = False
        """some state rests on the word of one peer, because there was no other to ask"""

    async def join(self) -> int:
        """Bring every fragment held to the swarm's newest head; returns the number of fragments that were downloaded.

        Raises StateError where a newer head exists and nobody can give it.
        """
        return sum(await asyncio.gather(*(self.bring_level(applier) for applier in self._appliers())))

    async def bring_level(self, applier: Applier) -> bool:
        """Download one fragment where others have more of it, or where our start is not the run's. False: there was no
        need. Raises StateError."""
        newest = max((head.tokens for head in self._heads(applier.fragment).values()), default=-1)
        if newest <= applier.ledger.state.tokens and applier.trusted:
            return False
        await self.download(applier)
        return True

    async def download(self, applier: Applier) -> None:
        """Download the head with most tokens and move over to it, keeping the drift. Raises StateError."""
        index = applier.fragment
        problem: StateError | None = None
        for _ in range(TRIES):
            head, donors = await self._choose(applier)
            if applier.trusted and not outranks(head.tokens, head.digest, applier.ledger.state):
                return
            layout, ledger = applier.layout, applier.ledger
            wanted = Wanted(index, head.digest, layout.numel, len(ledger.state.buffers))
            try:
                state = await download(
                    self._context.endpoint, wanted, donors, maddrs=self._context.directory.maddrs,
                    on_progress=self.on_progress,
                )
            except StateError as error:  # the round moved on while downloading: take a newer one
                log.info("download of fragment %d: %s", index, error)
                problem = error
                await asyncio.sleep(0.5)
                continue
            absorbed, lost = await self._fates(applier, donors, at=state.version)
            await applier.adopt(state, absorbed=absorbed, lost=lost)
            return
        assert problem is not None
        raise problem

    def _heads(self, index: int) -> dict[str, Head]:
        """Of those who hold the fragment."""
        heads = {peer_id: status.head(index) for peer_id, status in self._context.directory.alive().items()}
        return {peer_id: head for peer_id, head in heads.items() if head is not None}

    async def _choose(self, applier: Applier) -> tuple[Head, list[str]]:
        """A head that two peers attest, of the peer with most tokens, and who knows it. Raises StateError."""
        index = applier.fragment
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ATTEST_S
        while True:
            heads = self._heads(index)
            if not heads:
                raise StateError(f"nobody here holds fragment {index}", do="wait for another peer to come back")
            source = min(heads, key=lambda peer_id: (-heads[peer_id].tokens, heads[peer_id].digest))
            try:
                head = await self._newest_head(applier, source)
            except NetworkError as error:
                if loop.time() > deadline:
                    raise StateError(f"fragment {index}: nobody gives its newest version", why=str(error)) from None
                await asyncio.sleep(AGAIN_S)
                continue
            others = [peer_id for peer_id in heads if peer_id != source]
            knowing = [source]
            for _ in range(2):  # the others may be just about to apply it
                endpoint, directory = self._context.endpoint, self._context.directory
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

    async def _newest_head(self, applier: Applier, source: str) -> Head:
        return await newest_head(
            self._context.endpoint, applier.fragment, source, numel=applier.layout.numel,
            num_buffers=len(applier.ledger.state.buffers), maddrs=self._context.directory.maddrs,
        )

    async def _fates(self, applier: Applier, donors: list[str], *, at: int) -> tuple[list[str], list[str]]:
        """Of own openings: (those of unknown fate that are in the downloaded history, those that were in ours and are
        not in it). `at`: its version; ours may be ahead in rounds and yet behind in tokens. Versions that no donor has
        commits of any more are taken to be common to both."""
        me = self._context.keypair.peer_id
        outstanding, recent = applier.ledger.outstanding(), applier.ledger.recent()
        theirs: dict[int, Commit] = {}
        for version in sorted({*outstanding.values(), *recent.values()}, reverse=True):
            for donor in donors:
                for since in (max(0, version - COMMITS_AT_ONCE), version - 1):  # many at once, or what there is
                    if version not in theirs:
                        with contextlib.suppress(NetworkError):
                            commits = await applier.commits_of(donor, since=since)
                            theirs |= {commit.opening.version: commit for commit in commits}
            if version not in theirs and version <= applier.ledger.state.version:
                break  # nobody keeps what is older either

        def has(opening_id: str, version: int) -> bool:
            commit = theirs.get(version)
            return commit is not None and commit.opening.id == opening_id and commit.includes(me)

        absorbed = [opening_id for opening_id, version in outstanding.items() if has(opening_id, version)]
        lost = [
            opening_id for opening_id, version in recent.items()
            if version > at or (version in theirs and not has(opening_id, version))
        ]
        return absorbed, lost
