"""Swarms under dozens of schedules of delay, loss, partition and death: one truth (I1), no token lost or counted
twice (I2), nobody waits for the dead (I3). The protocol is the real one, see simulation.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from swarm.averaging import plan
from swarm.averaging.layout import Layout, layout_of
from swarm.config import RunConfig
from swarm.model.fragments import FragmentSpec, TensorSpec
from swarm.network.keys import Keypair
from tests.unit.averaging.simulation import Peer, World, play

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.fixture
def layout() -> Layout:
    """Eleven blocks."""
    return layout_of(FragmentSpec(0, (0, 1), (
        TensorSpec("bias", (10,), fine=True), TensorSpec("matrix", (64, 40), fine=False),
    )))


def make_world(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair], count: int, bits: int = 4, **more: float
) -> World:
    run = make_run({"total_tokens": 10**9}, bits=bits, tokens_per_round=1000 * count, max_round_s=20.0)
    world = World(run, layout, **more)  # type: ignore[arg-type]
    for key in keys[:count]:
        Peer(world, key)
    return world


def check_truth(world: World) -> None:
    """Of every version that two peers still stand at, there is one digest."""
    heads: dict[int, set[str]] = {}
    for peer in world.peers.values():
        if not peer.dead:
            heads.setdefault(peer.head[0], set()).add(peer.head[1])
    assert all(len(digests) == 1 for digests in heads.values()), heads


async def settle(world: World, *, limit_s: float = 120.0) -> list[Peer]:
    """Everybody stops training; wait until all that they have trained is in rounds that all of them have."""
    alive = [peer for peer in world.peers.values() if not peer.dead]
    for peer in alive:
        await peer.stop_training()
        peer.averager.leaving = True
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_s
    while any(any(p.averager.pending()) for p in alive) or len({p.head for p in alive}) > 1:
        assert loop.time() < deadline, [(p.head, p.averager.pending()) for p in alive]
        await asyncio.sleep(0.5)
    return alive


def held_by(peer: Peer, others: list[Peer]) -> int:
    """Tokens that die with a peer: its drift, and what is in commits that nobody else has seen yet."""
    applier = peer.averager._fragments[0].applier
    versions = range(1, peer.head[0] + 1)
    histories = [other.averager._fragments[0].applier.history for other in others]
    known = {
        commit.hash for history in histories for version in versions
        if (commit := history.commit(version)) is not None
    }
    unseen = [
        commit for version in versions
        if (commit := applier.history.commit(version)) is not None and commit.hash not in known
    ]
    own = [c.tokens for commit in unseen for c in commit.contributors if commit.opening.members[c.member] == peer.id]
    return peer.averager.pending()[0] + sum(own)


@pytest.mark.parametrize("seed", range(4))
def test_two_that_stop_at_the_same_moment_make_one_version_of_what_they_have_left(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair], seed: int
) -> None:
    """All that they know of each other is that nothing was left."""
    async def story() -> None:
        world = make_world(make_run, layout, keys, 2, seed=seed)
        for peer in world.peers.values():
            peer.start()
        await asyncio.sleep(30)
        alive = await settle(world)
        await asyncio.sleep(2)
        assert all(status.leaving and not any(status.pending) for p in alive for status in p.alive().values())
        version, _, tokens = alive[0].head
        for peer in alive:
            peer.learn(96)
        await asyncio.sleep(20)
        made = {(one.version, one.digest) for peer in alive for one in peer.rounds() if one.version > version}
        assert len(made) == len({number for number, _ in made}) > 0, "no version twice, not even for a while"
        assert {peer.head[2] for peer in alive} == {tokens + 2 * 96}, "and nothing of it is left"

    play(story())


@pytest.mark.parametrize(("count", "bits"), [(1, 4), (2, 4), (3, 4), (5, 4), (3, 2)])
def test_without_faults_every_round_is_of_all(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair], count: int, bits: int
) -> None:
    async def story() -> None:
        world = make_world(make_run, layout, keys, count, bits, seed=1)
        for peer in world.peers.values():
            peer.start()
        await asyncio.sleep(90)
        check_truth(world)
        alive = await settle(world)
        rounds = alive[0].rounds()
        assert len(rounds) >= 5
        full = [event for event in rounds if event.contributors == count]
        assert len(full) >= len(rounds) - 4, "but the first and the last, when not all have something to contribute"
        assert alive[0].head[2] == sum(peer.trained for peer in alive)

    play(story())


@pytest.mark.parametrize("seed", range(21))
def test_lost_and_late_messages_lose_nothing(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair], seed: int
) -> None:
    async def story() -> None:
        world = make_world(make_run, layout, keys, 3 + seed % 3, seed=seed, loss=0.15, delay_s=0.3)
        for peer in world.peers.values():
            peer.start()
        for _ in range(6):
            await asyncio.sleep(10)
            check_truth(world)
        world.loss = 0.0
        alive = await settle(world)
        assert alive[0].head[2] == sum(peer.trained for peer in alive), "committed is what was trained"
        assert alive[0].head[0] >= 2

    play(story())


@pytest.mark.parametrize("seed", range(24))
def test_the_death_of_one_takes_no_more_than_what_it_held(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair], seed: int
) -> None:
    """At any moment, in the middle of a round more often than not, an opener, an owner or neither."""
    async def story() -> None:
        world = make_world(make_run, layout, keys, 4, seed=seed)
        peers = list(world.peers.values())
        for peer in peers:
            peer.start()
        await asyncio.sleep(15 + seed * 0.61)
        victim = peers[seed % 4]
        held = held_by(victim, [peer for peer in peers if peer is not victim])
        committed_before = max(peer.head[2] for peer in peers if peer is not victim)
        await victim.kill()
        died_at = asyncio.get_running_loop().time()
        while max(peer.head[2] for peer in peers if peer is not victim) <= committed_before:
            assert asyncio.get_running_loop().time() - died_at < 60, "the others go on"
            await asyncio.sleep(0.5)
        alive = await settle(world)
        check_truth(world)
        lost = sum(peer.trained for peer in peers) - alive[0].head[2]
        assert 0 <= lost <= held, "nothing twice, and nothing lost but what the dead one had not given"

    play(story())


@pytest.mark.parametrize("seed", range(16))
def test_a_parted_swarm_comes_together_and_loses_nothing(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair], seed: int
) -> None:
    async def story() -> None:
        world = make_world(make_run, layout, keys, 4, seed=seed)
        ids = list(world.peers)
        for peer in world.peers.values():
            peer.start()
        await asyncio.sleep(12 + seed * 0.53)
        world.part(ids[: 1 + seed % 2])
        await asyncio.sleep(20 + 2 * seed)
        world.heal()
        alive = await settle(world, limit_s=240)
        assert alive[0].head[2] == sum(peer.trained for peer in alive), "committed is what was trained"

    play(story())


def test_a_simulated_swarm_is_the_same_each_time(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair]
) -> None:
    heads = []

    async def story() -> None:
        world = make_world(make_run, layout, keys, 3, seed=7, loss=0.1)
        for peer in world.peers.values():
            peer.start()
        await asyncio.sleep(30)
        heads.append([(peer.head[0], peer.head[2], peer.trained) for peer in world.peers.values()])

    play(story())
    play(story())
    assert heads[0] == heads[1]


def test_what_a_story_leaves_undone_ends_with_it() -> None:
    """Also what begins at the end only: a loop that is closed over it would say so in the middle of another test."""
    ended, tasks = [], []

    async def second() -> None:
        try:
            await asyncio.sleep(1)
        finally:
            ended.append("second")

    async def first() -> None:
        try:
            await asyncio.sleep(1)
        finally:
            ended.append("first")
            tasks.append(asyncio.ensure_future(second()))

    async def story() -> None:
        tasks.append(asyncio.ensure_future(first()))

    play(story())
    assert ended == ["first", "second"] and all(task.cancelled() for task in tasks)


def test_more_holders_than_a_round_has_room_for_take_turns(
    make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for four of eight: all apply every round, contribute to about every other, and nothing is lost."""
    monkeypatch.setattr(plan, "MAX_MEMBERS", 4)

    async def story() -> None:
        world = make_world(make_run, layout, keys, 8, seed=1)
        for peer in world.peers.values():
            peer.start()
        for _ in range(5):
            await asyncio.sleep(10)
            check_truth(world)
        first = next(iter(world.peers.values()))
        history = first.averager._fragments[0].applier.history
        commits = [history.commit(version) for version in range(1, first.head[0] + 1)]
        assert len(commits) > 8 and all(commit is not None and len(commit.opening.members) <= 4 for commit in commits)
        turns = {peer: sum(commit is not None and commit.includes(peer) for commit in commits) for peer in world.peers}
        assert min(turns.values()) > 0 and max(turns.values()) < len(commits)
        alive = await settle(world)
        assert alive[0].head[2] == sum(peer.trained for peer in alive)

    play(story())
