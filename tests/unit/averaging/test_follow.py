"""Coming level with whoever is ahead, by commits or by a download, and what is thought of those who only say that they
are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from swarm.averaging.follow import DISTRUST_S, FOLLOW_AFTER_S
from swarm.averaging.held import HeldFragment
from swarm.errors import PeerGone
from swarm.network.records import Head
from tests.unit.averaging.four_peers import Tell, learn, meet, open_round
from tests.unit.averaging.simulation import Peer


def held(peer: Peer) -> HeldFragment:
    return peer.averager._fragments[0]


def head_of(peer: Peer) -> Head:
    version, digest, tokens = peer.head
    return Head(version=version, digest=digest, tokens=tokens)


def hear(peer: Peer, other: Peer, head: Head | None = None) -> None:
    peer.averager._follower.heard(held(peer), other.id, head or head_of(other))


async def rounds_without(away: Peer, others: list[Peer], *, count: int) -> None:
    for _ in range(count):
        learn(others[0], 0.01, 50)
        assert await open_round(others) is not None
        await asyncio.sleep(1)
    assert len({peer.head for peer in others}) == 1 and away.head[0] == 0


@pytest.mark.parametrize("count", [1, 2, 7])
def test_who_missed_rounds_follows_the_commits_and_keeps_its_drift(tell: Tell, count: int) -> None:
    async def story(peers: list[Peer]) -> None:
        away, others = peers[3], peers[:3]
        await rounds_without(away, others, count=count)
        hear(away, others[1])
        await asyncio.sleep(FOLLOW_AFTER_S + 3 * count)
        assert away.head == others[0].head
        assert away.averager.pending() == [400] and not held(away).following

    tell(story)


def test_a_commit_that_comes_by_itself_in_time_is_not_asked_for(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        away, others = peers[3], peers[:3]
        await rounds_without(away, others, count=1)
        asked = []
        commits = others[0].methods["commits"]

        async def counted(*arguments: Any) -> Any:
            asked.append(1)
            return await commits(*arguments)

        others[0].methods["commits"] = counted
        hear(away, others[0])
        commit = held(others[0]).applier.history.commit(1)
        assert commit is not None
        for result in commit.results:  # so that it need not fetch them either
            data = next(found for p in others if (found := p.averager.context.results.get(result.hash)))
            away.averager.context.results.put(data)
        await held(away).applier.consider(commit, source=others[0].id)
        await asyncio.sleep(FOLLOW_AFTER_S + 1)
        assert away.head == others[0].head and not asked

    tell(story)


@pytest.mark.parametrize("behind", [True, False])
def test_nobody_follows_those_who_are_not_ahead(tell: Tell, behind: bool) -> None:
    async def story(peers: list[Peer]) -> None:
        other = peers[1]
        if behind:
            await rounds_without(other, [peers[0], *peers[2:]], count=1)
        hear(peers[0], other)
        assert not held(peers[0]).following

    tell(story)


def test_one_is_followed_at_a_time(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        away, others = peers[3], peers[:3]
        await rounds_without(away, others, count=2)
        asked = []
        for other in others:
            async def gone(*_: Any) -> Any:
                asked.append(1)
                raise PeerGone("it left")

            other.methods["commits"] = gone
            hear(away, other)
        await asyncio.sleep(FOLLOW_AFTER_S + 2)
        assert len(asked) == 1 and not held(away).following, "the next status is another chance"

    tell(story)


def test_another_history_with_more_tokens_is_downloaded(tell: Tell) -> None:
    """Two went on by themselves while they were cut off; what their rounds absorbed goes back into their drift."""
    async def story(peers: list[Peer]) -> None:
        few, many = peers[:2], peers[2:]
        assert await open_round(few) is not None and await open_round(many) is not None
        await asyncio.sleep(1)
        assert few[0].head[1] != many[0].head[1] and few[0].head[2] == 300 and many[0].head[2] == 700
        meet(peers)
        for peer in few:
            await peer.averager._follower.see_what_it_has(held(peer), many[0].id)
        assert {peer.head for peer in peers} == {many[0].head}
        assert [peer.averager.pending()[0] for peer in peers] == [100, 200, 0, 0]
        assert not held(few[0]).downloading and not held(few[0]).distrusted_until

    tell(story)


def test_a_history_with_fewer_tokens_is_not(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        few, many = peers[:2], peers[2:]
        await open_round(few)
        await open_round(many)
        await asyncio.sleep(1)
        meet(peers)
        before = many[0].head
        await many[0].averager._follower.see_what_it_has(held(many[0]), few[0].id)
        assert many[0].head == before and few[0].id in held(many[0]).distrusted_until

    tell(story)


def test_who_claims_a_version_and_gives_nothing_is_left_out_for_a_while(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        liar, me = peers[1], peers[0]
        status = liar.status()
        claimed = Head(version=9, digest="f" * 64, tokens=10**6)
        me.hear(liar.id, status.model_copy(update={"heads": [claimed]}))
        await me.averager._follower.see_what_it_has(held(me), liar.id)
        assert me.head[0] == 0
        level, others = me.averager._turns.holders(held(me), me.alive())
        assert liar.id not in level and liar.id not in others
        assert {peer.id for peer in peers[2:]} <= {*level, *others}
        await asyncio.sleep(DISTRUST_S + 0.1)
        meet([me, *peers[2:]])
        _, others = me.averager._turns.holders(held(me), {**me.alive(), liar.id: status})
        assert liar.id in others, "it is asked again later: it may have had a bad moment"

    tell(story)
