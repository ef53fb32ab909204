"""Records on a tree of keys, in a DHT that is a dictionary: whoever comes and goes, no record grows with the swarm, and
neighbours find each other."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict

import pytest

from swarm.network.neighbourhood import ELSEWHERE, Neighbourhood
from swarm.network.prefixes import MAX_DEPTH, MOST, place

KEY = "run-000000000000/peers"


class Records:
    """All that a DHT is to a neighbourhood: entries under keys, by writer, that expire."""

    def __init__(self) -> None:
        self.now = 0.0
        self._kept: defaultdict[str, dict[str, tuple[str, float]]] = defaultdict(dict)
        self.reads: Counter[str] = Counter()

    async def entries(self, key: str) -> dict[str, str]:
        self.reads[key] += 1
        return self.under(key)

    def under(self, key: str) -> dict[str, str]:
        return {peer: payload for peer, (payload, expires) in self._kept[key].items() if expires > self.now}

    def sizes(self) -> dict[str, int]:
        return {key: size for key in list(self._kept) if (size := len(self.under(key)))}

    def peer(self, name: str) -> Neighbourhood:
        async def publish(key: str, payload: str, *, ttl_s: float) -> bool:
            self._kept[key][name] = (payload, self.now + ttl_s)
            return True

        return Neighbourhood(KEY, me=name, entries=self.entries, publish=publish)


class Swarm:
    def __init__(self, seed: int = 0) -> None:
        self.dht, self.peers, self.dice = Records(), {}, random.Random(seed)  # type: ignore[var-annotated]

    def join(self, *numbers: int) -> None:
        self.peers |= {f"peer {number}": self.dht.peer(f"peer {number}") for number in numbers}

    async def refresh(self, times: int = 1) -> None:
        """Everybody publishes and looks, one after the other in some order, every 15 s."""
        for _ in range(times):
            self.dht.now += 15.0
            for name in self.dice.sample(sorted(self.peers), len(self.peers)):
                await self.peers[name].publish("here", ttl_s=60.0)
                await self.peers[name].look()

    async def seen(self, name: str) -> set[str]:
        return set(await self.peers[name].look())


def test_a_small_swarm_is_one_record_and_one_read() -> None:
    async def story() -> None:
        swarm = Swarm()
        swarm.join(*range(30))
        await swarm.refresh(2)
        assert swarm.dht.sizes() == {KEY: 30}
        assert await swarm.seen("peer 3") == set(swarm.peers)
        swarm.dht.reads.clear()
        await swarm.refresh(ELSEWHERE)
        assert swarm.dht.reads[KEY] == ELSEWHERE * 30
        assert sum(swarm.dht.reads.values()) == (ELSEWHERE + 1) * 30, "and now and then one elsewhere"
        swarm.join(*range(MOST))
        await swarm.refresh(5)
        assert swarm.dht.sizes() == {KEY: MOST}
        assert {peer.depth for peer in swarm.peers.values()} == {0}

    asyncio.run(story())


@pytest.mark.parametrize("seed", [0, 1])
def test_who_comes_in_turn_never_makes_a_large_record(seed: int) -> None:
    async def story() -> None:
        swarm = Swarm(seed)
        for number in range(300):
            swarm.join(number)
            newcomer = swarm.peers[f"peer {number}"]
            await newcomer.look()
            await newcomer.publish("here", ttl_s=60.0)
            if number % 20 == 0:
                await swarm.refresh()
                assert max(swarm.dht.sizes().values()) <= MOST + 20
        await swarm.refresh(12)
        assert max(swarm.dht.sizes().values()) <= MOST
        assert KEY not in swarm.dht.sizes() and sum(swarm.dht.sizes().values()) == 300
        for name in ("peer 0", "peer 150", "peer 299"):
            depth = swarm.peers[name].depth
            near = {other for other in swarm.peers if place(other)[:depth] == place(name)[:depth]}
            assert near <= await swarm.seen(name), "all its neighbours"

    asyncio.run(story())


def test_many_at_the_same_moment_spread_out_by_themselves() -> None:
    async def story() -> None:
        swarm = Swarm()
        swarm.join(*range(250))
        for peer in swarm.peers.values():
            await peer.publish("here", ttl_s=60.0)
        assert swarm.dht.sizes() == {KEY: 250}
        await swarm.refresh(6)
        assert max(swarm.dht.sizes().values()) <= MOST

    asyncio.run(story())


def test_a_newcomer_finds_its_neighbours_under_an_empty_root() -> None:
    async def story() -> None:
        swarm = Swarm()
        swarm.join(*range(250))
        await swarm.refresh(8)
        swarm.join(999)
        seen = await swarm.seen("peer 999")
        assert len(seen) > MOST // 4
        depth = swarm.peers["peer 999"].depth
        assert depth in {swarm.peers[name].depth for name in seen - {"peer 999"}}
        swarm.dht.reads.clear()
        await swarm.seen("peer 999")
        assert 3 <= len(swarm.dht.reads) <= 4, "from then on around it, and one elsewhere"

    asyncio.run(story())


def test_who_is_left_comes_together_again() -> None:
    async def story() -> None:
        swarm = Swarm()
        swarm.join(*range(250))
        await swarm.refresh(8)
        swarm.peers = {name: swarm.peers[name] for name in list(swarm.peers)[:12]}
        await swarm.refresh(10)
        assert swarm.dht.sizes() == {KEY: 12}
        assert await swarm.seen("peer 3") == set(swarm.peers)

    asyncio.run(story())


def test_who_finds_nobody_stays_at_the_root() -> None:
    async def story() -> None:
        dht = Records()
        alone = dht.peer("me")
        assert await alone.look() == {} and alone.depth == 0
        assert len(dht.reads) == MAX_DEPTH + 1
        dht.reads.clear()
        for _ in range(ELSEWHERE * MAX_DEPTH):
            await alone.look()
        assert len(dht.reads) == MAX_DEPTH + 1, "by and by it looks everywhere"
        assert dht.reads[KEY] == ELSEWHERE * MAX_DEPTH == 4 * (sum(dht.reads.values()) - dht.reads[KEY])
        assert await alone.publish("me", ttl_s=60.0) and await alone.look() == {"me": "me"}

    asyncio.run(story())


def test_strays_at_the_root_find_the_others_by_and_by() -> None:
    async def story() -> None:
        swarm = Swarm()
        swarm.join(*range(250))
        await swarm.refresh(8)
        swarm.join(998, 999)
        for name in ("peer 998", "peer 999"):  # each has found the other one at the root, and so looks no further
            await swarm.peers[name].publish("here", ttl_s=60.0)
        for name in ("peer 998", "peer 999"):
            await swarm.peers[name].look()
        assert swarm.peers["peer 998"].depth == 0
        await swarm.refresh(ELSEWHERE * 5)
        assert swarm.peers["peer 998"].depth > 0 and KEY not in swarm.dht.sizes()

    asyncio.run(story())


def test_keys_are_those_of_old_where_the_swarm_is_small() -> None:
    peer = Records().peer("me")
    assert peer.key_at(0) == KEY and peer.key_at(3) == f"{KEY}/{place('me')[:3]}"
