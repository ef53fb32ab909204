"""A directory counts those who have spoken to it: in a crowd it waits longer, and no longer once they are gone."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from swarm.network import directory as directories
from swarm.network.beats import Beat
from swarm.network.directory import FEW, MAX_SLOWNESS, Directory
from swarm.network.records import Status

RUN = "run-0123456789ab"


class NoEndpoint:
    peer_id = "me"

    def on(self, method: str, answer: Any) -> None:
        pass


def status(**more: Any) -> Status:
    return Status(**{"run_id": RUN, "name": "quick otter", "role": "trainer", "maddrs": [], **more})


def test_its_patience_follows_the_number_of_those_who_are_there() -> None:
    async def story() -> None:
        endpoint: Any = NoEndpoint()
        directory = Directory(endpoint, endpoint, run_id=RUN, my_status=status, rng=random.Random(0))
        crowd = [f"{number:040}" for number in range(2 * FEW)]
        for peer_id in crowd:
            directory.meet(peer_id, ["/ip4/10.0.0.1/tcp/1"])
        assert directory._slowness() == 1.0 and not directory.alive(), "others' words are no word of theirs"
        for peer_id in crowd:
            directory._hear(peer_id, Beat(status=status()))
        assert directory._slowness() == 2.0 and set(directory.alive()) == set(crowd)
        for known in directory._known.values():
            known.heard_at -= 1.5 * directories.ALIVE_S
        assert set(directory.alive()) == set(crowd), "silent for longer than among a few, and alive"
        for peer_id in crowd[:FEW]:
            directory._hear(peer_id, Beat(status=status(role="observer")))
        assert directory._slowness() == 1.0 and not directory.alive()
        for number in range(10 * FEW):
            directory._hear(f"{number:040}", Beat(status=status()))
        assert directory._slowness() == MAX_SLOWNESS

    asyncio.run(story())
