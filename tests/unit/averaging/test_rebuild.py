"""A fragment of which no copy is left is made anew from its neighbours, once nobody has come back with it, and all who
hold it then agree.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging import plan, rebuild
from swarm.averaging.layout import Layout, layout_of
from swarm.averaging.rebuild import Rebuilder, between, of_block
from swarm.config import LoraConfig, RunConfig
from swarm.errors import StateError
from swarm.events import Warning
from swarm.model.fragments import FragmentSpec, TensorSpec
from swarm.network.keys import Keypair
from tests.unit.averaging.simulation import Peer, World, play
from tests.unit.averaging.test_spares import make_disk

MakeRun = Callable[..., RunConfig]


def block(number: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(f"h.{number}.bias", (10,), fine=True), TensorSpec(f"h.{number}.matrix", (40, 30), fine=False),
    )


SPECS = (
    FragmentSpec(0, (0, 1), (TensorSpec("embed", (50,), fine=True), *block(0))), FragmentSpec(1, (1, 2), block(1)),
    FragmentSpec(2, (2, 4), (*block(2), *block(3), TensorSpec("norm", (7,), fine=True))),
)
LAYOUTS: tuple[Layout, ...] = tuple(map(layout_of, SPECS))


@pytest.fixture(autouse=True)
def small_pieces(no_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_PIECE_BLOCKS", 1)


# -- what it is made of ---------------------------------------------------------------------------------------------


def tensors(*numbers: int, fill: float | None = None) -> dict[str, torch.Tensor]:
    return {
        f"h.{n}.{name}": torch.full(shape, float(n) if fill is None else fill)
        for n in numbers for name, shape in (("bias", (3,)), ("matrix", (2, 3)))
    }


def inside(number: int) -> dict[str, torch.Tensor]:
    return of_block(tensors(number), "h", number)


def test_a_block_s_tensors_are_those_under_its_own_number() -> None:
    named = {"h.1.a": torch.ones(1), "h.11.a": torch.ones(2), "h.1.h.1.b": torch.ones(3), "other.h.1.a": torch.ones(4)}
    assert {name: len(values) for name, values in of_block(named, "h", 1).items()} == {"a": 1, "h.1.b": 3}


def test_a_single_block_becomes_the_mean_of_its_neighbours() -> None:
    made = between(tensors(1, fill=9.0), "h", (1, 2), {0: inside(0), 2: inside(2)})
    assert set(made) == {"h.1.bias", "h.1.matrix"} and all(torch.all(values == 1.0) for values in made.values())


def test_several_blocks_lie_evenly_between_them() -> None:
    made = between(tensors(2, 3, 4, fill=9.0), "h", (2, 5), {1: inside(1), 5: inside(5)})
    assert [made[f"h.{n}.matrix"].mean().item() for n in (2, 3, 4)] == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(("span", "neighbour", "value"), [((0, 2), 2, 2.0), ((2, 4), 1, 1.0)])
def test_at_the_ends_there_is_one_neighbour(span: tuple[int, int], neighbour: int, value: float) -> None:
    made = between(tensors(*range(*span), fill=9.0), "h", span, {neighbour: inside(neighbour)})
    assert all(torch.all(values == value) for values in made.values())


def test_what_has_no_neighbour_stays_as_it_starts() -> None:
    start = {**tensors(1, fill=9.0), "embed": torch.full((4,), 5.0), "h.1.odd": torch.full((2,), 7.0)}
    start["h.1.bias"] = torch.full((4,), 6.0)  # of another shape than its neighbours'
    made = between(start, "h", (1, 2), {0: inside(0), 2: inside(2)})
    assert made["embed"].tolist() == [5.0] * 4 and made["h.1.odd"].tolist() == [7.0] * 2
    assert made["h.1.bias"].tolist() == [6.0] * 4 and torch.all(made["h.1.matrix"] == 1.0)
    assert between(start, "h", (1, 2), {}) == start


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**30))
def test_every_value_lies_between_its_neighbours(first: int, length: int, gap: int, far: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, after = first, first + gap + length + far + 1
    near = {number: {"w": torch.randn(20, generator=generator)} for number in (before, after)}
    span = (first + gap + 1, first + gap + 1 + length)
    made = between({f"h.{n}.w": torch.zeros(20) for n in range(*span)}, "h", span, near)
    low = torch.minimum(near[before]["w"], near[after]["w"]) - 1e-6
    high = torch.maximum(near[before]["w"], near[after]["w"]) + 1e-6
    assert all(torch.all((low <= made[f"h.{n}.w"]) & (made[f"h.{n}.w"] <= high)) for n in range(*span))


# -- in a swarm -----------------------------------------------------------------------------------------------------


def make_peer(world: World, key: Keypair, holds: Collection[int]) -> Peer:
    peer = Peer(world, key, holds)
    averager = peer.averager
    averager.synchroniser.rebuild = Rebuilder(
        averager.context, averager.synchroniser, SPECS, dict(enumerate(LAYOUTS)),
        own=lambda: {state.fragment: state for state in averager.states()}, blocks_at=lambda: "h",
    ).rebuild
    return peer


def make_swarm(
    make_run: MakeRun, keys: list[Keypair], stages: Collection[Collection[int]], **more: float
) -> tuple[World, list[Peer]]:
    run = make_run({"total_tokens": 10**9}, bits=8, tokens_per_round=2000, max_round_s=20.0)
    world = World(run, *LAYOUTS, **more)  # type: ignore[arg-type]
    peers = [make_peer(world, key, holds) for key, holds in zip(keys, stages, strict=False)]
    for peer in peers:
        peer.start()
    return world, peers


def joining(world: World, key: Keypair, holds: Collection[int]) -> Peer:
    peer = make_peer(world, key, holds)
    for other in list(world.peers.values()):
        if other is not peer and not other.dead:
            peer.hear(other.id, other.status())
    peer.start_beating()
    return peer


def words(peer: Peer) -> str:
    return "\n".join(event.text for event in peer.events if isinstance(event, Warning))


def weights(peer: Peer, fragment: int) -> dict[str, torch.Tensor]:
    [state] = [state for state in peer.averager.states() if state.fragment == fragment]
    return {name: values.clone() for name, values in LAYOUTS[fragment].views(state.weights)}


async def settled(peers: list[Peer]) -> None:
    """Nothing is trained while a fragment is missing, and soon nothing is pending."""
    for peer in peers:
        if not peer.dead:
            await peer.stop_training()
    await asyncio.sleep(30)


def test_the_middle_is_rebuilt_and_said_so_in_capitals(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world, peers = make_swarm(make_run, keys, ((0,), (1,), (2,)), seed=1)
        await asyncio.sleep(60)
        await peers[1].kill()
        await settled(peers)
        newcomer = joining(world, keys[4], (1,))
        assert await newcomer.averager.synchroniser.join() == 0
        assert newcomer.averager.synchroniser.rebuilt == [1]
        assert "FRAGMENT 1 WAS LOST AND IS REBUILT FROM ITS NEIGHBOURS" in words(newcomer)
        fewest = min(peers[0].head_of(0)[2], peers[2].head_of(2)[2])
        version, _, tokens = newcomer.head_of(1)
        assert (version, tokens) == (0, fewest // 2)
        made, low, high = weights(newcomer, 1), weights(peers[0], 0), weights(peers[2], 2)
        for name in ("bias", "matrix"):
            assert torch.equal(made[f"h.1.{name}"], low[f"h.0.{name}"] * 0.5 + high[f"h.2.{name}"] * 0.5)
            parameter = newcomer.parameters[f"h.1.{name}"].detach()
            assert torch.allclose(parameter, made[f"h.1.{name}"], atol=1e-5), "its working weights move there"
        [state] = newcomer.averager.states()
        assert not any(buffer.any() for buffer in state.buffers)
        newcomer.start()
        await asyncio.sleep(40)
        assert newcomer.head_of(1)[0] > 0 and newcomer.head_of(1)[2] > tokens, "rounds go on"

    play(story())


@pytest.mark.parametrize(("lost", "kept"), [(0, "embed"), (2, "norm")])
def test_at_the_ends_what_is_in_no_block_starts_again(
    make_run: MakeRun, keys: list[Keypair], lost: int, kept: str
) -> None:
    async def story() -> None:
        world, peers = make_swarm(make_run, keys, ((0,), (1,), (2,)), seed=2)
        await asyncio.sleep(60)
        await peers[lost].kill()
        await settled(peers)
        newcomer = joining(world, keys[4], (lost,))
        start = weights(newcomer, lost)
        await newcomer.averager.synchroniser.join()
        made, near = weights(newcomer, lost), weights(peers[1], 1)
        assert torch.equal(made[kept], start[kept])
        for number in range(*SPECS[lost].blocks):
            assert torch.equal(made[f"h.{number}.matrix"], near["h.1.matrix"])

    play(story())


@pytest.mark.parametrize("seed", range(4))
def test_peers_that_rebuild_at_the_same_moment_end_with_one_history(
    make_run: MakeRun, keys: list[Keypair], seed: int
) -> None:
    async def story() -> None:
        world, peers = make_swarm(make_run, keys, ((0,), (1,), (2,)), seed=seed)
        await asyncio.sleep(60)
        await peers[1].kill()
        if seed % 2 == 0:
            await settled(peers)  # or the neighbours move on meanwhile, and what is rebuilt differs
        newcomers = [joining(world, key, (1,)) for key in keys[4:6]]
        first = asyncio.create_task(newcomers[0].averager.synchroniser.join())
        await asyncio.sleep(3.0 * (seed % 2))
        await asyncio.gather(first, newcomers[1].averager.synchroniser.join())
        assert all(peer.averager.synchroniser.rebuilt == [1] for peer in newcomers)
        if seed % 2 == 0:
            assert len({peer.head_of(1) for peer in newcomers}) == 1, "the same heads make the same state"
        for peer in newcomers:
            peer.start()
        await asyncio.sleep(60)
        for peer in newcomers:
            await peer.stop_training()
        await asyncio.sleep(30)
        assert len({peer.head_of(1) for peer in newcomers}) == 1
        assert newcomers[0].head_of(1)[0] > 2
        assert any(event.contributors == 2 for event in newcomers[0].rounds())

    play(story())


def test_whoever_comes_back_with_the_state_in_time_is_waited_for(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world, peers = make_swarm(make_run, keys, ((0,), (1,), (2,)), seed=5)
        await asyncio.sleep(60)
        world.part([peers[1].id])
        await settled(peers)
        newcomer = joining(world, keys[4], (1,))
        world.part([peers[1].id])
        newcomer.heard.pop(peers[1].id, None)
        task = asyncio.create_task(newcomer.averager.synchroniser.join())
        await asyncio.sleep(rebuild.PATIENCE_S / 2)
        assert not task.done()
        world.heal()
        newcomer.hear(peers[1].id, peers[1].status())
        assert await task == 1, "downloaded"
        assert newcomer.head_of(1) == peers[1].head_of(1) and not newcomer.averager.synchroniser.rebuilt
        assert "LOST" not in words(newcomer)

    play(story())


def test_the_old_state_wins_when_it_comes_back_with_more_tokens(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world, peers = make_swarm(make_run, keys, ((0,), (1,), (2,)), seed=6)
        await asyncio.sleep(90)
        await settled(peers)
        old = peers[1].head_of(1)
        world.part([peers[1].id])
        newcomer = joining(world, keys[4], (1,))
        world.part([peers[1].id])
        newcomer.heard.pop(peers[1].id, None)
        await newcomer.averager.synchroniser.join()
        assert newcomer.averager.synchroniser.rebuilt == [1]
        newcomer.start()
        await asyncio.sleep(20)
        assert newcomer.head_of(1)[2] < old[2]
        await newcomer.stop_training()
        world.heal()
        await asyncio.sleep(60)
        assert newcomer.head_of(1) == peers[1].head_of(1)
        assert newcomer.head_of(1)[2] >= old[2], "with what was learnt on the rebuilt one in it"

    play(story())


def test_a_run_that_begins_has_lost_nothing(make_run: MakeRun, keys: list[Keypair]) -> None:
    async def story() -> None:
        world, _ = make_swarm(make_run, keys, ((0,), (2,)), seed=7)
        newcomer = joining(world, keys[4], (1,))
        began = asyncio.get_running_loop().time()
        assert await newcomer.averager.synchroniser.join() == 0
        assert asyncio.get_running_loop().time() - began < 1.0 and not newcomer.averager.synchroniser.rebuilt
        newcomer.averager.trust({1: False})
        with pytest.raises(StateError, match="nobody here holds fragment 1"):
            await newcomer.averager.synchroniser.join()

    play(story())


def test_a_copy_on_anybody_s_disk_is_better_than_a_rebuilt_state(
    make_run: MakeRun, keys: list[Keypair], tmp_path: Path
) -> None:
    async def story() -> None:
        world, peers = make_swarm(make_run, keys, ((0,), (1,), (2,)), seed=8)
        await asyncio.sleep(60)
        [state] = peers[1].averager.states()
        await peers[1].kill()
        keeper = peers[0].averager
        disk = make_disk(tmp_path)
        disk._numels = {index: layout.numel for index, layout in enumerate(LAYOUTS)}
        keeper.keep_spares(disk, dict(enumerate(LAYOUTS)))
        assert disk.write(state)
        await asyncio.sleep(3)
        newcomer = joining(world, keys[4], (1,))
        assert await newcomer.averager.synchroniser.join() == 1
        assert newcomer.head_of(1) == (state.version, state.digest, state.tokens)
        assert not newcomer.averager.synchroniser.rebuilt

    play(story())


@pytest.mark.parametrize(("key", "value"), [("source", "somebody/model"), ("lora", LoraConfig())])
def test_weights_that_the_run_began_with_are_nearer_than_any_neighbour(
    key: str, value: object, make_run: MakeRun, keys: list[Keypair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fine-tuning run: its start is in no checkpoint of ours, but on the hub; or its adapters begin as nothing."""
    async def story() -> None:
        world, peers = make_swarm(make_run, keys, ((0,), (1,), (2,)), seed=9)
        object.__setattr__(world.run.model, key, value)
        await asyncio.sleep(60)
        await peers[1].kill()
        await settled(peers)
        newcomer = joining(world, keys[4], (1,))
        start = weights(newcomer, 1)
        await newcomer.averager.synchroniser.join()
        assert "STARTS AGAIN FROM THE RUN'S OWN WEIGHTS" in words(newcomer)
        assert all(torch.equal(values, start[name]) for name, values in weights(newcomer, 1).items())
        assert newcomer.head_of(1)[2] > 0

    play(story())
