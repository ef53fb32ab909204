"""The owner of parts: gathers contributions, adds them up, quantises once, and hands the results to every member.

It does not wait to be told: as soon as all members of an opening have spoken of a part (with values, or to say that
they have none), its result is made, signed for the opener and pushed to all, so that it is there before the commit that
names it (two legs of the network saved), and while contributions to the next part still arrive. Where somebody stays
silent, the opener asks for a result without it: `reduce`. How far each contributor is believed is trust.py's to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from swarm.averaging import roll
from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.messages import Commit, Contributor, Opening, Part, PartResult, result_message
from swarm.averaging.packed import Packed
from swarm.averaging.reduction import reduce_part
from swarm.averaging.robust import Verdict
from swarm.averaging.trust import Trust
from swarm.errors import BadMessage, NetworkError, PeerRefused
from swarm.network import codec, records
from swarm.network.codec import BLOCK

OPENING_KNOWN_S = 5.0
KEPT_OPENINGS = 8

Contributors = tuple[tuple[int, int], ...]
"""(member, tokens) of each contributor, by member"""


def contributors_of(answers: dict[int, int]) -> Contributors:
    """`answers`: member -> tokens. Who has none is no contributor."""
    return tuple((member, tokens) for member, tokens in sorted(answers.items()) if tokens > 0)


@dataclass
class _Gathered:
    """One opening at one member: the contributions to the parts that it owns, if it owns any."""

    opening: Opening
    received: dict[int, dict[int, tuple[int, torch.Tensor]]] = field(default_factory=dict)
    """part -> member -> (tokens, decoded values); no tokens: it has nothing to contribute"""
    results: dict[tuple[int, Contributors], tuple[PartResult, Packed | None]] = field(default_factory=dict)
    """(part, whose contributions) -> (result, the feedback that it leaves)"""
    reducing: asyncio.Lock = field(default_factory=asyncio.Lock)


class PartOwner:
    """Of one fragment at one peer, whichever parts it owns in whichever opening."""

    def __init__(
        self, context: Context, applier: Applier, *, is_current: Callable[[str], bool],
        on_result: Callable[[Opening, int, Contributors, PartResult], None],
        send: Callable[[str, str, dict[str, Any], bytes, float], Awaitable[None]],
    ) -> None:
        """`is_current`: is an opening the one that this peer takes part in; `on_result` hears of results made here;
        `send(peer_id, method, header, body, deadline_s)` tells another peer."""
        self._context, self._applier, self._layout = context, applier, applier.layout
        self._bits = context.run.averaging.bits
        self._is_current, self._on_result, self._send = is_current, on_result, send
        self._gathered: dict[str, _Gathered] = {}
        self._changed = asyncio.Condition()
        self._feedback: dict[tuple[int, int], Packed | None] = {}
        self._trust = Trust(context.run.averaging, fragment=applier.fragment, emit=context.emit)

    async def expect(self, opening: Opening) -> None:
        """This peer takes part in `opening`; only from now on does it take contributions to it."""
        if opening.id not in self._gathered:
            while len(self._gathered) >= KEPT_OPENINGS:
                del self._gathered[next(iter(self._gathered))]
            self._gathered[opening.id] = _Gathered(opening)
        async with self._changed:
            self._changed.notify_all()

    def opening(self, opening_id: object) -> Opening | None:
        gathered = self._gathered.get(str(opening_id))
        return gathered.opening if gathered is not None else None

    # -- contributions ----------------------------------------------------------------------------------------------

    async def push(self, header: dict[str, Any], data: bytes, *, sender: str) -> None:
        """A member's contribution to one of my parts. Raises NetworkError where it is none; the sender is not told, the
        opener sees that it is missing."""
        opening_id, tokens = header.get("id"), header.get("tokens")
        if not isinstance(opening_id, str) or type(tokens) is not int or not 0 <= tokens <= self._applier.max_claim:
            raise BadMessage("a push without id, or with an impossible number of tokens")
        # a member may hear of the opening before we do
        if not await self._comes_to(lambda: opening_id in self._gathered, OPENING_KNOWN_S):
            raise PeerRefused("this peer does not know that opening")
        await self.keep(opening_id, header.get("part"), sender, tokens, data)

    async def keep(self, opening_id: str, index: object, sender: str, tokens: int, data: bytes) -> None:
        gathered = self._gathered.get(opening_id)
        if gathered is None:
            raise PeerRefused("that opening is over")
        opening = gathered.opening
        part_index, part = self._my_part(opening, index)
        received = gathered.received.setdefault(part_index, {})
        if sender not in opening.members or opening.members.index(sender) in received:
            raise PeerRefused("not a member of that opening, or a second push")
        values = torch.zeros(0)
        if tokens:
            num_blocks, fine = part.end - part.start, self._layout.fine_in(part.start, part.end)
            values = await self._context.compute(
                lambda: codec.decode(data, num_blocks, fine, self._bits), num_values=num_blocks * BLOCK
            )
        received[opening.members.index(sender)] = (tokens, values)
        async with self._changed:
            self._changed.notify_all()
        if len(received) == len(opening.members):
            everybody = contributors_of({member: count for member, (count, _) in received.items()})
            if everybody and self._is_current(opening_id):
                await self._reduce(gathered, part_index, everybody)

    # -- results ----------------------------------------------------------------------------------------------------

    async def reduce(self, header: dict[str, Any], *, asker: str) -> dict[str, Any]:
        """The opener wants a part's result of just these contributors: {"hash", "signature"}, or {"missing": members}
        of whom nothing has come within the opening's `push_s`."""
        gathered = self._gathered.get(str(header.get("id")))
        if gathered is None or asker != gathered.opening.opener:
            raise PeerRefused("this peer does not know that opening, or the asker did not open it")
        opening, raw = gathered.opening, header.get("contributors")
        index, _ = self._my_part(opening, header.get("part"))
        if not isinstance(raw, list) or not 0 < len(raw) <= len(opening.members):
            raise BadMessage("a reduction without contributors")
        parsed = [records.parse(Contributor, item) for item in raw]
        wanted = contributors_of({c.member: c.tokens for c in parsed if c.member < len(opening.members)})

        def missing() -> list[int]:
            received = gathered.received.get(index, {})
            return [member for member, tokens in wanted if received.get(member, (-1,))[0] != tokens]

        if not await self._comes_to(lambda: not missing(), opening.push_s):
            return {"missing": missing()}
        if not self._is_current(opening.id):
            raise PeerRefused("busy with another round")
        return (await self._reduce(gathered, index, wanted)).model_dump()

    async def _reduce(self, gathered: _Gathered, index: int, contributors: Contributors) -> PartResult:
        async with gathered.reducing:
            if (index, contributors) in gathered.results:
                return gathered.results[index, contributors][0]
            opening = gathered.opening
            _, part = self._my_part(opening, index)
            span, num_values = (part.start, part.end), (part.end - part.start) * BLOCK
            before = self._feedback.get(span)
            values = {opening.members[member]: gathered.received[index][member][1] for member, _ in contributors}
            claimed = {opening.members[member]: count for member, count in contributors}
            tokens = self._trust.believed(claimed, version=opening.version)
            warm = roll.warmth(self._applier.ledger.state.roll, tokens, self._context.run)

            def compute() -> tuple[bytes, Packed | None, Verdict]:
                feedback = torch.zeros(num_values) if before is None else before.read()
                fine, verdict = self._layout.fine_in(*span), self._trust.judge(values, tokens, warm)
                data, left = reduce_part(values, tokens, feedback, num_fine=fine, bits=self._bits, verdict=verdict)
                return data, Packed.of(left) if self._bits < 32 else None, verdict

            data, left, verdict = await self._context.compute(compute, num_values=num_values * len(values))
            self._trust.say(verdict)
            result_hash = self._context.results.put(data)
            named = [Contributor(member=member, tokens=count) for member, count in contributors]
            message = result_message(opening.id, index, named, result_hash)
            result = PartResult(hash=result_hash, signature=self._context.keypair.sign(message).hex())
            gathered.results[index, contributors] = (result, left)
        self._on_result(opening, index, contributors, result)
        header = {
            "fragment": self._applier.fragment, "id": opening.id, "part": index,
            "contributors": [c.model_dump() for c in named], **result.model_dump(),
        }
        for peer_id in opening.members:
            if peer_id != self._context.keypair.peer_id:
                self._context.spawn(self._hand_over(peer_id, header, data, opening.push_s))
        return result

    async def _hand_over(self, peer_id: str, header: dict[str, Any], data: bytes, deadline_s: float) -> None:
        try:
            await self._send(peer_id, "reduced", header, data, deadline_s)
        except NetworkError:
            return  # it fetches the bytes by their hash once it hears of the commit

    def settled(self, commit: Commit) -> None:
        """A commit was applied: charge the feedback of my parts in it, drop all openings of its version."""
        self._trust.settled(commit)
        gathered = self._gathered.get(commit.opening.id)
        if gathered is not None:
            contributors = contributors_of({c.member: c.tokens for c in commit.contributors})
            left = {
                (part.start, part.end): gathered.results[index, contributors][1]
                for index, part in enumerate(commit.opening.parts) if (index, contributors) in gathered.results
            }
            self._feedback = left or self._feedback
        self._gathered = {
            key: other for key, other in self._gathered.items() if other.opening.version > commit.opening.version
        }

    async def _comes_to(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Wait until something that has come makes it true. False: it did not in time."""
        async def waiting() -> None:  # a task of its own has the lock and gives it back, however often it is cancelled
            async with self._changed:
                await self._changed.wait_for(condition)

        try:
            await asyncio.wait_for(waiting(), limit_s)
        except asyncio.TimeoutError:
            return False
        return True

    def _my_part(self, opening: Opening, index: object) -> tuple[int, Part]:
        if type(index) is int and 0 <= index < len(opening.parts):  # True is an int
            part = opening.parts[index]
            if opening.owner(part) == self._context.keypair.peer_id:
                return index, part
        raise PeerRefused("this peer does not own that part of that opening")
