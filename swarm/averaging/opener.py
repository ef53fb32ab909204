"""Who opens a round leads it: invites, waits for the owners' results, signs the commit (the protocol: round.py).

It is the only one that decides who is in a round, and it decides by who answers: contributions that not every owner has
are left out, owners that are gone get no part in the next attempt. Nothing of what it does changes anybody's books but
the commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque

from swarm.averaging import plan
from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.layout import Layout
from swarm.averaging.member import BUSY, Member
from swarm.averaging.messages import (
    Commit,
    Contributor,
    Invitation,
    Opening,
    Part,
    PartResult,
    make_commit,
    result_message,
)
from swarm.averaging.part import Contributors, contributors_of
from swarm.errors import BadMessage, NetworkError, PeerRefused
from swarm.network import codec, records
from swarm.network.keys import verify

ATTEMPTS = 3
REDUCTIONS = 3
"""times that the owners are asked for a result without those who are missing"""
ANSWER_S = 2.0
"""an opening is answered as soon as the contribution is taken: whoever is silent for much longer than all of late, and
for this long, is left out; what it has learnt goes into the next round"""
LOOK_S = 0.25
"""while waiting for results: whether their owners are still there"""
TELL_S = 10.0
MAX_MADDRS = 2
"""of each member, sent along with an opening"""

log = logging.getLogger(__name__)


class Opener:
    """Of one fragment at one peer. `member`: the same peer's part in the rounds that it opens."""

    def __init__(self, context: Context, applier: Applier, member: Member) -> None:
        self._context, self._applier, self._member = context, applier, member
        self._fragment, self._me = applier.fragment, context.keypair.peer_id
        self._layout: Layout = applier.layout
        self._bits = context.run.averaging.bits
        self._silent: set[str] = set()
        """invited to the round that is being opened, and did not answer"""
        self.elsewhere: list[str] = []
        """invited peers that turned out to be at another version: the opener must first see what they have"""
        self._at_least = 0
        self._push_s: deque[float] = deque(maxlen=16)
        self._answer_s: deque[float] = deque(maxlen=16)
        """until all members had answered an opening, in recent rounds"""
        self._attempting: tuple[str, asyncio.Task[tuple[Commit | None, set[str]]]] | None = None
        self._results: dict[int, dict[Contributors, PartResult]] = {}
        """of the opening that is being attempted: part -> what its owner has made"""
        self._result_came = asyncio.Event()

    async def open(self, members: list[str], owners: list[str], *, at_least: int = 0) -> Commit | None:
        """Open the round to the next version with these other members. Returns the commit, or None where it came to
        nothing; the drift of everyone is then as it was. `at_least`: tokens, with fewer it is too early."""
        self._at_least = at_least
        self._silent.clear()
        self.elsewhere.clear()
        for _ in range(ATTEMPTS):
            opening = self._make_opening(members, owners)
            self._results.clear()
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
                self._spawn_tell(peer_id, "abort", {"fragment": self._fragment, "id": opening.id})
            self._member.abort(opening.id, by=opening.opener)
            if not failed or self.elsewhere:
                return None
            names = ", ".join(peer_id[-6:] for peer_id in failed)
            log.info("fragment %d: trying again with nothing owned by %s", self._fragment, names)
            # who failed owns nothing now, but while it lives it is invited: it may have moved on, and then says so
            gone = failed - set(self._context.directory.alive())
            members = [peer_id for peer_id in members if peer_id not in gone]
            owners = [peer_id for peer_id in owners if peer_id not in failed]
        return None

    def give_way(self, opening_id: str) -> None:
        """Another opening than our own is the one that counts now."""
        if self._attempting is not None and self._attempting[0] != opening_id:
            self._attempting[1].cancel()

    def _make_opening(self, members: list[str], owners: list[str]) -> Opening:
        state = self._applier.ledger.state
        everyone = [self._me, *members]
        parts = [
            Part(start=start, end=end, owner=everyone.index(owner))
            for start, end, owner in plan.split(self._layout.num_blocks, owners or [self._me])
        ]
        size = codec.encoded_bytes(
            self._layout.num_fine_blocks, self._layout.num_blocks - self._layout.num_fine_blocks, self._bits
        )
        return Opening(
            fragment=self._fragment, version=state.version + 1, base=state.digest, members=everyone, parts=parts,
            nonce=self._context.nonce(), push_s=plan.deadline_s(list(self._push_s), bytes_each=size if members else 0),
        )

    async def _attempt(self, opening: Opening) -> tuple[Commit | None, set[str]]:
        """(commit, peers to try again without). Neither: another opener was first, or there is nothing to add."""
        clock = asyncio.get_running_loop().time
        began = clock()
        owners = {opening.owner(part) for part in opening.parts}
        answers, failed = await self._invite(opening)
        silent = self._silent & set(self._context.directory.alive())
        if len(silent) >= len(set(opening.members) - silent):
            return None, set()  # half of the living do not answer: they may be making history among themselves
        contributors = contributors_of(answers)
        if _tokens(contributors) < self._at_least:
            return None, set()  # what others had to give was already given when they said so
        if not contributors or self.elsewhere or owners & failed:
            return None, failed  # an owner is gone: its part would be missing, so give it to another
        results = await self._results_of(opening, contributors) if not failed else None
        if results is None:
            results, contributors, lost = await self._reduce_without_the_missing(opening, contributors)
            failed |= lost
        if results is None or _tokens(contributors) < self._at_least:
            return None, failed
        self._push_s.append(clock() - began)
        named = [Contributor(member=member, tokens=tokens) for member, tokens in contributors]
        commit = make_commit(self._context.keypair, opening, named, results)
        for peer_id in opening.members[1:]:
            self._spawn_tell(peer_id, "commit", {"commit": commit.model_dump()})
        await self._applier.consider(commit, began_at=began)
        return commit, failed

    async def _invite(self, opening: Opening) -> tuple[dict[int, int], set[str]]:
        """(member -> tokens that it contributes, who failed). Ends early when an owner fails or another opener won."""
        began = asyncio.get_running_loop().time()
        known = len(self._answer_s) >= 3
        wait_s = opening.push_s + 2.0
        if known:
            wait_s = plan.deadline_s(list(self._answer_s), bytes_each=0, floor_s=ANSWER_S)
        owners = {opening.owner(part) for part in opening.parts}
        contacts = self._context.directory.contacts(opening.members, max_maddrs=MAX_MADDRS)
        invitation = Invitation(opening=opening, contacts=contacts).model_dump()
        tasks = {
            asyncio.ensure_future(
                self._member.take_part(opening) if peer_id == self._me
                else self._context.ask(peer_id, "open", invitation, deadline_s=wait_s)
            ): index
            for index, peer_id in enumerate(opening.members)
        }
        answers: dict[int, int] = {}
        failed: set[str] = set()
        try:
            pending = set(tasks)
            while pending and not failed & owners and not self.elsewhere:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    member = tasks[task]
                    peer_id = opening.members[member]
                    try:
                        answer = task.result()
                    except NetworkError as error:
                        if isinstance(error, PeerRefused) and BUSY in str(error):
                            return {}, set()
                        log.info("round of fragment %d: %s: %s", self._fragment, peer_id[-6:], error)
                        failed.add(peer_id)
                        if not isinstance(error, PeerRefused):
                            self._silent.add(peer_id)
                        continue
                    tokens = answer.get("tokens")
                    if answer.get("elsewhere") is True:
                        self.elsewhere.append(peer_id)
                    elif type(tokens) is int and 0 <= tokens <= self._applier.max_claim:  # True is an int
                        answers[member] = tokens
                    else:
                        failed.add(peer_id)
            if len(answers) == len(opening.members):
                self._answer_s.append(asyncio.get_running_loop().time() - began)
            return answers, failed
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _results_of(self, opening: Opening, contributors: Contributors) -> list[PartResult] | None:
        """What the owners make of all contributions without being asked; None where one of them, or somebody who has
        something to contribute, is gone or takes too long."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + opening.push_s
        owners = {opening.owner(part) for part in opening.parts}
        others = (owners | {opening.members[member] for member, _ in contributors}) - {self._me}
        while loop.time() < deadline:
            self._result_came.clear()
            made = [self._results.get(index, {}).get(contributors) for index in range(len(opening.parts))]
            results = [result for result in made if result is not None]
            if len(results) == len(made):
                return results
            if not all(self._context.endpoint.is_linked(peer_id) for peer_id in others):
                return None
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._result_came.wait(), LOOK_S)
        return None

    async def _reduce_without_the_missing(
        self, opening: Opening, contributors: Contributors
    ) -> tuple[list[PartResult] | None, Contributors, set[str]]:
        """(results, whose contributions are in them, owners that failed)."""
        failed: set[str] = set()
        for _ in range(REDUCTIONS):
            answers = await asyncio.gather(
                *(self._reduce_at(opening, index, contributors) for index in range(len(opening.parts))),
                return_exceptions=True,
            )
            missing: set[int] = set()
            results: list[PartResult] = []
            for part, answer in zip(opening.parts, answers, strict=True):
                if isinstance(answer, PartResult):
                    results.append(answer)
                elif isinstance(answer, NetworkError):
                    log.info("fragment %d: %s cannot reduce: %s", self._fragment, opening.owner(part)[-6:], answer)
                    failed.add(opening.owner(part))
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    missing |= answer
            if len(results) == len(opening.parts):
                return results, contributors, failed
            contributors = tuple(c for c in contributors if c[0] not in missing)
            if failed or not missing or not contributors:
                break
        return None, contributors, failed

    async def _reduce_at(self, opening: Opening, part: int, contributors: Contributors) -> PartResult | set[int]:
        """The owner's result, or the members of whom it has nothing."""
        owner = opening.owner(opening.parts[part])
        header = {
            "fragment": self._fragment, "id": opening.id, "part": part,
            "contributors": [{"member": member, "tokens": tokens} for member, tokens in contributors],
        }
        if owner == self._me:
            answer = await self._member.owner.reduce(header, asker=owner)
        else:
            answer = await self._context.ask(owner, "reduce", header, deadline_s=opening.push_s + 5.0)
        missing = answer.get("missing")
        if missing is None:
            result = records.parse(PartResult, answer)
            if not is_signed(opening, part, contributors, result):
                raise BadMessage("a result that its owner did not sign")
            return result
        if not isinstance(missing, list) or not all(type(member) is int for member in missing):
            raise BadMessage("a list of missing members that is none")
        return set(missing)

    def heard(self, opening: Opening, part: int, contributors: Contributors, result: PartResult) -> None:
        """An owner has made a result. One that it did not sign would spoil the commit: it counts as none."""
        attempting = self._attempting is not None and self._attempting[0] == opening.id
        if attempting and is_signed(opening, part, contributors, result):
            self._results.setdefault(part, {})[contributors] = result
            self._result_came.set()

    def _spawn_tell(self, peer_id: str, method: str, header: dict[str, object]) -> None:
        async def tell() -> None:
            with contextlib.suppress(NetworkError):  # whoever misses a commit sees the new head in a status and asks
                await self._context.tell(peer_id, method, header, b"", TELL_S)

        self._context.spawn(tell())


def _tokens(contributors: Contributors) -> int:
    return sum(tokens for _, tokens in contributors)


def is_signed(opening: Opening, part: int, contributors: Contributors, result: PartResult) -> bool:
    """Did the owner of this part sign for this result of these contributors?"""
    named = [Contributor(member=member, tokens=tokens) for member, tokens in contributors]
    message = result_message(opening.id, part, named, result.hash)
    return verify(opening.owner(opening.parts[part]), message, bytes.fromhex(result.signature))
