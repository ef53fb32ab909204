"""Fragments outlive all of their holders: spare copies are on others' disks, follow the rounds, and are where the next
holder goes on. Real files, real rounds, a made-up network and clock.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from swarm.averaging import plan, spares
from swarm.averaging.global_state import GlobalState
from swarm.averaging.spare_copies import SpareCopies
from swarm.config import RunConfig
from swarm.errors import PeerRefused
from swarm.events import Warning
from swarm.network.keys import Keypair
from swarm.network.records import Head
from swarm.train.spare_disk import SpareDisk
from tests.unit.averaging.partial import LAYOUTS, alive, check_truth, fragment_of, head_in, make_world, until
from tests.unit.averaging.simulation import Peer, World, play
from tests.unit.averaging.test_holding import add, remove

MakeRun = Callable[..., RunConfig]
STAGES = ((0,), (0,), (1,), (2,), (2,))
"""the middle fragment has one holder"""
AMPLE = 10**9
FRESH_S = 2 * spares.RENEW_S + 2 * spares.LOOK_S
numbers = itertools.count()


@pytest.fixture(autouse=True)
def small_pieces(no_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_PIECE_BLOCKS", 1)


def make_disk(folder: Path, room_bytes: int = AMPLE) -> SpareDisk:
    return SpareDisk(
        folder, room_bytes=room_bytes, numels={i: layout.numel for i, layout in enumerate(LAYOUTS)}, num_buffers=1
    )


def make_peer(world: World, key: Keypair, holds: Collection[int], folder: Path, room_bytes: int = AMPLE) -> Peer:
    return Peer(world, key, holds, disk=make_disk(folder / f"{next(numbers)}", room_bytes))


def make_spared(
    make_run: MakeRun, keys: list[Keypair], folder: Path, stages: Collection[Collection[int]] = STAGES,
    rooms: Collection[int] | None = None, **more: float,
) -> tuple[World, list[Peer]]:
    """A swarm in which everybody has a disk for spares, `rooms` bytes each."""
    world = make_world(make_run, keys, (), **more)
    peers = [
        make_peer(world, key, holds, folder, room)
        for key, holds, room in zip(keys, stages, rooms or [AMPLE] * len(stages), strict=False)
    ]
    for peer in peers:
        peer.start()
    return world, peers


def copies(peer: Peer) -> SpareCopies:
    assert peer.averager.spares is not None
    return peer.averager.spares


def spared(world: World, fragment: int) -> dict[str, Head]:
    found = {p.id: spare.head for p in alive(world) for spare in copies(p).announced() if spare.fragment == fragment}
    return dict(sorted(found.items()))


def everything_is_spared(world: World) -> bool:
    return all(len(spared(world, fragment)) == spares.SPARES for fragment in range(len(LAYOUTS)))


def warnings(peer: Peer) -> str:
    return "\n".join(event.text for event in peer.events if isinstance(event, Warning))


def count_calls(world: World, method: str) -> list[int]:
    """The number of answers to a method from now on, of peers there are, and the bytes of their bodies."""
    counted = [0, 0]

    def counting(handler: Any) -> Any:
        async def answer(*arguments: Any) -> Any:
            header, body = await handler(*arguments)
            counted[0] += 1
            counted[1] += len(body)
            return header, body

        return answer

    for peer in alive(world):
        peer.methods[method] = counting(peer.methods[method])
    return counted


def states_of(peer: Peer, fragment: int) -> GlobalState:
    state = copies(peer)._store.read(fragment)
    assert state is not None
    return state


def test_every_fragment_comes_to_be_on_two_disks_and_stays_fresh(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    async def story() -> None:
        world, peers = make_spared(make_run, keys, tmp_path, seed=1)
        await until(lambda: everything_is_spared(world))
        keepers = {fragment: set(spared(world, fragment)) for fragment in range(3)}
        for _ in range(4):
            await asyncio.sleep(FRESH_S)
            assert {fragment: set(spared(world, fragment)) for fragment in range(3)} == keepers, "nothing moves about"
        for fragment, holder in enumerate((peers[0], peers[2], peers[3])):
            known = fragment_of(holder, fragment).applier.history
            for head in spared(world, fragment).values():
                assert known.knows(head.version, head.digest), "a version of the swarm's own history"
            newest = holder.head_of(fragment)[2]
            oldest = min(head.tokens for head in spared(world, fragment).values())
            assert newest - oldest <= 3 * world.run.averaging.tokens_per_round + 1000 * FRESH_S
            assert oldest > newest / 2
        for peer in peers:
            assert not {spare.fragment for spare in copies(peer).announced()} & set(peer.averager.held())
            for spare in copies(peer).announced():
                assert states_of(peer, spare.fragment).digest == spare.head.digest
        check_truth(world)

    play(story())


def test_a_copy_is_downloaded_once_and_then_follows_the_rounds(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    """And a keeper's rounds are those of the fragments that it holds."""
    async def story() -> None:
        world, peers = make_spared(make_run, keys, tmp_path, seed=2)
        await until(lambda: everything_is_spared(world))
        before = {f: min(head.version for head in spared(world, f).values()) for f in range(3)}
        chunks, results = count_calls(world, "chunk"), count_calls(world, "result")
        await asyncio.sleep(2 * FRESH_S)
        assert chunks == [0, 0] and results[0] > 0
        assert all(min(head.version for head in spared(world, f).values()) > before[f] for f in range(3))
        for peer in peers:
            assert {event.fragment for event in peer.rounds()} == set(peer.averager.held())

    play(story())


@pytest.mark.parametrize("seed", range(6))
def test_when_the_only_holder_dies_the_next_one_goes_on_from_the_newest_copy(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path, seed: int
) -> None:
    async def story() -> None:
        world, peers = make_spared(make_run, keys, tmp_path, seed=seed, loss=0.05 * (seed % 3))
        await until(lambda: everything_is_spared(world))
        await asyncio.sleep(FRESH_S + 13 * seed)
        at_death = peers[2].head_of(1)
        await peers[2].kill()
        await asyncio.sleep(2 * spares.LOOK_S)
        left = spared(world, 1)
        assert len(set(left.values())) == 1, "the copies have come level with the newest one"
        [newest] = set(left.values())
        assert 0 < newest.tokens <= at_death[2]
        newcomer = make_peer(world, keys[6], (1,), tmp_path)
        for peer in alive(world):
            newcomer.hear(peer.id, peer.status())
        newcomer.averager.trust({1: True})  # it has drawn the run's start
        assert await newcomer.averager.synchroniser.join() == 1
        assert head_in(newcomer, 1) == newest and not newcomer.averager.synchroniser.attested_by_one
        assert f"went on from a spare copy of version {newest.version}" in warnings(newcomer)
        newcomer.start()
        await until(lambda: newcomer.head_of(1)[0] > newest.version)
        await until(lambda: all(head.version > newest.version for head in spared(world, 1).values()), limit_s=FRESH_S)
        check_truth(world)

    play(story())


def test_a_peer_that_is_placed_on_the_lost_fragment_goes_on_from_its_own_copy(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    async def story() -> None:
        world, peers = make_spared(make_run, keys, tmp_path, seed=3)
        await until(lambda: everything_is_spared(world))
        await asyncio.sleep(FRESH_S)
        await peers[2].kill()
        await asyncio.sleep(2 * spares.LOOK_S)
        left = spared(world, 1)
        mover = world.peers[next(iter(left))]
        chunks = count_calls(world, "chunk")
        assert not await add(mover, 1, trusted=True), "nothing had to be downloaded"
        assert chunks == [0, 0] and head_in(mover, 1) == left[mover.id]
        assert mover.id not in spared(world, 1), "what it holds is no spare"
        await until(lambda: mover.trained_in[1] > 0 and mover.head_of(1)[0] > left[mover.id].version)
        await until(lambda: len(spared(world, 1)) == spares.SPARES, limit_s=spares.GONE_S + FRESH_S)

    play(story())


def test_another_peer_that_is_placed_there_downloads_it(make_run: MakeRun, keys: list[Keypair], tmp_path: Path) -> None:
    async def story() -> None:
        world, peers = make_spared(make_run, keys, tmp_path, seed=4)
        await until(lambda: everything_is_spared(world))
        await asyncio.sleep(FRESH_S)
        await peers[2].kill()
        await asyncio.sleep(2 * spares.LOOK_S)
        left = spared(world, 1)
        mover = next(peer for peer in alive(world) if peer.id not in left)
        assert await add(mover, 1, trusted=True)
        assert head_in(mover, 1) in left.values() and mover.head_of(1)[0] > 0

    play(story())


def test_a_holder_that_has_less_than_a_copy_moves_over_to_it_and_keeps_what_it_has_learnt(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    """The old state comes back later, with more tokens: its history wins."""
    async def story() -> None:
        world, peers = make_spared(make_run, keys, tmp_path, seed=5)
        await until(lambda: everything_is_spared(world))
        await asyncio.sleep(FRESH_S)
        keepers = list(spared(world, 1))
        world.part(keepers)
        await peers[2].kill()
        mover = next(peer for peer in alive(world) if peer.id not in keepers)
        await asyncio.sleep(7)
        assert not await add(mover, 1, trusted=True), "the run's own start: nobody here has more"
        await until(lambda: mover.head_of(1)[0] > 0)
        mover.untrained.add(1)
        newest = max(spared(world, 1).values(), key=lambda head: head.tokens)
        assert mover.head_of(1)[2] < newest.tokens
        world.heal()
        await until(lambda: mover.head_of(1)[2] >= newest.tokens)
        await until(lambda: not any(mover.averager.pending()[1:2]), limit_s=120)
        history = fragment_of(mover, 1).applier.history
        assert history.knows(newest.version, newest.digest)
        # what it had learnt on the other side is in a round of this history
        assert mover.head_of(1)[2] > newest.tokens

    play(story())


def test_the_last_holder_that_leaves_finds_its_newest_state_on_others_disks_soon(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    async def story() -> None:
        world, peers = make_spared(make_run, keys, tmp_path, seed=6)
        await until(lambda: everything_is_spared(world))
        await asyncio.sleep(15)
        await peers[2].stop_training()
        peers[2].averager.leaving = True
        await until(lambda: not any(peers[2].averager.pending()))
        newest = head_in(peers[2], 1)
        await until(lambda: list(spared(world, 1).values()) == [newest] * 2, limit_s=3 * spares.LOOK_S)

    play(story())


def test_a_keeper_that_dies_is_replaced_and_a_short_silence_moves_nothing(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    async def story() -> None:
        world, _ = make_spared(make_run, keys, tmp_path, ((0,), (0,), (1,), (1,), (2,), (2,)), seed=7)
        await until(lambda: everything_is_spared(world))
        await asyncio.sleep(FRESH_S)
        before = {fragment: set(spared(world, fragment)) for fragment in range(3)}
        quiet = next(iter(before[1]))
        world.part([quiet])
        await asyncio.sleep(spares.GONE_S / 2)
        world.heal()
        await asyncio.sleep(FRESH_S)
        assert {fragment: set(spared(world, fragment)) for fragment in range(3)} == before
        await world.peers[quiet].kill()
        await until(lambda: len(spared(world, 1)) == spares.SPARES, limit_s=spares.GONE_S + 30)

    play(story())


def test_a_copy_that_another_peer_should_keep_now_stays_until_that_one_has_it(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    async def story() -> None:
        world, peers = make_spared(make_run, keys[:3], tmp_path, ((0,), (1,), (2,)), seed=8)
        await until(lambda: everything_is_spared(world))
        fewest = [spares.SPARES]
        for key in keys[3:6]:
            newcomer = make_peer(world, key, (), tmp_path)
            newcomer.start()
            for _ in range(40):
                await asyncio.sleep(2)
                fewest.append(min(len(spared(world, fragment)) for fragment in range(3)))
        assert min(fewest) >= spares.SPARES
        await until(lambda: everything_is_spared(world), limit_s=FRESH_S)
        assert sum(len(copies(peer).announced()) for peer in peers) < 6, "some of it moved to the newcomers"

    play(story())


@pytest.mark.parametrize("room", [0, 1, 2])
def test_disks_are_never_fuller_than_they_may_be(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path, room: int
) -> None:
    async def story() -> None:
        size = max(make_disk(tmp_path).size_bytes(index) for index in range(3))
        rooms = [room * size] * 3
        world, peers = make_spared(make_run, keys, tmp_path, ((0,), (1,), (2,)), rooms=rooms, seed=9)
        for _ in range(30):
            await asyncio.sleep(5)
            for peer in peers:
                store = copies(peer)._store
                assert sum(store.size_bytes(index) for index in store.heads()) <= room * size
        assert sum(len(spared(world, fragment)) for fragment in range(3)) == 3 * room

    play(story())


def test_a_full_disk_for_one_makes_room_for_what_has_fewer_copies(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    """The keeper has a copy of fragment 0 from an earlier time; meanwhile that has many copies, and fragment 1 none."""
    async def story() -> None:
        size = max(make_disk(tmp_path).size_bytes(index) for index in range(3))
        world, peers = make_spared(
            make_run, keys, tmp_path, ((0,), (0,), (0,), (1,)), rooms=[0, 0, 0, 0], seed=10
        )
        await asyncio.sleep(30)
        keeper = make_peer(world, keys[5], (2,), tmp_path, size)
        assert copies(keeper)._store.write(peers[0].averager.states()[0])
        keeper.start()
        await until(lambda: list(spared(world, 1)) == [keeper.id])
        assert list(spared(world, 0)) == []

    play(story())


def test_a_damaged_copy_is_neither_served_nor_kept_and_is_made_anew(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    async def story() -> None:
        world, _ = make_spared(make_run, keys, tmp_path, seed=11)
        await until(lambda: everything_is_spared(world))
        keeper = world.peers[next(iter(spared(world, 1)))]
        store = copies(keeper)._store
        assert isinstance(store, SpareDisk)
        path = store._path(1)
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(PeerRefused, match="no spare copy of fragment 1"):
            await copies(keeper).donor(1)
        assert not copies(keeper).has(1) and not path.exists()
        await until(lambda: everything_is_spared(world), limit_s=FRESH_S)

    play(story())


def test_a_copy_of_a_history_that_has_lost_is_replaced(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    """Its keeper was with the half of a parted swarm that trained less."""
    async def story() -> None:
        world, peers = make_spared(make_run, keys, tmp_path, ((0,), (0,), (0,), (1,), (1,)), seed=12)
        await until(lambda: len(spared(world, 0)) == spares.SPARES)
        keepers = list(spared(world, 0))
        world.part([peers[0].id, keepers[0]])
        await asyncio.sleep(2 * FRESH_S)
        world.heal()
        await asyncio.sleep(2 * FRESH_S)
        history = fragment_of(peers[1], 0).applier.history
        assert len(spared(world, 0)) == spares.SPARES
        assert all(history.knows(head.version, head.digest) for head in spared(world, 0).values())
        check_truth(world)

    play(story())


def test_a_peer_that_lets_go_of_a_fragment_may_become_its_keeper(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    async def story() -> None:
        world, peers = make_spared(make_run, keys, tmp_path, ((0, 1), (1, 2), (0, 2)), seed=13)
        await until(lambda: all(len(spared(world, fragment)) == 1 for fragment in range(3)))
        assert await remove(peers[0], 1) == 0
        await until(lambda: len(spared(world, 1)) == spares.SPARES, limit_s=FRESH_S)
        assert peers[0].id in spared(world, 1)

    play(story())
