"""Which head to believe: who is asked, whose word counts, and that the silent and the liars know nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.averaging.attestation import ASK_S, MAX_ASKED, ranked, who_knows
from swarm.errors import PeerGone, PeerRefused
from swarm.network.records import Head

HEAD = Head(version=3, digest="a" * 64, tokens=700)


class Others:
    """Endpoint and directory; `answers`: what each peer says, or raises."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.asked = answers, list[str]()

    def maddrs(self, peer_id: str) -> list[str]:
        return [f"/ip4/192.0.2.1/tcp/1/p2p/{peer_id}"]

    async def call(
        self, peer_id: str, method: str, header: dict[str, Any], *, deadline_s: float, maddrs: Iterable[str]
    ) -> tuple[dict[str, Any], bytes]:
        assert method == "knows" and deadline_s == ASK_S and list(maddrs) == self.maddrs(peer_id)
        assert header == {"fragment": 2, "version": 3, "digest": "a" * 64}
        self.asked.append(peer_id)
        answer = self.answers[peer_id]
        if isinstance(answer, Exception):
            raise answer
        return answer, b""


def ask(answers: dict[str, Any]) -> tuple[list[str], list[str]]:
    others = Others(answers)
    found = asyncio.run(who_knows(others, others, answers, fragment=2, head=HEAD))  # type: ignore[arg-type]
    return found, others.asked


def test_who_says_so_knows_it_and_nobody_else() -> None:
    found, asked = ask({
        "yes": {"known": True}, "no": {"known": False}, "gone": PeerGone("no answer"), "joins": PeerRefused("joining"),
        "mumbles": {}, "nearly": {"known": 1}, "text": {"known": "True"}, "too": {"known": True},
    })
    assert found == ["yes", "too"] and len(asked) == 8


def test_only_so_many_are_asked() -> None:
    found, asked = ask({f"{number}": {"known": True} for number in range(3 * MAX_ASKED)})
    assert found == asked == [f"{number}" for number in range(MAX_ASKED)]


def test_nobody_to_ask_is_no_error() -> None:
    assert ask({}) == ([], [])


heads = st.builds(
    Head, version=st.integers(0, 5), digest=st.sampled_from(["a" * 64, "b" * 64, "c" * 64]), tokens=st.integers(0, 9)
)


@given(st.lists(heads, max_size=12))
def test_the_order_is_the_same_for_everybody(found: list[Head]) -> None:
    order = ranked(found)
    assert order == ranked(found[::-1]) and set(order) == set(found) and len(order) == len(set(found))
    for one, two in zip(order, order[1:], strict=False):
        assert one.tokens > two.tokens or (one.tokens == two.tokens and one.digest <= two.digest)


@pytest.mark.parametrize("more", [1, 100])
def test_more_tokens_win_over_a_later_version(more: int) -> None:
    """Versions count rounds, and a lone half of a parted swarm makes many small ones."""
    small, large = Head(version=90, digest="0" * 64, tokens=500), Head(version=7, digest="f" * 64, tokens=500 + more)
    assert ranked([small, large])[0] == large
