"""Swarms of peers that hold some of three fragments each: A {0}, B {0, 1}, C {1, 2}, D {2} unless said otherwise."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection

from swarm.averaging.held import HeldFragment
from swarm.averaging.layout import Layout, layout_of
from swarm.config import RunConfig
from swarm.model.fragments import FragmentSpec, TensorSpec
from swarm.network.keys import Keypair
from swarm.network.records import Head
from tests.unit.averaging.simulation import Peer, World

STAGES = ((0,), (0, 1), (1, 2), (2,))

LAYOUTS: tuple[Layout, ...] = tuple(
    layout_of(FragmentSpec(index, (index, index + 1), (
        TensorSpec(f"{index}.bias", (10,), fine=True), TensorSpec(f"{index}.matrix", (rows, 40), fine=False),
    ))) for index, rows in enumerate((40, 64, 20))
)
"""three fragments of different lengths: a mix-up would not go unnoticed"""


def make_world(
    make_run: Callable[..., RunConfig], keys: list[Keypair], stages: Collection[Collection[int]] = STAGES,
    **more: float,
) -> World:
    run = make_run({"total_tokens": 10**9}, bits=4, tokens_per_round=2000, max_round_s=20.0)
    world = World(run, *LAYOUTS, **more)  # type: ignore[arg-type]
    for key, holds in zip(keys, stages, strict=False):
        Peer(world, key, holds)
    return world


def start_all(world: World) -> list[Peer]:
    for peer in world.peers.values():
        peer.start()
    return list(world.peers.values())


def alive(world: World) -> list[Peer]:
    return [peer for peer in world.peers.values() if not peer.dead]


def holders(world: World, fragment: int) -> list[Peer]:
    return [peer for peer in alive(world) if fragment in peer.averager.held()]


def fragment_of(peer: Peer, index: int) -> HeldFragment:
    return peer.averager._fragments[index]


def trained(world: World, fragment: int) -> int:
    """Tokens, of the dead as well."""
    return sum(peer.trained_in[fragment] for peer in world.peers.values())


def head_in(peer: Peer, fragment: int) -> Head:
    version, digest, tokens = peer.head_of(fragment)
    return Head(version=version, digest=digest, tokens=tokens)


def committed(world: World, fragment: int) -> int:
    return max((peer.head_of(fragment)[2] for peer in holders(world, fragment)), default=0)


def check_truth(world: World) -> None:
    """I1: of every version of a fragment that two peers stand at, there is one digest."""
    digests: dict[tuple[int, int], set[str]] = {}
    for peer, fragment in itertools.product(alive(world), range(len(LAYOUTS))):
        if fragment in peer.averager.held():
            version, digest, _ = peer.head_of(fragment)
            digests.setdefault((fragment, version), set()).add(digest)
    assert all(len(found) == 1 for found in digests.values()), digests


def check_rounds(world: World) -> None:
    """Nobody applied a round of a fragment that it does not hold, and nobody was in one."""
    for peer in alive(world):
        assert {event.fragment for event in peer.rounds()} <= set(peer.averager.held())
        for index in peer.averager.held():
            fragment = fragment_of(peer, index)
            ids = {holder.id for holder in world.peers.values() if index in holder.ever_held}
            for version in range(1, fragment.ledger.state.version + 1):
                commit = fragment.applier.history.commit(version)
                assert commit is None or set(commit.opening.members) <= ids, (index, version)


async def settle(world: World, *, limit_s: float = 120.0) -> None:
    """Everybody stops training; wait until all that was trained is in rounds that all holders of each fragment have."""
    for peer in alive(world):
        await peer.stop_training()
        peer.averager.leaving = True
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_s

    def is_settled() -> bool:
        level = all(len({p.head_of(f) for p in holders(world, f)}) <= 1 for f in range(len(LAYOUTS)))
        return level and not any(any(peer.averager.pending()) for peer in alive(world))

    while not is_settled():
        assert loop.time() < deadline, [(p.averager.heads(), p.averager.pending()) for p in alive(world)]
        await asyncio.sleep(0.5)


async def until(condition: Callable[[], bool], *, limit_s: float = 60.0) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_s
    while not condition():
        assert loop.time() < deadline, "it does not come to that"
        await asyncio.sleep(0.2)
