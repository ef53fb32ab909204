"""Holders of fragments: each renewed in time, found by who needs them, and only as many as need be."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from swarm.network import holders as files
from swarm.network.dht import Dht
from swarm.network.holders import RENEWALS, TTL_S, Holders, wanted
from swarm.network.keys import Keypair
from swarm.network.neighbourhood import Neighbourhood

RUN_ID = "run-000000000000"
KEYS = [Keypair(bytes([number]) * 32) for number in range(1, 5)]


class Kept:
    """A DHT that keeps everything: key -> peer id -> payload."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, str]] = {}
        self.stores: list[tuple[str, float]] = []

    def of(self, key: Keypair) -> Holders:
        async def entries(name: str) -> dict[str, str]:
            return dict(self.kept.get(name, {}))

        async def publish(name: str, payload: str, *, ttl_s: float) -> bool:
            self.stores.append((name, ttl_s))
            self.kept.setdefault(name, {})[key.peer_id] = payload
            return True

        class Here(Dht):
            def __init__(self) -> None:
                pass

            def neighbourhood(self, name: str) -> Neighbourhood:
                return Neighbourhood(name, me=key.peer_id, entries=entries, publish=publish)

        return Holders(Here(), RUN_ID, me=key.peer_id)


def test_all_fragments_are_published_in_turn_and_stay_until_their_next() -> None:
    async def story() -> None:
        dht = Kept()
        holders = dht.of(KEYS[0])
        most = 0
        for _ in range(RENEWALS):
            before = len(dht.stores)
            await holders.publish(range(30), maddrs=["/ip4/127.0.0.1/tcp/1"], reach="public")
            most = max(most, len(dht.stores) - before)
        assert most == 8
        assert sorted(dht.kept) == sorted(f"{RUN_ID}/holders/{fragment}" for fragment in range(30))
        assert {ttl_s for _, ttl_s in dht.stores} == {TTL_S} and TTL_S > 60 * 1.2 * RENEWALS

    asyncio.run(story())


def test_who_needs_a_fragment_finds_others_with_it() -> None:
    async def story() -> None:
        dht = Kept()
        for number, key in enumerate(KEYS[:3]):
            for _ in range(RENEWALS):
                await dht.of(key).publish([number], maddrs=[f"/ip4/127.0.0.1/tcp/{number}"], reach="punched")
        mine = dht.of(KEYS[0])
        assert await mine.look([]) == [] == await mine.look([0]), "not itself"
        found = [contact for _ in range(3) for contact in await mine.look([0, 1, 2])]
        assert [(c.peer_id, c.maddrs, c.reach) for c in found] == [
            (KEYS[number].peer_id, [f"/ip4/127.0.0.1/tcp/{number}"], "punched") for number in (1, 2)
        ]

    asyncio.run(story())


def test_nonsense_is_passed_over() -> None:
    async def story() -> None:
        dht = Kept()
        stranger: dict[str, Any] = {"peer_id": KEYS[3].peer_id, "maddrs": []}
        of_another = json.dumps(stranger)
        dht.kept[f"{RUN_ID}/holders/0"] = {
            KEYS[1].peer_id: "{", KEYS[2].peer_id: of_another, KEYS[3].peer_id: json.dumps(stranger | {"x": 1}),
        }
        assert await dht.of(KEYS[0]).look([0]) == []
        dht.kept[f"{RUN_ID}/holders/0"][KEYS[3].peer_id] = json.dumps(stranger)
        assert [contact.peer_id for contact in await dht.of(KEYS[0]).look([0])] == [KEYS[3].peer_id]

    asyncio.run(story())


def test_wanted_are_ones_own_fragments_and_those_beside_them() -> None:
    assert wanted([], 4) == []
    assert wanted([0, 1], 4) == [0, 1, 2] and wanted([3], 4) == [2, 3] and wanted(range(4), 4) == [0, 1, 2, 3]
    assert files.RENEWALS > 0
