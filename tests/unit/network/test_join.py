"""Dialling all that are known: who is gone does not hold up who comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, cast

import pytest

from swarm.errors import JoinError, PeerGone
from swarm.network import join
from swarm.network.endpoint import Endpoint
from swarm.network.keys import Keypair
from swarm.network.link import Link
from tests.unit.averaging.simulation import play

FIRST, SECOND, GONE = (Keypair(bytes([number]) * 32).peer_id for number in (1, 2, 3))


class Dialler:
    """Stands in for the endpoint: answers come after so many seconds; None: never."""

    def __init__(self, answers_s: dict[str, float | None]) -> None:
        self._answers_s = answers_s
        self.skews_s: dict[str, float] = {}

    async def link_to(self, peer_id: str, *, maddrs: Iterable[str] = ()) -> Link:
        after_s = self._answers_s[peer_id]
        if after_s is None:
            await asyncio.sleep(1000.0)
            raise PeerGone("it is gone")
        await asyncio.sleep(after_s)
        return Link.__new__(Link)


def connected(answers_s: dict[str, float | None], deadline_s: float = 10.0) -> tuple[list[str], float]:
    """(who answered, after how many seconds we knew)."""
    found: list[Any] = []

    async def story() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        maddrs = [f"/ip4/10.0.0.1/tcp/{port}/p2p/{peer_id}" for port, peer_id in enumerate(answers_s, 1)]
        endpoint = cast(Endpoint, Dialler(answers_s))
        found.extend([await join.connect(endpoint, maddrs, deadline_s=deadline_s), loop.time() - began])

    play(story())
    return found[0], found[1]


@pytest.mark.parametrize(("first_s", "until_s"), [
    (0.05, 0.05 + join.SOONEST_S), (1.5, 3.0), (5.0, 5.0 + join.OTHERS_S),
])  # fmt: skip
def test_who_is_gone_is_waited_for_as_long_again_as_the_first_took(first_s: float, until_s: float) -> None:
    answered, took_s = connected({FIRST: first_s, GONE: None})
    assert answered == [FIRST]
    assert took_s == pytest.approx(until_s)


def test_those_who_answer_a_little_later_are_in() -> None:
    answered, took_s = connected({FIRST: 0.4, SECOND: 0.7, GONE: None})
    assert set(answered) == {FIRST, SECOND}
    assert took_s == pytest.approx(0.4 + join.SOONEST_S)


def test_nobody_is_waited_for_where_all_have_answered() -> None:
    assert connected({FIRST: 0.1, SECOND: 0.2})[1] == pytest.approx(0.2)


def test_nobody_there_is_an_error_with_a_line_for_each() -> None:
    with pytest.raises(JoinError, match="none of the 2 initial peers answered") as caught:
        connected({FIRST: None, GONE: None}, deadline_s=4.0)
    assert "/tcp/1" in str(caught.value) and "/tcp/2" in str(caught.value)
