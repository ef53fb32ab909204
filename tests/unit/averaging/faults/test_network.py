"""Links between two processes: lost, late, twice, cut, and ended with their peers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from swarm.errors import PeerGone
from tests.unit.averaging.faults.loop import StepLoop, play
from tests.unit.averaging.faults.network import DIAL_S, STALL_S, Link, Network


class Party:
    def __init__(self, loop: StepLoop, network: Network, name: str) -> None:
        self.id, self.process = name, loop.process(name)
        self.network, self.heard, self.closed = network, list[int](), list[Link]()
        network.arrives(self)

    def on_link_closed(self, link: Link) -> None:
        self.closed.append(link)

    def say(self, other: Party, number: int) -> None:
        link = self.network.try_link(self, other.id)
        assert link is not None
        self.network.send(link, self, lambda: other.heard.append(number))

    def die(self) -> None:
        self.process.kill()
        self.network.dies(self)


Story = Callable[[Network, Party, Party], Coroutine[Any, Any, None]]


def tell(story: Story, *, loss: float = 0.0, twice: float = 0.0, delay_s: float = 0.1) -> None:
    async def told(loop: StepLoop) -> None:
        network = Network(loop, random.Random(2), loss=loss, twice=twice, delay_s=delay_s)
        await story(network, Party(loop, network, "a"), Party(loop, network, "b"))

    play(told, random.Random(1))


def test_messages_come_late_and_in_another_order() -> None:
    async def story(network: Network, a: Party, b: Party) -> None:
        for number in range(100):
            a.say(b, number)
        assert not b.heard
        await asyncio.sleep(1)
        assert sorted(b.heard) == list(range(100)) and b.heard != list(range(100))

    tell(story)


def test_some_are_lost_and_some_come_twice() -> None:
    async def story(network: Network, a: Party, b: Party) -> None:
        for number in range(400):
            a.say(b, number)
        await asyncio.sleep(2)
        times = [b.heard.count(number) for number in range(400)]
        assert 60 < times.count(0) < 150 and 30 < times.count(2) < 110 and max(times) == 2

    tell(story, loss=0.3, twice=0.2)


def test_a_line_that_is_cut_holds_back_what_is_sent_until_it_is_mended() -> None:
    async def story(network: Network, a: Party, b: Party) -> None:
        a.say(b, 1)
        await asyncio.sleep(1)
        network.cut({"a"})
        a.say(b, 2)
        await asyncio.sleep(STALL_S / 2)
        assert b.heard == [1] and network.is_linked(a, "b"), "nobody has noticed yet"
        network.heal({"a"})
        await asyncio.sleep(1)
        assert b.heard == [1, 2] and not a.closed

    tell(story)


def test_a_line_that_is_cut_for_long_loses_its_links() -> None:
    async def story(network: Network, a: Party, b: Party) -> None:
        a.say(b, 1)
        network.cut({"a"})
        await asyncio.sleep(STALL_S + 1)
        assert not network.is_linked(a, "b") and len(a.closed) == len(b.closed) == 1 and not b.heard
        began = asyncio.get_running_loop().time()
        with pytest.raises(PeerGone):
            await network.dial(a, "b")
        assert asyncio.get_running_loop().time() - began == DIAL_S
        network.heal({"a"})
        assert await network.dial(a, "b") is not None
        await asyncio.sleep(1)
        assert not b.heard, "it was sent on a link that is no more"

    tell(story)


def test_the_end_of_a_process_is_noticed_soon_and_nobody_listens_then() -> None:
    async def story(network: Network, a: Party, b: Party) -> None:
        a.say(b, 1)
        b.die()
        await asyncio.sleep(1)
        assert len(a.closed) == 1 and not b.closed and not b.heard, "the dead hear of nothing"
        with pytest.raises(PeerGone):
            await network.dial(a, "b")
        assert network.try_link(b, "a") is None

    tell(story)


def test_a_new_process_gets_nothing_of_what_was_for_the_old_one() -> None:
    async def story(network: Network, a: Party, b: Party) -> None:
        a.say(b, 1)
        b.die()
        again = Party(asyncio.get_running_loop(), network, "b")  # type: ignore[arg-type]
        a.say(again, 2)
        await asyncio.sleep(1)
        assert not b.heard and again.heard in ([2], [])
        a.say(again, 3)
        await asyncio.sleep(1)
        assert again.heard[-1] == 3

    tell(story)


def test_two_cuts_are_mended_one_by_one() -> None:
    async def story(network: Network, a: Party, b: Party) -> None:
        network.cut({"a"})
        network.cut({"a", "c"})
        assert not network.can_talk("a", "b") and not network.can_talk("a", "c") and network.can_talk("b", "d")
        network.heal({"a"})
        assert not network.can_talk("a", "b") and network.can_talk("a", "c")
        network.heal({"a", "c"})
        assert network.can_talk("a", "b")

    tell(story)


def test_who_is_alone_has_no_links() -> None:
    async def story(network: Network, a: Party, b: Party) -> None:
        assert network.try_link(a, "a") is None and network.try_link(a, "nobody") is None
        assert not network.is_linked(a, "b") and not network.is_linked(a, "nobody")

    tell(story)
