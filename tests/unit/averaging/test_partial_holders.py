"""Swarms whose peers hold different fragments, under delay, loss, partition and death: for each fragment one truth
among its holders (I1), no token lost or counted twice (I2), nobody waits for the dead (I3), or for non-holders.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from swarm.config import RunConfig
from swarm.errors import StateError
from swarm.network.keys import Keypair
from tests.unit.averaging.partial import (
    LAYOUTS,
    STAGES,
    alive,
    check_rounds,
    check_truth,
    committed,
    fragment_of,
    holders,
    make_world,
    settle,
    start_all,
    trained,
    until,
)
from tests.unit.averaging.simulation import Peer, play

FRAGMENTS = range(len(LAYOUTS))
MakeRun = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("small_pieces")


def own_only(peer: Peer, fragment: int, others: list[Peer]) -> int:
    """Tokens that die with a peer: its drift, and what is in commits that no other holder has seen yet."""
    applier = fragment_of(peer, fragment).applier
    versions = range(1, peer.head_of(fragment)[0] + 1)
    mine = [commit for version in versions if (commit := applier.history.commit(version)) is not None]
    known = {
        commit.hash for other in others for version in versions
        if (commit := fragment_of(other, fragment).applier.history.commit(version)) is not None
    }
    unseen = [
        c.tokens for commit in mine if commit.hash not in known
        for c in commit.contributors if commit.opening.members[c.member] == peer.id
    ]
    return peer.averager.pending()[fragment] + sum(unseen)


@pytest.mark.parametrize("stages", [STAGES, ((0, 1, 2), (1,)), ((0,), (1,), (2,)), ((0, 1, 2),) * 3])
def test_without_faults_each_fragment_averages_among_all_its_holders(
    make_run: MakeRun, keys: list[Keypair], stages: tuple[tuple[int, ...], ...]
) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, stages, seed=1)
        peers = start_all(world)
        await asyncio.sleep(90)
        check_truth(world)
        await settle(world)
        check_truth(world)
        check_rounds(world)
        for fragment in FRAGMENTS:
            among = holders(world, fragment)
            assert len(among) == sum(fragment in stage for stage in stages)
            assert {peer.head_of(fragment) for peer in among} == {among[0].head_of(fragment)}
            assert committed(world, fragment) == trained(world, fragment) > 0
            rounds = [event for event in among[0].rounds() if event.fragment == fragment]
            full = [event for event in rounds if event.contributors == len(among)]
            assert len(rounds) >= 4 and len(full) >= len(rounds) - 4, "but the first and the last"
        await asyncio.sleep(3)  # heartbeats
        fewest = min(committed(world, fragment) for fragment in FRAGMENTS)
        assert {peer.averager.swarm_tokens() for peer in peers} == {fewest}, "as all of them know"

    play(story())


@pytest.mark.parametrize("seed", range(8))
def test_lost_and_late_messages_lose_nothing(make_run: MakeRun, keys: list[Keypair], seed: int) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, seed=seed, loss=0.15, delay_s=0.3)
        start_all(world)
        for _ in range(6):
            await asyncio.sleep(10)
            check_truth(world)
        world.loss = 0.0
        await settle(world)
        check_rounds(world)
        for fragment in FRAGMENTS:
            assert committed(world, fragment) == trained(world, fragment), "committed is what was trained"

    play(story())


@pytest.mark.parametrize("seed", range(12))
def test_the_death_of_a_holder_takes_no_more_than_what_it_held(
    make_run: MakeRun, keys: list[Keypair], seed: int
) -> None:
    """In the middle of a round of one of its fragments more often than not. Every fragment keeps a holder, and its
    rounds go on."""
    async def story() -> None:
        world = make_world(make_run, keys, seed=seed)
        peers = start_all(world)
        await asyncio.sleep(12 + seed * 0.83)
        victim = peers[seed % 4]
        others = [peer for peer in peers if peer is not victim]
        held = {
            f: own_only(victim, f, [p for p in others if f in p.averager.held()]) for f in victim.averager.held()
        }
        before = {fragment: max(p.head_of(fragment)[2] for p in others if fragment in p.averager.held())
                  for fragment in FRAGMENTS}
        await victim.kill()
        await until(lambda: all(committed(world, fragment) > before[fragment] for fragment in FRAGMENTS))
        await settle(world)
        check_truth(world)
        check_rounds(world)
        for fragment in FRAGMENTS:
            lost = trained(world, fragment) - committed(world, fragment)
            assert 0 <= lost <= held.get(fragment, 0), "nothing twice, and only what the dead one had not given"

    play(story())


@pytest.mark.parametrize("seed", range(8))
def test_a_parted_swarm_comes_together_and_loses_nothing(make_run: MakeRun, keys: list[Keypair], seed: int) -> None:
    """Some fragments are then held on both sides, and some on one."""
    async def story() -> None:
        world = make_world(make_run, keys, seed=seed)
        peers = start_all(world)
        await asyncio.sleep(12 + seed * 0.61)
        world.part([peer.id for peer in (peers[:1], peers[1:2], peers[:2], [peers[0], peers[2]])[seed % 4]])
        await asyncio.sleep(20 + 2 * seed)
        world.heal()
        await settle(world, limit_s=240)
        check_truth(world)
        for fragment in FRAGMENTS:
            assert committed(world, fragment) == trained(world, fragment), "committed is what was trained"

    play(story())


@pytest.mark.parametrize("holds", [(0,), (1, 2), (0, 1, 2)])
def test_a_newcomer_takes_over_the_fragments_that_it_holds_and_no_others(
    make_run: MakeRun, keys: list[Keypair], holds: tuple[int, ...]
) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, seed=3)
        peers = start_all(world)
        await asyncio.sleep(30)
        newcomer = Peer(world, keys[5], holds)
        for peer in peers:
            newcomer.hear(peer.id, peer.status())
        assert newcomer.averager.heads() == [] == newcomer.averager.pending(), "it is joining"
        assert await newcomer.averager.synchroniser.join() == len(holds)
        assert {state.fragment for state in newcomer.averager.states()} == set(holds)
        assert all(state.version > 0 for state in newcomer.averager.states())
        newcomer.start()
        await asyncio.sleep(30)
        await settle(world)
        check_rounds(world)
        for fragment in holds:
            assert newcomer.trained_in[fragment] > 0
            assert committed(world, fragment) == trained(world, fragment)

    play(story())


def test_a_fragment_with_one_holder_commits_alone_and_goes_on_with_a_second(
    make_run: MakeRun, keys: list[Keypair]
) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, ((0, 1), (1, 2), (0, 1)), seed=4)
        peers = start_all(world)
        await asyncio.sleep(40)
        rounds = [event for event in peers[1].rounds() if event.fragment == 2]
        assert len(rounds) >= 2 and {event.contributors for event in rounds} == {1}
        second = Peer(world, keys[3], (2,))
        for peer in peers:
            second.hear(peer.id, peer.status())
        await second.averager.synchroniser.join()
        assert second.averager.synchroniser.attested_by_one, "there is no other to ask"
        second.start()
        await until(lambda: any(event.contributors == 2 for event in second.rounds()))
        await settle(world)
        check_truth(world)

    play(story())


def test_a_fragment_that_nobody_holds_is_said_to_be_so_and_the_others_go_on(
    make_run: MakeRun, keys: list[Keypair]
) -> None:
    async def story() -> None:
        world = make_world(make_run, keys, ((0,), (0, 1), (1,)), seed=5)
        peers = start_all(world)
        await asyncio.sleep(30)
        assert all(committed(world, fragment) > 0 for fragment in (0, 1))
        newcomer = Peer(world, keys[3], (2,))
        for peer in peers:
            newcomer.hear(peer.id, peer.status())
        with pytest.raises(StateError, match="nobody here holds fragment 2"):
            await newcomer.averager.synchroniser.download(fragment_of(newcomer, 2).applier)
        newcomer.averager.trust({2: False})
        with pytest.raises(StateError, match="nobody here holds fragment 2"):
            await newcomer.averager.synchroniser.join()
        newcomer.averager.trust({2: True})
        assert await newcomer.averager.synchroniser.join() == 0, "the run's own start will do"

    play(story())


def test_when_the_last_holder_dies_the_others_remember_how_far_it_was(make_run: MakeRun, keys: list[Keypair]) -> None:
    """Or the learning rate of everybody would go back to that of the run's start."""
    async def story() -> None:
        world = make_world(make_run, keys, ((0,), (0,), (1,), (1, 2)), seed=6)
        peers = start_all(world)
        await asyncio.sleep(40)
        assert peers[0].averager.swarm_tokens() > 0
        await peers[3].kill()
        known = peers[0].averager.swarm_tokens()
        await asyncio.sleep(40)
        assert 0 < known <= peers[0].averager.swarm_tokens() <= peers[3].averager.swarm_tokens()
        assert committed(world, 0) > peers[0].averager.swarm_tokens(), "fragment 2 stands still and bounds it"
        assert len(alive(world)) == 3

    play(story())
