"""Meeting the others: who has met them begins, and tells the DHT of the run meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from swarm.errors import PeerGone
from swarm.network import reachability
from swarm.network.records import Head, Status
from swarm.train import arrival
from swarm.train.arrival import Arrival, covers
from tests.unit.averaging.simulation import play

PUBLISHING_S = 9.0
RUN = SimpleNamespace(run_id="r", fragments=2)
RTT_S = 0.1
DIALLED_S = 10.0
"""until a machine that has lost its power is given up"""
REACHED_S = 0.25
"""seconds in which a peer that was called has found out whether others can dial it"""


class Directory:
    """Of peers that tell their status when they are asked, which takes as long as finding them in the DHT."""

    def __init__(self, others: dict[str, Status], *, in_dht: bool = True, dead: tuple[str, ...] = ()) -> None:
        self._others, self._in_dht, self._dead = others, in_dht, dead
        self.reach = ""
        self.told, self.met = list[str](), list[str]()

    def alive(self) -> dict[str, Status]:
        return {p: self._others[p] for p in self.told if p in self._others and p not in self._dead}

    def known(self) -> list[str]:
        return self.met

    def meet(self, peer_id: str, maddrs: list[str]) -> None:
        if peer_id not in self.met:
            self.met.append(peer_id)

    async def tell(self, peer_id: str) -> None:
        await asyncio.sleep(DIALLED_S if peer_id in self._dead else RTT_S)
        self.told.append(peer_id)

    async def refresh(self) -> None:
        await asyncio.sleep(RTT_S)
        for peer_id in self._others if self._in_dht else ():
            self.meet(peer_id, [])


class Endpoint:
    def __init__(self, dead: tuple[str, ...]) -> None:
        self._dead, self._linked = dead, set[str]()

    async def link_to(self, peer_id: str, *, maddrs: list[str]) -> None:
        await asyncio.sleep(DIALLED_S if peer_id in self._dead else RTT_S)
        if peer_id in self._dead:
            raise PeerGone("no answer in time")
        self._linked.add(peer_id)

    def is_linked(self, peer_id: str) -> bool:
        return peer_id in self._linked


def holder(serving: list[int], maddrs: list[str] | None = None) -> Status:
    head = Head(version=1, digest="0" * 64, tokens=0)
    heads = [head if serving[0] <= fragment < serving[1] else None for fragment in range(2)]
    return Status(
        run_id="toy-0123456789ab", name="n", role="trainer", heads=heads, serving=serving, maddrs=maddrs or []
    )


class Dht:
    def __init__(self, others: dict[str, Status]) -> None:
        self._others = others

    async def statuses(self, run_id: str) -> dict[str, Status]:
        await asyncio.sleep(RTT_S)
        return self._others


def arriving(
    monkeypatch: pytest.MonkeyPatch, others: dict[str, Status], publish: Any, *, answered: tuple[str, ...] = (),
    in_dht: bool = True, dead: tuple[str, ...] = (),
) -> tuple[Arrival, Directory]:
    """`answered`: those of the initial peers that did; `dead`: still in the DHT."""
    async def ask(endpoint: Any, peers: list[str], *, port: int | None) -> reachability.Situation:
        await asyncio.sleep(REACHED_S)
        return reachability.Situation(reachability.PUBLIC, f"as {len(peers)} see it")

    monkeypatch.setattr(arrival.join, "publish_run", publish)
    monkeypatch.setattr(arrival.reachability, "ask", ask)
    directory = Directory(others, in_dht=in_dht, dead=dead)
    network = SimpleNamespace(
        peer_id="me", dht=Dht(others), directory=directory, start_directory=lambda **options: None, maddrs=[],
        endpoint=Endpoint(dead),
    )
    made = Arrival(SimpleNamespace(), SimpleNamespace(), network)  # type: ignore[arg-type]
    made._answered = list(answered)
    return made, directory


async def met(monkeypatch: pytest.MonkeyPatch, others: dict[str, Status], publish: Any) -> tuple[int, float]:
    """(others, seconds until we knew)."""
    made, directory = arriving(monkeypatch, others, publish)
    began = asyncio.get_running_loop().time()
    count = await made.arrive(RUN, lambda: holder([0, 1]))  # type: ignore[arg-type]
    assert sorted(directory.told) == sorted(others)
    return count, asyncio.get_running_loop().time() - began


async def nothing(*_: Any) -> None:
    """Publishing."""


def test_the_others_are_met_while_they_find_out_whether_this_peer_can_be_dialled(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        others = {"a": holder([0, 1]), "b": holder([1, 2])}
        made, directory = arriving(monkeypatch, others, nothing, answered=("a",))
        began = asyncio.get_running_loop().time()
        assert await made.arrive(RUN, lambda: holder([0, 1])) == 2  # type: ignore[arg-type]
        assert asyncio.get_running_loop().time() - began == pytest.approx(RTT_S + REACHED_S)
        assert directory.reach == made.situation.reach == reachability.PUBLIC and "as 1 see it" in made.situation.text
        assert made.situated_s >= 0 and directory.told == ["a", "b"]  # each once: "a" while the DHT was read

    play(story())


def test_nobody_waits_long_for_machines_that_lost_their_power_and_are_still_in_the_dht(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        others = {name: holder([0, 2], [f"/ip4/10.0.0.{number}/tcp/1"]) for number, name in enumerate("abc")}
        made, directory = arriving(monkeypatch, others, nothing, answered=("a",), dead=("b", "c"))
        began = asyncio.get_running_loop().time()
        assert await made.arrive(RUN, lambda: holder([0, 1])) == 1  # type: ignore[arg-type]
        assert asyncio.get_running_loop().time() - began < arrival.LATE_S + 2 * RTT_S + REACHED_S + 0.01
        assert directory.told == ["a"] and "as 1 see it" in made.situation.text, "the dead are not asked"

    play(story())


def test_who_is_being_asked_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        others = {"a": holder([0, 1]), "b": holder([1, 2])}
        made, directory = arriving(monkeypatch, others, nothing, answered=("a",), dead=("b",))
        await made.arrive(RUN, lambda: holder([0, 1]))  # type: ignore[arg-type]
        await asyncio.sleep(2 * DIALLED_S)
        assert directory.told.count("b") == 1 and directory.told.count("a") > 2

    play(story())


def test_who_has_not_heard_of_every_fragment_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a swarm starts at once: those who are there have no state yet."""
    async def story() -> None:
        others = {"a": holder([0, 1])}
        made, directory = arriving(monkeypatch, others, nothing, answered=("a",))
        asyncio.get_running_loop().call_later(1.0, lambda: others.update(a=holder([0, 2])))
        began = asyncio.get_running_loop().time()
        assert await made.arrive(RUN, lambda: holder([0, 1])) == 1  # type: ignore[arg-type]
        assert 1.0 < asyncio.get_running_loop().time() - began < 2.0 and len(directory.told) > 2

    play(story())


def test_who_hears_of_no_more_goes_on_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        made, _ = arriving(monkeypatch, {"a": holder([0, 1])}, nothing, answered=("a",), in_dht=False)
        began = asyncio.get_running_loop().time()
        assert await made.arrive(RUN, lambda: holder([0, 1])) == 1  # type: ignore[arg-type]
        assert arrival.MEET_S <= asyncio.get_running_loop().time() - began < arrival.MEET_S + 1.0

    play(story())


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
