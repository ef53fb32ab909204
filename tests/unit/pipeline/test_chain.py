"""The chain: exact gradients whatever the cut, and whatever happens on the way (I2, I6)."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
import torch

from tests.unit.averaging.simulation import play
from tests.unit.pipeline.chains import Peer, World, finish, largest_error, sums
from tests.unit.pipeline.toy import in_one_process, microbatches


CUTS = [
    stages for count in (1, 2, 3, 4)
    for edges in itertools.combinations(range(1, 4), count - 1)
    for stages in [list(itertools.pairwise([0, *edges, 4]))]
]


@pytest.mark.parametrize("stages", [*CUTS, [(0, 3), (1, 4)], [(0, 2), (1, 3), (2, 4)], [(0, 4), (2, 4)]])
def test_every_cut_has_the_gradients_of_one_process(stages: list[tuple[int, int]]) -> None:
    texts = microbatches(12, seed=1)
    wanted, losses = in_one_process(4, texts)

    async def story() -> None:
        world = World(4, seed=1)
        peers = [Peer(world, f"peer{i}", *stage) for i, stage in enumerate(stages)]
        await finish([peers[0].origin(texts)])
        assert largest_error(sums(world), wanted) < 1e-5
        assert sorted(peers[0].losses) == pytest.approx(sorted(losses), rel=1e-5)
        assert all(peer.compute.in_flight == 0 for peer in peers), "nothing waits for a verdict that has come"

    play(story())


@pytest.mark.parametrize("seed", range(12))
def test_kills_freezes_delays_and_repeated_calls_lose_nothing_and_count_nothing_twice(seed: int) -> None:
    texts = [microbatches(40, seed=seed), microbatches(40, seed=100 + seed)]
    wanted, _ = in_one_process(4, texts[0] + texts[1])
    dice = random.Random(seed)

    async def story() -> None:
        world = World(4, seed=seed, twice=0.1)
        origins = [Peer(world, "origin0", 0, 1), Peer(world, "origin1", 0, 2)]
        stages = [(1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (1, 4)]
        count = itertools.count()
        others = [Peer(world, f"peer{next(count)}", *stage) for stage in stages]

        async def mischief() -> None:
            while True:
                await asyncio.sleep(dice.expovariate(1 / 0.7))
                victim = dice.choice(others)
                if dice.random() < 0.5:
                    victim.freeze(dice.uniform(0.5, 12))
                    continue
                victim.kill()
                others.remove(victim)
                others.append(Peer(world, f"peer{next(count)}", victim.first, victim.end))
                asyncio.get_running_loop().call_later(6, setattr, victim, "forgotten", True)

        trouble = asyncio.ensure_future(mischief())
        made = [peer.origin(own) for peer, own in zip(origins, texts, strict=True)]
        await finish(made)
        trouble.cancel()
        assert [origin.lost_tokens for origin, _ in made] == [0, 0]
        assert sum(len(peer.losses) for peer in origins) == 80
        assert sum(peer.chain.reroutes for peer in world.peers.values()) > 0, "there was trouble"
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())
