"""Calls over the simulated network: answered, refused, lost, given up, and ended with the link."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from swarm.errors import BadMessage, PeerGone, PeerRefused
from tests.unit.averaging.faults.endpoint import Endpoint
from tests.unit.averaging.faults.loop import StepLoop, play
from tests.unit.averaging.faults.network import DIAL_S, Network

Story = Callable[[Endpoint, Endpoint], Coroutine[Any, Any, None]]


def tell(story: Story, *, loss: float = 0.0, twice: float = 0.0) -> None:
    """One process asks, the other answers; the story runs in the first one."""
    async def told(loop: StepLoop) -> None:
        network = Network(loop, random.Random(4), loss=loss, twice=twice, delay_s=0.1)
        one, other = (Endpoint(loop, network, name, loop.process(name)) for name in ("one", "other"))
        for endpoint in (one, other):
            network.arrives(endpoint)
        await one.process.begin(story(one, other))

    play(told, random.Random(1))


def counting(seen: list[tuple[str, dict[str, Any], bytes]]) -> Any:
    async def handler(link: Any, header: dict[str, Any], body: bytes) -> Any:
        seen.append((link.peer_id, header, body))
        return {"count": len(seen)}, body * 2

    return handler


def test_who_asks_is_answered_and_who_tells_is_not() -> None:
    async def story(one: Endpoint, other: Endpoint) -> None:
        seen: list[Any] = []
        other.on("do", counting(seen), max_body=10)
        assert await one.call("other", "do", {"a": 1}, b"xy", deadline_s=5, max_answer=4) == ({"count": 1}, b"xyxy")
        await one.notify("other", "do", {"a": 2}, b"z", deadline_s=5)
        await asyncio.sleep(1)
        assert seen == [("one", {"a": 1}, b"xy"), ("one", {"a": 2}, b"z")]
        assert one.is_linked("other") and other.is_linked("one")

    tell(story)


def test_what_is_not_allowed_is_refused_here_or_there() -> None:
    async def story(one: Endpoint, other: Endpoint) -> None:
        seen: list[Any] = []
        other.on("do", counting(seen), max_body=1)
        for method, body in (("what", b""), ("do", b"xy")):
            with pytest.raises(PeerRefused):
                await one.call("other", method, body=body, deadline_s=5)
        with pytest.raises(BadMessage, match="too long"):
            await one.call("other", "do", body=b"x", deadline_s=5, max_answer=1)
        assert len(seen) == 1

        async def refuses(link: Any, header: dict[str, Any], body: bytes) -> Any:
            raise PeerRefused("not now")

        other.on("do", refuses)
        with pytest.raises(PeerRefused, match="not now"):
            await one.call("other", "do", deadline_s=5)

    tell(story)


def test_what_is_lost_ends_with_the_deadline() -> None:
    async def story(one: Endpoint, other: Endpoint) -> None:
        other.on("do", counting([]))
        began = asyncio.get_running_loop().time()
        with pytest.raises(PeerGone, match="do: no answer within"):
            await one.call("other", "do", deadline_s=7)
        assert asyncio.get_running_loop().time() - began == pytest.approx(7)

    tell(story, loss=1.0)


def test_what_comes_twice_is_done_twice_and_answered_once() -> None:
    async def story(one: Endpoint, other: Endpoint) -> None:
        seen: list[Any] = []
        other.on("do", counting(seen))
        header, _ = await one.call("other", "do", deadline_s=5)
        await asyncio.sleep(5)
        assert header["count"] in (1, 2) and len(seen) == 2, "whichever answer was first"

    tell(story, twice=1.0)


def test_who_gives_up_ends_the_work_for_it() -> None:
    async def story(one: Endpoint, other: Endpoint) -> None:
        ended: list[str] = []

        async def slow(link: Any, header: dict[str, Any], body: bytes) -> Any:
            try:
                await asyncio.sleep(1000)
            finally:
                ended.append("slow")

        other.on("do", slow)
        with pytest.raises(PeerGone):
            await one.call("other", "do", deadline_s=3)
        await asyncio.sleep(1)
        assert ended == ["slow"] and not other.process.left()

    tell(story)


def test_a_call_ends_with_its_link() -> None:
    async def story(one: Endpoint, other: Endpoint) -> None:
        async def dies(link: Any, header: dict[str, Any], body: bytes) -> Any:
            other.process.kill()
            other.network.dies(other)
            await asyncio.sleep(1)

        other.on("do", dies)
        began = asyncio.get_running_loop().time()
        with pytest.raises(PeerGone, match="the link ended"):
            await one.call("other", "do", deadline_s=60)
        assert asyncio.get_running_loop().time() - began < 2
        with pytest.raises(PeerGone, match="cannot reach"):
            await one.call("other", "do", deadline_s=60)

    tell(story)


def test_a_cut_line_cannot_be_dialled() -> None:
    async def story(one: Endpoint, other: Endpoint) -> None:
        one.network.cut({"one"})
        began = asyncio.get_running_loop().time()
        with pytest.raises(PeerGone):
            await one.notify("other", "do", deadline_s=1)
        assert asyncio.get_running_loop().time() - began == pytest.approx(DIAL_S)

    tell(story)


def test_who_is_frozen_answers_when_it_thaws() -> None:
    async def story(one: Endpoint, other: Endpoint) -> None:
        other.on("do", counting([]))
        other.process.frozen = True
        asking = asyncio.ensure_future(one.call("other", "do", deadline_s=60))
        await asyncio.sleep(20)
        assert not asking.done()
        other.process.thaw()
        assert (await asking)[0] == {"count": 1}

    tell(story)
