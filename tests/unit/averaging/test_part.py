"""The owner of a part: makes a result unasked once all have spoken, a smaller one when asked, and nothing of
nonsense."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from swarm.averaging import part
from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.global_state import initial_state
from swarm.averaging.layout import Layout
from swarm.averaging.ledger import Drift, Ledger
from swarm.averaging.messages import Contributor, Opening, Part, PartResult, make_commit, result_message
from swarm.averaging.part import Contributors, PartOwner, contributors_of
from swarm.averaging.roll import LEAST_WARMTH, Entry
from swarm.averaging.trust import Trust
from swarm.config import RunConfig
from swarm.errors import BadMessage, NetworkError, PeerRefused
from swarm.events import Event
from swarm.network import codec
from swarm.network.codec import BLOCK
from swarm.network.keys import Keypair, verify
from swarm.train.boundary import Boundary

Story = Callable[["World"], Coroutine[Any, Any, None]]


class World:
    """Three members; the first one opens and owns the only part."""

    def __init__(self, run: RunConfig, layout: Layout, keys: list[Keypair], *, push_s: float = 0.3) -> None:
        self.run, self.layout, self.keys = run, layout, keys[:3]
        self.ids = [key.peer_id for key in self.keys]
        self.sent: list[tuple[str, dict[str, Any], bytes]] = []
        self.results: list[tuple[Contributors, PartResult]] = []
        self.current = True
        weights = torch.zeros(layout.numel)
        parameters = {name: torch.nn.Parameter(values.clone()) for name, values in layout.views(weights)}
        ledger = Ledger(initial_state(0, weights, 1), Drift(layout, parameters))
        nothing: Any = object()
        self.context = Context(run, keys[0], nothing, nothing, Boundary(), lambda event: None)
        applier = Applier(self.context, fragment=0, layout=layout, ledger=ledger)
        self.ledger = ledger
        self.owner = PartOwner(
            self.context, applier, is_current=lambda opening_id: self.current,
            on_result=lambda opening, index, contributors, result: self.results.append((contributors, result)),
            send=self._send,
        )
        self.opening = Opening(
            fragment=0, version=1, base=ledger.state.digest, members=self.ids, nonce="0" * 16, push_s=push_s,
            parts=[Part(start=0, end=layout.num_blocks, owner=0)],
        )

    async def _send(self, peer_id: str, method: str, header: dict[str, Any], body: bytes, deadline_s: float) -> None:
        assert method == "reduced"
        self.sent.append((peer_id, header, body))

    def encoded(self, number: int) -> bytes:
        values = torch.full((self.layout.numel,), float(number + 1))
        return codec.encode(values, self.layout.num_fine_blocks, self.run.averaging.bits)

    async def push(self, number: int, tokens: int = 100) -> None:
        header = {"id": self.opening.id, "part": 0, "tokens": tokens}
        await self.owner.push(header, self.encoded(number) if tokens else b"", sender=self.ids[number])

    async def reduce(self, tokens: dict[int, int], *, asker: int = 0) -> dict[str, Any]:
        contributors = [{"member": member, "tokens": count} for member, count in tokens.items()]
        header = {"id": self.opening.id, "part": 0, "contributors": contributors}
        return await self.owner.reduce(header, asker=self.ids[asker])

    def value_of(self, result: PartResult) -> float:
        data = self.context.results.get(result.hash)
        assert data is not None
        values = codec.decode(
            data, self.layout.num_blocks, self.layout.num_fine_blocks, self.run.averaging.bits
        )
        assert torch.allclose(values, values[0].expand_as(values), atol=1e-3)
        return float(values[0])


@pytest.fixture
def play(make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair]) -> Callable[[Story], None]:
    def run(story: Story) -> None:
        async def told() -> None:
            world = World(make_run(bits=8, tokens_per_round=1000), layout, keys)
            await world.owner.expect(world.opening)
            await story(world)

        asyncio.run(asyncio.wait_for(told(), 30))

    return run


def test_the_result_is_made_unasked_once_all_have_spoken(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        await world.push(0)
        await world.push(1)
        assert not world.results and not world.sent
        await world.push(2)
        await asyncio.sleep(0)
        [(contributors, result)] = world.results
        assert contributors == ((0, 100), (1, 100), (2, 100))
        assert world.value_of(result) == pytest.approx(2.0, abs=0.02)
        assert sorted(peer_id for peer_id, _, _ in world.sent) == sorted(world.ids[1:])
        for _, header, body in world.sent:
            assert header["hash"] == result.hash == hashlib.sha256(body).hexdigest()
        message = result_message(world.opening.id, 0, _named(contributors), result.hash)
        assert verify(world.ids[0], message, bytes.fromhex(result.signature))
        answer = await world.reduce({0: 100, 1: 100, 2: 100})
        assert PartResult(**answer) == result and len(world.results) == 1, "asked for the same, it says the same"

    play(story)


def _named(contributors: Contributors) -> list[Contributor]:
    return [Contributor(member=member, tokens=tokens) for member, tokens in contributors]


def test_who_has_nothing_speaks_too_and_is_no_contributor(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        await world.push(0, tokens=0)
        await world.push(1)
        await world.push(2, tokens=0)
        [(contributors, result)] = world.results
        assert contributors == ((1, 100),) and world.value_of(result) == pytest.approx(2.0, abs=0.02)

    play(story)


def test_a_newcomer_weighs_less_until_it_has_contributed_as_much(play: Callable[[Story], None]) -> None:
    """The third one holds 3 where the others hold 1 and 2, with as many tokens, and is new."""
    async def story(world: World) -> None:
        start, run = world.ledger.state, world.run
        warm_tokens = 40 * run.train.batch_sequences * run.train.sequence_length
        old = tuple(sorted((Entry(peer_id, 1, 100, warm_tokens) for peer_id in world.ids[:2]), key=lambda e: e.peer_id))
        world.ledger.state = dataclasses.replace(start, roll=old)
        for number in range(3):
            await world.push(number, tokens=1000)
        [(_, result)] = world.results
        cold = max(LEAST_WARMTH, 500 / warm_tokens)
        assert world.value_of(result) == pytest.approx((1 + 2 + 3 * cold) / (2 + cold), abs=0.02)
        world.ledger.state = start
        assert (await world.reduce({0: 1000, 1: 1000, 2: 1000}))["hash"] == result.hash, "made already: it stays"

    play(story)


def test_where_nobody_has_anything_nothing_is_made(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        for number in range(3):
            await world.push(number, tokens=0)
        assert not world.results and not world.sent

    play(story)


def test_asked_to_it_makes_a_result_without_the_silent(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        await world.push(0)
        await world.push(2)
        assert await world.reduce({0: 100, 1: 100, 2: 100}) == {"missing": [1]}
        answer = await world.reduce({0: 100, 2: 100})
        assert world.value_of(PartResult(**answer)) == pytest.approx(2.0, abs=0.02)
        await asyncio.sleep(0)
        assert sorted(peer_id for peer_id, _, _ in world.sent) == sorted(world.ids[1:]), "the silent one gets it too"

    play(story)


def test_it_waits_for_what_is_on_its_way(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        await world.push(0)
        asked = asyncio.create_task(world.reduce({0: 100, 1: 100}))
        await asyncio.sleep(0.05)
        assert not asked.done()
        await world.push(1)
        assert world.value_of(PartResult(**await asked)) == pytest.approx(1.5, abs=0.02)

    play(story)


@pytest.mark.parametrize("method", ["reduce", "push"])
def test_who_waits_may_be_cancelled_twice_and_nobody_else_waits_for_ever(
    play: Callable[[Story], None], method: str
) -> None:
    """Found by scripts/faults.py: cancelled again while it was taking the lock back, the lock was never given back, and
    the peer was in no round any more."""
    async def story(world: World) -> None:
        await world.push(0)
        header = {"id": "f" * 64, "part": 0, "tokens": 1}
        waits = world.reduce({0: 100, 1: 100}) if method == "reduce" else world.owner.push(header, b"", sender="x")
        waiting = asyncio.create_task(waits)
        await asyncio.sleep(0.01)
        async with world.owner._changed:  # so that the lock cannot be had at once
            for _ in range(3):
                waiting.cancel()
                await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(world.push(1), 5)
        await asyncio.wait_for(world.owner.expect(world.opening), 5)
        assert not world.owner._changed.locked()

    play(story)


def test_other_tokens_than_the_opener_heard_of_count_as_missing(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        await world.push(0, tokens=100)
        assert await world.reduce({0: 99}) == {"missing": [0]}

    play(story)


def test_an_owner_that_is_busy_with_a_better_opener_makes_nothing(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        world.current = False
        for number in range(3):
            await world.push(number)
        assert not world.results
        with pytest.raises(PeerRefused, match="busy"):
            await world.reduce({0: 100})

    play(story)


def test_nonsense_is_refused_and_changes_nothing(
    play: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "OPENING_KNOWN_S", 0.05)

    async def story(world: World) -> None:
        good = {"id": world.opening.id, "part": 0, "tokens": 100}
        bad = [{"id": 5}, {"tokens": True}, {"tokens": -1}, {"tokens": 10**9}]
        for header in [{}, *({**good, **change} for change in bad)]:
            with pytest.raises(BadMessage):
                await world.owner.push(header, world.encoded(1), sender=world.ids[1])
        with pytest.raises(PeerRefused, match="does not know"):
            await world.owner.push({**good, "id": "f" * 64}, world.encoded(1), sender=world.ids[1])
        for nobodys in (None, "0", True, -1, 1):
            with pytest.raises(PeerRefused, match="does not own"):
                await world.owner.push({**good, "part": nobodys}, world.encoded(1), sender=world.ids[1])
            with pytest.raises(PeerRefused, match="does not own"):
                await world.owner.reduce(
                    {**good, "part": nobodys, "contributors": [{"member": 1, "tokens": 100}]}, asker=world.ids[0]
                )
        with pytest.raises(PeerRefused, match="not a member"):
            await world.owner.push(good, world.encoded(1), sender="stranger")
        with pytest.raises(BadMessage, match="wrong size"):
            await world.owner.push(good, world.encoded(1)[:-1], sender=world.ids[1])
        await world.push(1)
        with pytest.raises(PeerRefused, match="second push"):
            await world.push(1)
        with pytest.raises(PeerRefused, match="did not open"):
            await world.reduce({1: 100}, asker=1)
        for raw in (None, [], [{}] * 4, [{"member": 0}], [{"member": 0, "tokens": 0}]):
            with pytest.raises(NetworkError):
                await world.owner.reduce({**good, "contributors": raw}, asker=world.ids[0])
        assert not world.results and not world.sent

    play(story)


def test_a_part_is_done_while_the_next_one_still_arrives(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair]
) -> None:
    """Two parts of one owner, with one result each; both of their feedbacks are charged by one commit."""
    cut = layout.num_blocks - 1

    async def told() -> None:
        world = World(make_run(bits=4, tokens_per_round=1000), layout, keys)
        parts = [Part(start=0, end=cut, owner=0), Part(start=cut, end=layout.num_blocks, owner=0)]
        opening = world.opening = Opening(**{**world.opening.model_dump(), "parts": parts})
        await world.owner.expect(opening)
        values = torch.linspace(0.5, 1.0, layout.numel)  # so that quantising loses something

        async def push(number: int, index: int) -> None:
            span = parts[index]
            fine = layout.fine_in(span.start, span.end)
            data = codec.encode(values[span.start * BLOCK:span.end * BLOCK], fine, 4)
            header = {"id": opening.id, "part": index, "tokens": 100}
            await world.owner.push(header, data, sender=world.ids[number])

        for number in range(3):
            await push(number, 0)
        assert len(world.results) == 1, "the first part waits for nothing"
        await asyncio.sleep(0)
        assert {header["part"] for _, header, _ in world.sent} == {0}
        for number in (2, 1):
            await push(number, 1)
        assert len(world.results) == 1
        await push(0, 1)
        assert [contributors for contributors, _ in world.results] == [((0, 100), (1, 100), (2, 100))] * 2
        named = _named(world.results[0][0])
        world.owner.settled(make_commit(world.keys[0], opening, named, [result for _, result in world.results]))
        assert sorted(world.owner._feedback) == [(0, cut), (cut, layout.num_blocks)]
        assert any(bool(left.read().any()) for left in world.owner._feedback.values())

    asyncio.run(asyncio.wait_for(told(), 30))


def test_only_so_many_openings_are_kept(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        for number in range(part.KEPT_OPENINGS):
            await world.owner.expect(Opening(**{**world.opening.model_dump(), "nonce": f"{number + 1:016x}"}))
        assert world.owner.opening(world.opening.id) is None

    play(story)


def test_contributors_are_in_order_and_have_something() -> None:
    assert contributors_of({2: 5, 0: 7, 1: 0}) == ((0, 7), (2, 5))


def test_a_poisoner_among_three_is_left_out_and_named_once(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        events: list[Event] = []
        world.owner._trust = Trust(world.run.averaging, fragment=0, emit=events.append)
        await world.push(0)
        await world.push(1)
        poison = codec.encode(torch.full((world.layout.numel,), -1e6), world.layout.num_fine_blocks, 8)
        header = {"id": world.opening.id, "part": 0, "tokens": 100}
        await world.owner.push(header, poison, sender=world.ids[2])
        [(contributors, result)] = world.results
        assert contributors == ((0, 100), (1, 100), (2, 100)), "it is in the commit with nothing"
        assert world.value_of(result) == pytest.approx(1.5, abs=0.02)
        [warning] = events
        assert world.ids[2][-6:] in str(warning)

    play(story)


def test_tokens_count_as_far_as_earlier_commits_support_them(play: Callable[[Story], None]) -> None:
    async def story(world: World) -> None:
        named = [Contributor(member=member, tokens=100) for member in range(3)]
        unsigned = PartResult(hash="0" * 64, signature="0" * 128)
        for version in (1, 2, 3):
            opening = Opening(**{**world.opening.model_dump(), "version": version})
            world.owner.settled(make_commit(world.keys[0], opening, named, [unsigned]))
        world.opening = Opening(**{**world.opening.model_dump(), "version": 4})
        await world.owner.expect(world.opening)
        await world.push(0, tokens=20)
        await world.push(1, tokens=100)
        await world.push(2, tokens=1000)
        [(contributors, result)] = world.results
        assert contributors == ((0, 20), (1, 100), (2, 1000)), "the commit says what was claimed"
        assert world.value_of(result) == pytest.approx((20 * 1 + 100 * 2 + 200 * 3) / 320, abs=0.02)

    play(story)


def test_a_run_that_trusts_its_peers_takes_the_plain_mean(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair]
) -> None:
    async def told() -> None:
        world = World(make_run(bits=8, tokens_per_round=1000, robust=False), layout, keys)
        await world.owner.expect(world.opening)
        await world.push(0)
        await world.push(1)
        far = codec.encode(torch.full((layout.numel,), -30.0), layout.num_fine_blocks, 8)
        header = {"id": world.opening.id, "part": 0, "tokens": 100}
        await world.owner.push(header, far, sender=world.ids[2])
        [(_, result)] = world.results
        assert world.value_of(result) == pytest.approx(-9.0, abs=0.1)

    asyncio.run(asyncio.wait_for(told(), 30))
