"""Fragments come and go while a peer runs: what comes is downloaded before it is served, what goes is in commits first,
and the rounds of all the others take no notice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch

from swarm.averaging.global_state import GlobalState, initial_state
from swarm.config import RunConfig
from swarm.errors import PeerGone, StateError
from swarm.network.keys import Keypair
from tests.unit.averaging.partial import (
    LAYOUTS,
    check_rounds,
    check_truth,
    committed,
    fragment_of,
    head_in,
    holders,
    make_world,
    settle,
    start_all,
    trained,
    until,
)
from tests.unit.averaging.simulation import Peer, World, play, start_of

MakeRun = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("small_pieces")


def place(peer: Peer, index: int, state: GlobalState | None = None) -> GlobalState:
    """What placement does before: the fragment's weights are in the peer's model, at `state` (the run's start)."""
    layout = LAYOUTS[index]
    state = initial_state(index, start_of(layout), 1) if state is None else state
    peer.parameters |= {name: torch.nn.Parameter(values.clone()) for name, values in layout.views(state.weights)}
    peer.ever_held.add(index)
    return state


async def add(peer: Peer, index: int, *, state: GlobalState | None = None, trusted: bool = False) -> bool:
    state = place(peer, index, state)
    return await peer.averager.add(index, LAYOUTS[index], state, peer.parameters, trusted=trusted)


async def remove(peer: Peer, index: int, *, deadline_s: float = 60.0) -> int:
    peer.untrained.add(index)
    return await peer.averager.remove(index, deadline_s=deadline_s)


@pytest.mark.parametrize("seed", range(6))
def test_a_peer_moves_from_one_fragment_to_another_and_nothing_is_lost(
    make_run: MakeRun, keys: list[Keypair], seed: int
) -> None:
    """A {0} becomes {0, 1}, then {1}: make before break, as placement does."""
    async def story() -> None:
        world = make_world(make_run, keys, ((0,), (0, 1), (1, 2), (2,)), seed=seed, loss=0.05 * (seed % 3))
        mover = start_all(world)[0]
        await asyncio.sleep(20 + seed * 0.37)
        await until(lambda: min(peer.head_of(1)[0] for peer in holders(world, 1)) > 0)
        assert await add(mover, 1)
        assert mover.averager.held() == [0, 1] and mover.head_of(1)[0] > 0
        await until(lambda: mover.trained_in[1] > 0)
        assert await remove(mover, 0) == 0, "all that it had learnt is in commits"
        assert mover.averager.held() == [1]
        before = mover.trained_in[0]
        await asyncio.sleep(15)
        world.loss = 0.0
        await settle(world, limit_s=300)  # a push that was lost holds up its round for three deadlines of 40 s
        check_truth(world)
        check_rounds_since_moved(world, mover)
        assert mover.trained_in[0] == before and mover.averager.heads()[0] is None
        for fragment in range(3):
            assert committed(world, fragment) == trained(world, fragment), "I2, across the move"

    play(story())


def check_rounds_since_moved(world: World, mover: Peer) -> None:
    kept, mover.events = mover.events, [e for e in mover.events if getattr(e, "fragment", 0) in mover.averager.held()]
    check_rounds(world)
    mover.events = kept


def test_the_rounds_of_the_other_fragments_go_on_meanwhile(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, ((0, 1), (0, 1), (1, 2), (2,)), seed=2)
        peers = start_all(world)
        await asyncio.sleep(20)
        before = [peers[0].head_of(1)[0], peers[3].head_of(2)[0]]
        began = asyncio.get_running_loop().time()
        await add(peers[0], 2)
        await until(lambda: peers[0].trained_in[2] > 0)
        await remove(peers[0], 0)
        seconds = asyncio.get_running_loop().time() - began
        rounds = [event for event in peers[1].rounds() if event.fragment == 1]
        assert peers[0].head_of(1)[0] > before[0] and peers[3].head_of(2)[0] > before[1]
        assert max(event.seconds for event in rounds) < 3.0, "no round of another fragment waits for the move"
        assert seconds < 60

    play(story())


def test_a_fragment_is_not_served_before_it_is_there(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, seed=3)
        peers = start_all(world)
        await asyncio.sleep(20)
        newcomer, seen = peers[0], []
        chunk = peers[2].methods["chunk"]

        async def watched(*arguments: object) -> object:
            seen.append((newcomer.averager.held(), newcomer.averager.heads()[2], newcomer.averager.pending()[2]))
            with pytest.raises(Exception, match="still downloading fragment 2"):
                await newcomer.methods["state"](None, {"fragment": 2}, b"")  # type: ignore[arg-type]
            newcomer.averager.trained_fragment(2, 100)
            return await chunk(*arguments)  # type: ignore[arg-type]

        peers[2].methods["chunk"] = watched  # type: ignore[assignment]
        peers[3].methods["chunk"] = watched  # type: ignore[assignment]
        await add(newcomer, 2)
        assert seen and set(map(repr, seen)) == {repr(([0], None, 0))}
        assert newcomer.averager.pending()[2] == 0, "what was counted before was of no use"
        assert head_in(newcomer, 2) in [head_in(peers[2], 2), head_in(peers[3], 2)]

    play(story())


def test_what_nobody_can_give_is_not_held(make_run: MakeRun, keys: list[Keypair]) -> None:
    """Nobody holds it; or everybody who does is cut off in the middle of it."""
    async def story() -> None:
        world = make_world(make_run, keys, ((0,), (0, 1), (1,)), seed=4)
        peers = start_all(world)
        await asyncio.sleep(20)
        with pytest.raises(StateError, match="nobody here holds fragment 2"):
            await add(peers[0], 2)
        assert peers[0].averager.held() == [0]
        for other in peers[1:]:
            async def gone(*_: object) -> object:
                raise PeerGone("it left")

            other.methods["chunk"] = gone  # type: ignore[assignment]
        with pytest.raises(StateError, match="fragment 1"):
            await add(peers[0], 1)
        assert peers[0].averager.held() == [0] and peers[0].averager.heads()[1:] == [None, None]
        await asyncio.sleep(20)
        check_truth(world)

    play(story())


def test_a_kept_copy_brings_a_fragment_back_that_nobody_holds(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, ((0,), (0, 1), (1, 2)), seed=5)
        peers = start_all(world)
        await asyncio.sleep(40)
        [copy] = [state for state in peers[2].averager.states() if state.fragment == 2]
        assert copy.version > 0
        await peers[2].kill()
        await asyncio.sleep(8)
        assert not await add(peers[0], 2, state=copy, trusted=True), "there was nobody to ask"
        assert peers[0].head_of(2) == (copy.version, copy.digest, copy.tokens)
        await until(lambda: peers[0].head_of(2)[0] > copy.version)
        assert committed(world, 2) > copy.tokens, "the run goes on from that version"

    play(story())


def test_a_kept_copy_that_is_old_is_brought_level(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, seed=6)
        peers = start_all(world)
        await asyncio.sleep(15)
        [old] = [state for state in peers[3].averager.states() if state.fragment == 2]
        await asyncio.sleep(30)
        assert await add(peers[0], 2, state=old, trusted=True)
        assert peers[0].head_of(2)[0] > old.version
        await settle(world)
        check_truth(world)
        assert committed(world, 2) == trained(world, 2)

    play(story())


def test_the_last_drift_of_a_fragment_goes_into_a_round_before_it_is_due(
    make_run: MakeRun, keys: list[Keypair]
) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, ((0, 1), (0,), (0,)), seed=7)
        peers = start_all(world)
        await asyncio.sleep(20)
        for peer in peers:
            peer.untrained.add(0)
        await until(lambda: not any(peer.averager.pending()[0] for peer in peers), limit_s=90)
        peers[0].averager.trained_fragment(0, 7)
        peers[0].trained_in[0] += 7
        began = asyncio.get_running_loop().time()
        assert await remove(peers[0], 0) == 0
        assert asyncio.get_running_loop().time() - began < world.run.averaging.max_round_s
        assert committed(world, 0) == trained(world, 0), "others have it"
        assert not fragment_of(peers[1], 0).leaving

    play(story())


def test_what_does_not_get_into_a_round_in_time_is_given_up_and_counted(
    make_run: MakeRun, keys: list[Keypair]
) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, ((0, 1), (0,)), seed=8)
        peers = start_all(world)
        await asyncio.sleep(20)
        world.part([peers[0].id])
        peers[0].averager.context.directory.unsure = lambda: True  # type: ignore[method-assign]
        peers[0].averager.trained_fragment(0, 9)
        left = peers[0].averager.pending()[0]
        assert left >= 9 and await remove(peers[0], 0, deadline_s=3.0) >= 9
        assert peers[0].averager.held() == [1]
        peers[0].averager.trained_fragment(0, 100)
        assert peers[0].averager.pending()[0] == 0, "what comes after counts for nothing"

    play(story())


def test_the_last_one_is_let_go_of_too_and_the_peer_then_holds_none(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, ((0,), (0,)), seed=9)
        peers = start_all(world)
        await asyncio.sleep(20)
        tokens = peers[0].averager.swarm_tokens()
        assert await remove(peers[0], 0) == 0
        assert peers[0].averager.heads() == peers[0].averager.pending() == peers[0].averager.states() == []
        assert peers[0].averager.swarm_tokens() >= tokens > 0
        await asyncio.sleep(20)
        assert [event.contributors for event in peers[1].rounds()][-1] == 1 and holders(world, 0) == [peers[1]]
        assert await add(peers[0], 0), "and it may come back"
        peers[0].untrained.clear()
        await until(lambda: [event.contributors for event in peers[1].rounds()][-1] == 2)

    play(story())


def test_others_hear_at_once_who_holds_what(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, seed=10)
        peers = start_all(world)
        await asyncio.sleep(20)
        await add(peers[0], 1)
        await asyncio.sleep(2 * world.delay_s)
        assert peers[1].alive()[peers[0].id].head(1) == head_in(peers[0], 1)
        await remove(peers[0], 0)
        await asyncio.sleep(2 * world.delay_s)
        assert set(peers[1].alive()[peers[0].id].held()) == {1}
        level, others = peers[1].averager._turns.holders(fragment_of(peers[1], 0), peers[1].alive())
        assert peers[0].id not in [*level, *others], "it is invited no more"

    play(story())


def test_a_fragment_that_is_held_is_not_added_again(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, seed=11)
        with pytest.raises(AssertionError, match="held already"):
            await add(next(iter(world.peers.values())), 0)

    play(story())
