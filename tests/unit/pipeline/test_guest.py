"""Questions of guests through the chain: what one process would say; nothing of it stays, or is in training's way."""

from __future__ import annotations

import asyncio

import pytest
import torch

from swarm.data.batch import Batch
from swarm.errors import BadMessage, NetworkError, PeerRefused, StateError
from swarm.pipeline import admission, guest, onward, wire
from swarm.pipeline.messages import Bits, Microbatch
from swarm.pipeline.onward import Shape
from swarm.pipeline.routing import Holder
from tests.unit.averaging.simulation import play
from tests.unit.pipeline.chains import Peer, Visitor, World, finish, largest_error, sums
from tests.unit.pipeline.toy import Toy, in_one_process, microbatches

Stages = list[tuple[int, int]]


def in_one(tokens: torch.Tensor, *, positions: int) -> torch.Tensor:
    with torch.no_grad():
        return Toy(4)(tokens, start=0, end=4)[:, -positions:]


@pytest.mark.parametrize("stages", [
    [(0, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 3), (1, 4)], [(0, 2), (1, 4), (2, 4)],
])
def test_a_guest_hears_what_one_process_would_say(stages: Stages) -> None:
    texts = microbatches(6, seed=1)
    _, losses = in_one_process(4, texts)

    async def story() -> None:
        world = World(4, seed=1)
        peers = [Peer(world, f"peer{i}", *stage) for i, stage in enumerate(stages)]
        asking = Visitor(world, "guest").guest
        assert await asyncio.gather(*map(asking.loss, map(Batch, texts))) == pytest.approx(losses, rel=1e-6)
        for tokens in (texts[0], texts[1][:1, :1], texts[2][:, :3]):
            for positions in (1, tokens.shape[1]):
                found = await asking.logits(Batch(tokens), positions=positions)
                assert torch.equal(found, in_one(tokens, positions=positions))
        await asyncio.sleep(1)
        for peer in peers:
            assert peer.compute.in_flight == 0 and not peer.chain._entries and not peer.chain._done
            assert all(peer.compute.tokens(fragment) == 0 for fragment in peer.compute.fragments)
        assert {method for _, _, method, _ in world.messages} == {"microbatch", "microbatch's answer"}, "no verdicts"

    play(story())


@pytest.mark.parametrize(("bits", "back_bits", "off"), [(8, 8, 0.05), (4, 8, 0.8)])
def test_with_fewer_bits_it_is_nearly_the_same(bits: Bits, back_bits: Bits, off: float) -> None:
    (tokens,) = microbatches(1, seed=2)

    async def story() -> None:
        world = World(4, seed=2, bits=bits, back_bits=back_bits)
        for index in range(4):
            Peer(world, f"peer{index}", index, index + 1)
        asking = Visitor(world, "guest").guest
        errors = await asking.logits(Batch(tokens)) - in_one(tokens, positions=1)
        assert 0 < float(errors.abs().max()) < off

    play(story())


def test_a_fragment_without_holder_is_named_and_one_that_comes_back_is_waited_for() -> None:
    (tokens,) = microbatches(1, seed=3)
    _, losses = in_one_process(4, [tokens])

    async def story() -> None:
        world = World(4, seed=3)
        Peer(world, "a", 0, 2)
        asking = Visitor(world, "guest").guest
        clock = asyncio.get_running_loop().time
        began = clock()
        with pytest.raises(StateError, match="nobody here holds fragment 2, 3") as caught:
            await asking.loss(Batch(tokens))
        assert "--fragments" in caught.value.do and guest.GAP_S <= clock() - began < guest.GAP_S + 1
        asyncio.get_running_loop().call_later(guest.GAP_S / 2, lambda: Peer(world, "b", 2, 4))
        assert await asking.loss(Batch(tokens)) == pytest.approx(losses[0], rel=1e-6)

    play(story())


def test_gaps_are_the_fragments_that_nobody_holds() -> None:
    assert guest.gaps([Holder("A", 0, 2), Holder("B", 3, 4)], 5) == [2, 4]
    assert guest.gaps([], 2) == [0, 1] and guest.gaps([Holder("A", 0, 2)], 2) == []


def test_the_death_of_a_peer_on_the_way_is_repaired() -> None:
    texts = microbatches(8, seed=4)
    _, losses = in_one_process(4, texts)

    async def story() -> None:
        world = World(4, seed=4)
        peers = [Peer(world, f"peer{i}", *stage) for i, stage in enumerate([(0, 1), (0, 1), (1, 4), (1, 4)])]
        asking = Visitor(world, "guest").guest
        asyncio.get_running_loop().call_later(0.1, peers[0].kill)
        asyncio.get_running_loop().call_later(0.15, peers[2].kill)
        found = await asyncio.gather(*map(asking.loss, map(Batch, texts)))
        assert found == pytest.approx(losses, rel=1e-6)
        assert asking.onward.reroutes > 0

    play(story())


def test_a_crowd_of_guests_does_not_keep_training_from_its_places_or_its_time() -> None:
    texts, asked = microbatches(30, seed=5), microbatches(100, seed=6)
    wanted, _ = in_one_process(3, texts)
    _, losses = in_one_process(3, asked)

    def story(crowded: bool) -> float:
        took: list[float] = []

        async def run() -> None:
            world = World(3, seed=5)
            peers = [Peer(world, f"peer{i}", i, i + 1) for i in range(3)]
            for peer in peers:
                peer.chain.max_in_flight = 8
            crowd = [Visitor(world, f"guest{i}") for i in range(5)] if crowded else []
            answers = [
                asyncio.ensure_future(crowd[i % 5].guest.loss(Batch(tokens)))
                for i, tokens in enumerate(asked) if crowded
            ]
            await asyncio.sleep(1)
            most = 0
            for peer in peers:
                here = [not entry.microbatch.train for entry in peer.chain._entries.values()]
                most = max(most, sum(here))
            assert most == (2 if crowded else 0), "a quarter of the places"
            clock = asyncio.get_running_loop().time
            began = clock()
            await finish([peers[0].origin(texts, credit=8)])
            took.append(clock() - began)
            assert largest_error(sums(world), wanted) < 1e-5
            assert await asyncio.gather(*answers) == pytest.approx(losses[:len(answers)], rel=1e-6), "all in the end"

        play(run())
        return took[0]

    assert story(True) < 1.35 * story(False), "one that is being computed is not put off"


def test_training_asks_do_not_learn_from_guests_how_fast_a_peer_is() -> None:
    (tokens,) = microbatches(1, seed=7)

    async def story() -> None:
        world = World(2, seed=7)
        first, second = Peer(world, "a", 0, 1), Peer(world, "b", 1, 2)
        asking = Visitor(world, "guest")
        await asking.guest.loss(Batch(tokens))
        assert first.router.of(second.id).service_s is None and first.router.of(second.id).outstanding == 0
        assert asking.router.of(first.id).outstanding == 0 and first.chain._service_s == 0.0
        first.router.failed(second.id)
        first.router.of(second.id).outstanding = 0
        await asking.guest.loss(Batch(tokens))
        assert first.router.of(second.id).failures == 0, "it is alive"

    play(story())


SHAPE = Shape(4, 8, 1000, max_tokens=64)
TRAINS = Microbatch(origin="B" * 20, number=1, start=1, sequences=2, length=8)
ASKS = TRAINS.model_copy(update={"train": False})


def test_places_are_counted_apart() -> None:
    def room(asked: Microbatch, here: list[Microbatch], max_in_flight: int = 8) -> bool:
        try:
            admission.check(asked, here, shape=SHAPE, max_in_flight=max_in_flight, me="C" * 20)
        except PeerRefused as refusal:
            assert str(refusal) == admission.BUSY
            return False
        return True

    assert room(TRAINS, [ASKS] * 50 + [TRAINS] * 7) and not room(TRAINS, [TRAINS] * 8)
    assert room(ASKS, [TRAINS] * 50 + [ASKS]) and not room(ASKS, [ASKS] * 2)
    assert room(ASKS, [], max_in_flight=1) and not room(ASKS, [ASKS], max_in_flight=1)
    own = TRAINS.model_copy(update={"origin": "C" * 20})
    assert room(own, [TRAINS] * 8), "the origin's own credit is its limit"


@pytest.mark.parametrize(("change", "what"), [
    ({"length": 33}, "a microbatch of 66 tokens"),
    ({"train": False, "logits": 9}, "logits of 9 positions of 8"),
    ({"train": False, "logits": 8, "sequences": 8}, ""),
])
def test_what_is_too_large_is_refused_whoever_asks(change: dict[str, object], what: str) -> None:
    asked = TRAINS.model_copy(update=change)
    for me in ("B" * 20, "C" * 20):
        if what:
            with pytest.raises(BadMessage, match=what):
                admission.check(asked, [], shape=SHAPE, max_in_flight=8, me=me)
        else:
            admission.check(asked, [], shape=SHAPE, max_in_flight=8, me=me)


def test_logits_are_bounded_in_bytes_before_anybody_is_asked() -> None:
    large = Shape(4, 8, 200_000, max_tokens=64)
    asked = TRAINS.model_copy(update={"train": False, "logits": 3})
    assert wire.logits_bytes(asked, vocabulary=200_000) > wire.MAX_LOGITS_BYTES
    with pytest.raises(BadMessage, match="bytes of logits"):
        admission.check(asked, [], shape=large, max_in_flight=8, me="C" * 20)

    async def story() -> None:
        world = World(4, seed=8)
        Peer(world, "a", 0, 4)
        asking = Visitor(world, "guest").guest
        with pytest.raises(BadMessage, match="logits of 9 positions of 6"):
            await asking.logits(Batch(microbatches(1, seed=8)[0]), positions=9)
        with pytest.raises(BadMessage, match="a microbatch of"):
            await asking.loss(Batch(microbatches(1, seed=8, sequences=11)[0]))
        assert world.messages == []

    play(story())


def test_a_peer_that_finds_nobody_to_go_on_gives_a_guest_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is worth more than its wait: the guest asks again."""
    monkeypatch.setattr(guest, "PATIENCE_S", 10.0)
    (tokens,) = microbatches(1, seed=9)

    async def story() -> None:
        world = World(2, seed=9)
        first, second = Peer(world, "a", 0, 1), Peer(world, "b", 1, 2)
        second.chain.max_in_flight = 1
        second.chain.first = 2  # gone from there, and its status does not say so yet
        asking = Visitor(world, "guest").guest
        with pytest.raises(NetworkError, match="the swarm did not answer") as caught:
            await asking.loss(Batch(tokens))
        whys = ["nobody can go on at fragment 0", "nobody can go on at fragment 1", "fragment 1 is not held here"]
        assert all(why in caught.value.why for why in whys) and "monitor.py" in caught.value.do
        assert not first.chain._entries
        began = asyncio.get_running_loop().time()
        with pytest.raises(PeerRefused, match="nobody can go on at fragment 1"):
            await first.chain.begin_own(5, Batch(tokens), train=False)
        assert asyncio.get_running_loop().time() - began < onward.GUEST_NOBODY_S + 1

    play(story())
