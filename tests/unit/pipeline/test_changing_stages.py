"""Stages that change under way, and places that dead origins would keep: nothing lost, nothing counted twice.

The simulated peers do what train/mover.py does: refuse what is let go of, end it, exchange the stage, take on the new.
"""

from __future__ import annotations

import asyncio
import copy
import random

import pytest

from swarm.errors import PeerRefused
from swarm.pipeline import admission, chain, wire
from swarm.pipeline.messages import Microbatch
from tests.unit.averaging.simulation import play
from tests.unit.pipeline.chains import Peer, World, finish, largest_error, sums
from tests.unit.pipeline.toy import VOCABULARY, in_one_process, microbatches

END_S, VERDICT_S = 0.5, 30.0


def say(peer: Peer, first: int, end: int) -> None:
    peer.first, peer.end = peer.chain.first, peer.chain.end = first, end


async def until_ended(peer: Peer, fragments: set[int], *, patience_s: float) -> None:
    deadline = asyncio.get_running_loop().time() + patience_s
    while peer.chain.in_use(fragments) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)


async def go_to(peer: Peer, first: int, end: int) -> None:
    kept = max(first, peer.first), min(end, peer.end)
    left = set(range(peer.first, peer.end)) - set(range(*kept))
    say(peer, *(kept if kept[0] < kept[1] else (0, 0)))
    await until_ended(peer, left, patience_s=END_S)
    await peer.chain.give_up(left, answered=False)
    await until_ended(peer, left, patience_s=VERDICT_S)
    assert not peer.chain.in_use(left), "verdicts come within seconds"
    stage = copy.copy(peer.stage)
    stage.start, stage.end = first, end
    peer.compute.restage(stage)  # type: ignore[arg-type]
    say(peer, first, end)


@pytest.mark.parametrize("seed", range(6))
def test_peers_that_move_all_the_time_lose_nothing_and_count_nothing_twice(seed: int) -> None:
    """Every fragment has a holder that stays, as placement sees to; three others never rest."""
    texts = microbatches(60, seed=seed)
    wanted, _ = in_one_process(4, texts)
    dice = random.Random(seed)

    async def story() -> None:
        world = World(4, seed=seed, twice=0.1)
        origin = Peer(world, "origin", 0, 1)
        for index in range(1, 4):
            Peer(world, f"stays{index}", index, index + 1, service_s=0.15)
        movers = [Peer(world, f"moves{number}", 1, 4) for number in range(3)]
        moves = 0

        async def wander(peer: Peer) -> None:
            nonlocal moves
            while True:
                await asyncio.sleep(dice.uniform(0.1, 0.6))
                first = dice.randrange(1, 4)
                await go_to(peer, first, dice.randrange(first + 1, 5))
                moves += 1

        wandering = [asyncio.ensure_future(wander(peer)) for peer in movers]
        made = origin.origin(texts)
        await finish([made])
        for task in wandering:
            assert not task.done(), task.exception()
            task.cancel()
        assert moves > 10 and made[0].lost_tokens == 0 and len(origin.losses) == 60
        assert sum(peer.compute.tokens(1) for peer in movers) > 0, "those that move have worked, too"
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


def test_what_is_let_go_of_is_refused_and_done_by_somebody_else() -> None:
    """The microbatch is under way and waits for a fragment that nobody holds for long: whoever asked goes elsewhere."""
    tokens = microbatches(1, seed=1)
    wanted, _ = in_one_process(3, tokens)

    async def story() -> None:
        world = World(3, seed=1)
        origin, leaver = Peer(world, "origin", 0, 1), Peer(world, "goes", 1, 2)
        made = origin.origin(tokens)
        training = asyncio.ensure_future(finish([made]))
        await asyncio.sleep(2.0)
        assert leaver.chain.in_use({1}) == 1 and not leaver.chain.in_use({0, 2})
        await leaver.chain.give_up({2}, answered=True)
        assert leaver.chain.in_use({1}) == 1, "not one of those"
        say(leaver, 0, 0)
        await leaver.chain.give_up({1}, answered=False)
        await asyncio.sleep(0.5)
        assert not leaver.chain.in_use({1}) and leaver.compute.in_flight == 0
        Peer(world, "other", 1, 3)
        await training
        assert made[0].lost_tokens == 0 and leaver.compute.tokens(1) == 0
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


def test_what_waits_for_its_verdict_is_given_up_last() -> None:
    async def story() -> None:
        world = World(2, seed=2)
        asker, peer = Peer(world, "asker", 0, 1), Peer(world, "peer", 1, 2)
        await ask(world, asker, peer, number=1)
        await peer.chain.give_up({1}, answered=False)
        assert peer.chain.in_use({1}) == 1 == peer.compute.in_flight
        await peer.chain.give_up({1}, answered=True)
        assert peer.chain.in_use({1}) == 0 == peer.compute.in_flight

    play(story())


async def ask(world: World, asker: Peer, peer: Peer, *, number: int) -> None:
    """A microbatch from fragment 1 on, whose verdict never comes."""
    tokens = microbatches(1, seed=number)[0]
    values = asker.compute.forward(("x", number), tokens, start=0, end=1, tokens=tokens.numel(), keep=False)
    asked = Microbatch(
        origin=asker.id, number=number, start=1, sequences=tokens.shape[0], length=tokens.shape[1], bits=32,
        back_bits=32,
    )
    body = wire.encode_tokens(tokens, vocabulary=VOCABULARY) + wire.encode_values(values, 32)
    await peer.chain.serve(asked, body, asker=asker.id)


@pytest.mark.parametrize("dead", [True, False])
def test_a_dead_origin_makes_room_and_one_that_is_alive_keeps_its_places(dead: bool) -> None:
    """Also one that serves nothing at the moment, as while it moves: its verdicts are still to come."""
    async def story() -> None:
        world = World(2, seed=3)
        gone, other, peer = Peer(world, "gone", 0, 1), Peer(world, "other", 0, 1), Peer(world, "peer", 1, 2)
        peer.chain.max_in_flight = 2
        peer.chain._is_alive = lambda peer_id: not (dead and peer_id == gone.id)
        for number in (1, 2):
            await ask(world, gone, peer, number=number)
        with pytest.raises(PeerRefused, match=admission.BUSY):
            await ask(world, other, peer, number=3)
        assert peer.compute.in_flight == 2, "it may have been silent for a moment only"
        say(gone, 0, 0)
        await asyncio.sleep(chain.ORPHAN_S + 1)
        with pytest.raises(PeerRefused, match=admission.BUSY):
            await ask(world, other, peer, number=3)
        await asyncio.sleep(0.5)
        if not dead:
            assert peer.compute.in_flight == 2
            return
        await ask(world, other, peer, number=3)
        assert peer.compute.in_flight == 1 == peer.chain.in_use({1})

    play(story())


@pytest.mark.parametrize("swept", [True, False])
def test_what_a_dead_origin_has_under_way_is_given_up_and_asks_nobody_any_more(swept: bool) -> None:
    """Its call has ended with its link, and nobody else asks for the rest: the place is free after a while."""
    async def story() -> None:
        world = World(3, seed=4)
        gone, other, peer = Peer(world, "gone", 0, 1), Peer(world, "other", 0, 1), Peer(world, "peer", 1, 2)
        peer.chain.max_in_flight = 1
        asking = asyncio.ensure_future(ask(world, gone, peer, number=1))
        await asyncio.sleep(chain.ORPHAN_S + 1)
        await peer.chain.forget_old()
        with pytest.raises(PeerRefused, match=admission.BUSY):
            await ask(world, other, peer, number=2)
        assert peer.chain.in_use({1}) == 1 and not asking.done(), "as long as somebody waits it goes on looking"
        asking.cancel()
        await asyncio.sleep(chain.ORPHAN_S / 2)
        await peer.chain.forget_old()
        assert peer.chain.in_use({1}) == 1, "somebody may ask again for the answer"
        await asyncio.sleep(chain.ORPHAN_S)
        if swept:
            await peer.chain.forget_old()
        else:
            with pytest.raises(PeerRefused, match=admission.BUSY):
                await ask(world, other, peer, number=2)
        await asyncio.sleep(0.5)
        assert peer.chain.in_use({1}) == 0 == peer.compute.in_flight
        Peer(world, "end", 2, 3)
        await ask(world, other, peer, number=2)
        assert peer.chain.in_use({1}) == 1

    play(story())
