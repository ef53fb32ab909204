"""A member of a round: what it sends, in which order and how often; which of two openers gets it; what it believes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest
import torch

from swarm.averaging import member, plan
from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.global_state import initial_state
from swarm.averaging.layout import Layout
from swarm.averaging.ledger import Drift, Ledger
from swarm.averaging.member import Member
from swarm.averaging.messages import (
    Commit,
    Contributor,
    Opening,
    Part,
    PartResult,
    result_message,
)
from swarm.averaging.part import Contributors
from swarm.config import RunConfig
from swarm.errors import BadMessage, NetworkError, PeerGone, PeerRefused
from swarm.network import codec
from swarm.network.codec import BLOCK
from swarm.network.keys import Keypair
from swarm.train.boundary import Boundary

Story = Callable[["World"], Coroutine[Any, Any, None]]
BITS = 4


class World:
    """The first of three members, in rounds that the second one opens. Stands in for its endpoint and directory."""

    def __init__(self, run: RunConfig, layout: Layout, keys: list[Keypair]) -> None:
        self.layout, self.keys = layout, keys[:3]
        self.ids = [key.peer_id for key in self.keys]
        weights = torch.zeros(layout.numel)
        self.parameters = {name: torch.nn.Parameter(values.clone()) for name, values in layout.views(weights)}
        self.ledger = Ledger(initial_state(0, weights, 1), Drift(layout, self.parameters))
        self.context = Context(run, keys[0], self, self, Boundary(), lambda event: None)  # type: ignore[arg-type]
        self.applier = Applier(self.context, fragment=0, layout=layout, ledger=self.ledger)
        self.member = Member(self.context, self.applier)
        self.openings: list[str] = []
        self.results: list[tuple[int, Contributors, PartResult]] = []
        self.member.on_opening = self.openings.append
        self.member.on_result = lambda opening, index, contributors, result: self.results.append(
            (index, contributors, result)
        )
        self.sent: list[tuple[str, int, int, bytes]] = []
        self.linked, self.failures = True, list[NetworkError]()

    def maddrs(self, peer_id: str) -> list[str]:
        return []

    def is_linked(self, peer_id: str) -> bool:
        return self.linked

    async def notify(
        self, peer_id: str, method: str, header: dict[str, Any], body: bytes, *, deadline_s: float,
        maddrs: Iterable[str],
    ) -> None:
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop(0)
        assert method == "push" and header["fragment"] == 0
        self.sent.append((peer_id, header["part"], header["tokens"], body))

    def learn(self, value: float, tokens: int) -> None:
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.sub_(value)
        self.ledger.trained(tokens)

    def opening(self, *, opener: int = 1, owners: tuple[int, ...] = (1, 2), nonce: int = 0, **more: Any) -> Opening:
        """Parts of one block each, as far as there are blocks; `owners`: numbers of peers, as many as parts."""
        order = [opener, *(number for number in range(3) if number != opener)]
        edges = [*range(len(owners)), self.layout.num_blocks]
        parts = [
            Part(start=edges[i], end=edges[i + 1], owner=order.index(owner)) for i, owner in enumerate(owners)
        ]
        fields: dict[str, Any] = {
            "fragment": 0, "version": 1, "base": self.ledger.state.digest, "push_s": 0.5, "nonce": f"{nonce:016x}",
            "members": [self.ids[number] for number in order], "parts": parts,
        }
        return Opening(**fields | more)

    async def all_sent(self, count: int) -> None:
        for _ in range(200):
            if len(self.sent) >= count:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{len(self.sent)} of {count} parts were sent")

    def decoded(self, opening: Opening, index: int, data: bytes) -> torch.Tensor:
        part = opening.parts[index]
        return codec.decode(data, part.end - part.start, self.layout.fine_in(part.start, part.end), BITS)

    def result(
        self, opening: Opening, index: int, *, value: float = 0.5, owner: int = 1, tokens: int = 100
    ) -> tuple[dict[str, Any], bytes]:
        """(header, body) as that owner would send them."""
        part = opening.parts[index]
        fine = self.layout.fine_in(part.start, part.end)
        data = codec.encode(torch.full(((part.end - part.start) * BLOCK,), value), fine, BITS)
        named = [Contributor(member=opening.members.index(self.ids[0]), tokens=tokens)]
        digest = hashlib.sha256(data).hexdigest()
        signature = self.keys[owner].sign(result_message(opening.id, index, named, digest)).hex()
        header = {
            "id": opening.id, "part": index, "contributors": [one.model_dump() for one in named],
            "hash": digest, "signature": signature,
        }
        return header, data


@pytest.fixture
def play(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Story], None]:
    monkeypatch.setattr(member, "RETRY_S", 0.01)

    def run(story: Story) -> None:
        async def told() -> None:
            await story(World(make_run(bits=BITS, tokens_per_round=1000), layout, keys))

        asyncio.run(asyncio.wait_for(told(), 30))

    return run


# ---- contributing ----


def test_what_it_has_learnt_goes_to_the_owners_in_parts(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.learn(0.25, tokens=100)
        opening = world.opening()
        assert await world.member.take_part(opening) == {"tokens": 100}
        await world.all_sent(2)
        assert [(peer_id, index, tokens) for peer_id, index, tokens, _ in world.sent] == [
            (world.ids[1], 0, 100), (world.ids[2], 1, 100)
        ]
        flat = torch.cat([world.decoded(opening, index, data) for _, index, _, data in world.sent])
        offered = world.layout.flatten({name: torch.full_like(p, 0.25) for name, p in world.parameters.items()})
        assert torch.allclose(flat, offered, atol=0.02)
        assert world.openings == [opening.id] and world.ledger.pending_tokens == 100, "no commit yet"

    play(story)


def test_each_owner_gets_its_first_part_before_anybody_gets_a_second(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.learn(0.25, tokens=100)
        opening = world.opening(owners=(1, 1, 2))
        await world.member.take_part(opening)
        await world.all_sent(3)
        assert [index for _, index, _, _ in world.sent] == [0, 2, 1]
        assert plan.waves([part.owner for part in opening.parts]) == [[0, 2], [1]]

    play(story)


def test_who_has_nothing_says_so_to_every_owner(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        assert await world.member.take_part(world.opening()) == {"tokens": 0}
        await world.all_sent(2)
        assert [(tokens, body) for _, _, tokens, body in world.sent] == [(0, b"")] * 2

    play(story)


def test_a_part_of_its_own_is_not_sent(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.learn(0.25, tokens=100)
        opening = world.opening(owners=(0, 2))
        await world.member.take_part(opening)
        await world.all_sent(1)
        await asyncio.sleep(0.02)
        assert [index for _, index, _, _ in world.sent] == [1]
        me = opening.members.index(world.ids[0])
        assert world.member.owner._gathered[opening.id].received[0][me][0] == 100

    play(story)


def test_a_link_that_ends_costs_a_moment_and_not_the_round(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.learn(0.25, tokens=100)
        world.failures = [PeerGone("the link ended") for _ in range(5)]
        await world.member.take_part(world.opening())
        await world.all_sent(2)
        assert sorted(index for _, index, _, _ in world.sent) == [0, 1]

    play(story)


def test_it_is_not_sent_again_where_the_other_side_refuses_it(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.learn(0.25, tokens=100)
        world.failures = [PeerRefused("a second push")]
        await world.member.take_part(world.opening())
        await world.all_sent(1)
        await asyncio.sleep(0.05)
        assert len(world.sent) == 1

    play(story)


def test_nothing_is_sent_for_a_round_that_is_over(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.learn(0.25, tokens=100)
        world.failures = [PeerGone("cut off") for _ in range(1000)]
        opening = world.opening()
        await world.member.take_part(opening)
        await asyncio.sleep(0.03)
        world.member.abort(opening.id, by=world.ids[1])
        await asyncio.sleep(0.02)
        world.failures.clear()
        await asyncio.sleep(0.05)
        assert not world.sent

    play(story)


def test_values_that_are_not_finite_are_no_contribution(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.learn(float("nan"), tokens=100)
        with pytest.raises(PeerRefused, match="finite"):
            await world.member.take_part(world.opening())
        assert world.ledger.pending_tokens == 100

    play(story)


# ---- one round at a time ----


def test_the_better_ranked_of_two_openers_gets_it(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        better, worse = plan.rank(world.ids[1:], fragment=0, version=1)
        one, two = (world.opening(opener=world.ids.index(peer_id)) for peer_id in (better, worse))
        assert world.member.refuse_reason(two) is None, "it is in no round yet"
        await world.member.take_part(two)
        assert world.member.in_round() and world.member.refuse_reason(one) is None
        await world.member.take_part(one)
        assert member.BUSY in str(world.member.refuse_reason(two))
        assert world.member.refuse_reason(one) is None, "asked once more, it takes part once more"

    play(story)


@pytest.mark.parametrize("change", [{"version": 2}, {"version": 5}, {"base": "f" * 64}])
def test_a_round_on_another_version_is_refused(play: Callable[[Story], None], change: dict[str, Any]) -> None:
    async def story(world: World) -> None:
        assert "at version 0" in str(world.member.refuse_reason(world.opening(**change)))

    play(story)


@pytest.mark.parametrize("at_once", [False, True])
def test_an_opening_that_comes_twice_is_contributed_to_once(play: Callable[[Story], None], at_once: bool) -> None:
    """Found by scripts/faults.py: a second contribution took the place of the first one, whose bytes the owners had.
    The commit then took more off the drift than was in it."""
    async def story(world: World) -> None:
        opening = world.opening()
        world.learn(0.1, 100)
        first = asyncio.create_task(world.member.take_part(opening))
        if not at_once:
            assert await first == {"tokens": 100}
        world.learn(0.1, 50)
        again = await world.member.take_part(opening)
        assert again == await first, "the same answer, however late"
        await world.all_sent(2)
        await asyncio.sleep(0.02)
        assert len(world.sent) == 2 and {tokens for _, _, tokens, _ in world.sent} == {again["tokens"]}
        assert len(world.openings) == 1
        assert world.ledger._contributions[opening.id].tokens == again["tokens"]

    play(story)


def test_a_flood_of_openings_is_not_remembered_for_ever_and_stops_nobody(
    play: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "MAX_TAKEN", 3)

    async def story(world: World) -> None:
        world.learn(0.1, 100)
        for nonce in range(10):
            opening = world.opening(nonce=nonce)
            assert await world.member.take_part(opening) == {"tokens": 100}
        assert len(world.member._taken) == 3 and opening.id in world.member._taken

    play(story)


def test_who_asked_may_give_up_and_the_contribution_is_still_whole(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        opening = world.opening()
        world.learn(0.1, 100)
        asked = asyncio.create_task(world.member.take_part(opening))
        await asyncio.sleep(0)
        asked.cancel()
        await world.all_sent(2)
        assert world.ledger._contributions[opening.id].recall is not None
        assert await world.member.take_part(opening) == {"tokens": 100}

    play(story)


def test_the_end_of_an_opening_may_come_before_its_beginning(play: Callable[[Story], None]) -> None:
    """Found by scripts/faults.py: a peer sat in a round that was over until its time was, and refused others."""
    async def story(world: World) -> None:
        opening = world.opening()
        world.learn(0.1, 100)
        world.member.abort(opening.id, by=world.ids[2])
        world.member.abort(["nonsense"], by=world.ids[1])
        world.member.abort("f" * 100_000, by=world.ids[1])
        assert len(world.member._over) == 1, "what others say is bounded"
        world.member.abort(opening.id, by=world.ids[1])
        with pytest.raises(PeerRefused, match="over"):
            await world.member.take_part(opening)
        assert not world.member.in_round() and not world.openings and world.ledger.pending_tokens == 100
        other = world.opening(nonce=1)
        world.member.abort(other.id, by=world.ids[2])
        assert await world.member.take_part(other) == {"tokens": 100}, "only its opener can end it"
        for _ in range(40):
            world.member.abort("e" * 64, by=world.ids[1])
        assert len(world.member._over) == member.KEPT_OVER

    play(story)


def test_openings_of_versions_that_are_over_are_forgotten(
    play: Callable[[Story], None], signed_commit: Callable[..., Commit]
) -> None:
    async def story(world: World) -> None:
        await world.member.take_part(world.opening())
        assert len(world.member._taken) == 1
        world.member.settled(signed_commit(version=1))
        assert not world.member._taken and not world.member.in_round()

    play(story)


def test_a_round_ends_with_its_opener_or_its_time(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        opening = world.opening(push_s=0.01)
        await world.member.take_part(opening)
        assert world.member.in_round()
        world.member.abort(opening.id, by=world.ids[2])
        world.member.abort("f" * 64, by=world.ids[1])
        assert world.member.in_round(), "somebody else cannot end it, nor another one"
        world.linked = False
        assert not world.member.in_round(), "its opener is gone"
        world.linked = True
        assert world.member._current is not None
        world.member._current.until = asyncio.get_running_loop().time()
        assert not world.member.in_round()
        world.member.abort(opening.id, by=world.ids[1])
        assert world.member._current is None

    play(story)


# ---- results ----


def test_a_result_is_kept_decoded_and_told(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.learn(0.25, tokens=100)
        opening = world.opening()
        await world.member.take_part(opening)
        for index, owner in enumerate((1, 2)):
            header, data = world.result(opening, index, owner=owner)
            world.member.reduced(header, data, sender=world.ids[owner])
            assert world.context.results.get(header["hash"]) == data
        assert [(index, contributors) for index, contributors, _ in world.results] == [
            (index, ((opening.members.index(world.ids[0]), 100),)) for index in (0, 1)
        ]
        await asyncio.sleep(0)
        values = [await world.applier._prepared[index][1] for index in (0, 1)]
        assert torch.allclose(torch.cat(values), torch.full((world.layout.numel,), 0.5), atol=1e-3)

    play(story)


def test_a_newer_result_of_a_part_takes_the_place_of_the_older(play: Callable[[Story], None]) -> None:
    """The owner makes a second one without somebody who has died; there is never more than one a part in memory."""
    async def story(world: World) -> None:
        opening = world.opening()
        await world.member.take_part(opening)
        for value in (0.5, 0.25, 0.125):
            header, data = world.result(opening, 0, value=value)
            world.member.reduced(header, data, sender=world.ids[1])
        assert list(world.applier._prepared) == [0]
        assert torch.allclose(await world.applier._prepared[0][1], torch.tensor(0.125), atol=1e-3)

    play(story)


def test_results_of_rounds_that_it_is_not_in_are_not_decoded(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        opening = world.opening()
        header, data = world.result(opening, 0)
        world.member.reduced(header, data, sender=world.ids[1])
        assert not world.results, "it has never heard of that opening"
        await world.member.take_part(opening)
        await world.member.take_part(world.opening(nonce=1))
        world.member.reduced(header, data, sender=world.ids[1])
        assert len(world.results) == 1 and not world.applier._prepared

    play(story)


def test_a_result_that_is_none_changes_nothing(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        opening = world.opening()
        await world.member.take_part(opening)
        header, data = world.result(opening, 0)
        many = header["contributors"] * 4
        changes = [
            {"part": None}, {"part": 2}, {"part": -1}, {"part": True}, {"contributors": None}, {"contributors": many},
            {"contributors": [{"member": 0}]}, {"hash": "0" * 64}, {"hash": None}, {"signature": "x"},
        ]
        for change in changes:
            with pytest.raises(BadMessage):
                world.member.reduced({**header, **change}, data, sender=world.ids[1])
        with pytest.raises(BadMessage, match="somebody else's part"):
            world.member.reduced(header, data, sender=world.ids[2])
        with pytest.raises(BadMessage, match="wrong size"):
            world.member.reduced(header, data[:-1], sender=world.ids[1])
        assert not world.results and not world.applier._prepared
        world.member.reduced(header, data, sender=world.ids[1])
        assert len(world.results) == 1

    play(story)
