"""Meeting the others: who has met them begins, and tells the DHT of the run meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from swarm.network.records import Head, Status
from swarm.train import arrival
from swarm.train.arrival import Arrival, covers
from tests.unit.averaging.simulation import play

PUBLISHING_S = 9.0


class Directory:
    """Of peers that have all told their status."""

    def __init__(self, alive: dict[str, Status]) -> None:
        self._alive, self.told, self.met = alive, list[str](), list[str]()

    def alive(self) -> dict[str, Status]:
        return self._alive

    def known(self) -> list[str]:
        return list(self._alive)

    def meet(self, peer_id: str, maddrs: list[str]) -> None:
        self.met.append(peer_id)

    async def tell(self, peer_id: str) -> None:
        self.told.append(peer_id)

    async def refresh(self) -> None:
        await asyncio.sleep(0.1)


def holder(serving: list[int]) -> Status:
    head = Head(version=1, digest="0" * 64, tokens=0)
    heads = [head if serving[0] <= fragment < serving[1] else None for fragment in range(2)]
    return Status(run_id="toy-0123456789ab", name="n", role="trainer", heads=heads, serving=serving)


async def met(monkeypatch: pytest.MonkeyPatch, alive: dict[str, Status], publish: Any) -> tuple[int, float]:
    """(others, seconds until we knew)."""
    monkeypatch.setattr(arrival.join, "publish_run", publish)
    directory = Directory(alive)
    network = SimpleNamespace(
        peer_id="me", dht=None, directory=directory, start_directory=lambda **options: None,
    )
    made = Arrival(SimpleNamespace(), SimpleNamespace(), network)  # type: ignore[arg-type]
    began = asyncio.get_running_loop().time()
    count = await made.meet(SimpleNamespace(run_id="r", fragments=2), lambda: holder([0, 1]))  # type: ignore[arg-type]
    assert directory.told == list(alive)
    return count, asyncio.get_running_loop().time() - began


@pytest.mark.parametrize("fails", [False, True])
def test_who_has_met_others_does_not_wait_until_the_run_is_published_again(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    done: list[list[str]] = []

    async def publish(dht: Any, run: Any, others: list[str], me: str) -> None:
        await asyncio.sleep(PUBLISHING_S)
        done.append(others)
        if fails:
            raise OSError("out of reach")

    async def story() -> None:
        count, took_s = await met(monkeypatch, {"a": holder([0, 1]), "b": holder([1, 2])}, publish)
        assert count == 2 and took_s < 1.0 and not done
        await asyncio.sleep(PUBLISHING_S + 1)
        assert done == [["a", "b"]]

    play(story())


def test_who_is_alone_is_found_from_the_moment_that_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[str]] = []

    async def publish(dht: Any, run: Any, others: list[str], me: str) -> None:
        await asyncio.sleep(PUBLISHING_S)
        done.append(others)

    async def story() -> None:
        count, took_s = await met(monkeypatch, {}, publish)
        assert count == 0 and took_s > PUBLISHING_S and done == [[]]

    play(story())


def test_a_fragment_that_nobody_holds_is_not_covered() -> None:
    assert covers([holder([0, 1]), holder([1, 2])], 2)
    assert not covers([holder([0, 1]), holder([0, 1])], 2) and not covers([], 1)
