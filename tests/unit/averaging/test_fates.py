"""What of a peer's own is in another history: who can tell, what is common, and that silence is no answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from swarm.averaging.fates import fates_in
from swarm.averaging.held import HeldFragment
from swarm.averaging.results import Fates
from swarm.averaging.synchronise import FATES_S
from swarm.errors import BadMessage, PeerGone, PeerRefused, StateError
from swarm.network.records import Head
from tests.unit.averaging.four_peers import Tell, learn, meet, open_round
from tests.unit.averaging.simulation import Peer


def held(peer: Peer) -> HeldFragment:
    return peer.averager._fragments[0]


def head_of(peer: Peer) -> Head:
    version, digest, tokens = peer.head
    return Head(version=version, digest=digest, tokens=tokens)


async def fates(of: Peer, to: Peer, donors: list[Peer]) -> Fates:
    return await fates_in(
        of.averager.context, held(of).applier, head_of(to), donors=[peer.id for peer in donors]
    )


def only_downloaded(peer: Peer) -> None:
    """It has its state from others, and knows nothing of how it came about."""
    history, state = held(peer).applier.history, held(peer).ledger.state
    history.move_over(Fates(), state.version, state.digest)


async def part_ways(peers: list[Peer], *, together: int, apart: int) -> tuple[list[Peer], list[Peer]]:
    """Some rounds of all four, then some of each half; the second half has more tokens."""
    few, many = peers[:2], peers[2:]
    for rounds, groups in ((together, [peers]), (apart, [few, many])):
        for _ in range(rounds):
            for group in groups:
                for peer in group:
                    learn(peer, 0.01, 30 if peer in few else 70)
                assert await open_round(group) is not None
            await asyncio.sleep(1)
    meet(peers)
    assert few[0].head[1] != many[0].head[1]
    return few, many


async def beat(peers: list[Peer]) -> None:
    while True:
        meet(peers)
        await asyncio.sleep(1)


def refuse(peer: Peer, method: str, error: Exception) -> list[dict[str, Any]]:
    """From now on it answers with this; returns what it was asked."""
    asked: list[dict[str, Any]] = []

    async def answer(link: object, header: dict[str, Any], body: bytes) -> Any:
        asked.append(header)
        raise error

    peer.methods[method] = answer
    return asked


@pytest.mark.parametrize("together", [0, 1, 3])
@pytest.mark.parametrize("apart", [1, 2, 5])
def test_what_came_after_the_fork_is_lost_and_no_more(tell: Tell, together: int, apart: int) -> None:
    async def story(peers: list[Peer]) -> None:
        few, many = await part_ways(peers, together=together, apart=apart)
        found = await fates(few[1], many[0], many)
        recent = held(few[1]).ledger.recent()
        assert set(found.lost) == {key for key, version in recent.items() if version > together}
        assert len(found.lost) == apart and not found.absorbed and found.known == recent.keys()
        assert found.common == together
        assert [commit.opening.version for commit in found.commits] == list(range(together + 1, together + apart + 1))

    tell(story)


def test_nothing_of_a_newcomer_can_be_lost_and_nobody_is_asked(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        few, others = peers[0], peers[1:]
        assert await open_round(others) is not None
        await asyncio.sleep(1)
        meet(peers)
        asked = refuse(others[0], "commits", PeerGone("silent"))
        assert await fates(few, others[0], others) == Fates() and not asked

    tell(story)


def test_a_donor_that_has_only_downloaded_cannot_tell_but_another_can(tell: Tell) -> None:
    """Found by scripts/faults.py: what it could not tell was taken to be common, and so lost."""
    async def story(peers: list[Peer]) -> None:
        few, many = await part_ways(peers, together=1, apart=3)
        only_downloaded(many[0])
        assert len((await fates(few[0], many[0], [many[0]])).lost) == 3
        await few[0].averager._follower.see_what_it_has(held(few[0]), many[0].id)
        assert few[0].head == many[0].head and few[0].averager.pending() == [3 * 30]

    tell(story)


def test_what_nobody_can_tell_any_more_counts_as_common(tell: Tell) -> None:
    """Better not counted than counted twice."""
    async def story(peers: list[Peer]) -> None:
        few, many = await part_ways(peers, together=1, apart=2)
        for peer in many:
            only_downloaded(peer)
        found = await fates(few[0], many[0], many)
        assert not found.lost and found.common is None and not found.commits

    tell(story)


def test_versions_beyond_the_new_head_are_lost_also_where_nobody_can_tell(tell: Tell) -> None:
    """Ours may be ahead in rounds and yet behind in tokens."""
    async def story(peers: list[Peer]) -> None:
        few, many = peers[:2], peers[2:]
        for _ in range(3):
            learn(few[0], 0.01, 1)
            assert await open_round(few) is not None
            await asyncio.sleep(1)
        assert await open_round(many) is not None
        await asyncio.sleep(1)
        meet(peers)
        for peer in many:
            only_downloaded(peer)
        recent = held(few[0]).ledger.recent()
        found = await fates(few[0], many[0], many)
        assert set(found.lost) == {key for key, version in recent.items() if version > 1} and len(found.lost) == 2

    tell(story)


def test_commits_that_nobody_signed_are_no_answer(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        few, many = await part_ways(peers, together=1, apart=2)
        history = held(many[0]).applier.history
        for version, commit in history._commits.items():
            history._commits[version] = commit.model_copy(update={"signature": "00" * 64})
        found = await fates(few[0], many[0], [many[0]])
        assert len(found.lost) == 2 and all(commit.signature != "00" * 64 for commit in found.commits), "the other told"
        only_downloaded(many[1])
        with pytest.raises(BadMessage, match="did not sign"):
            await held(few[0]).applier.commits_of(many[0].id, since=0)
        assert (await fates(few[0], many[0], many)).common is None

    tell(story)


@pytest.mark.parametrize("method", ["commits", "knows"])
@pytest.mark.parametrize("silent", [0, 1])
def test_who_does_not_answer_is_asked_again_later(tell: Tell, method: str, silent: int) -> None:
    """Found by scripts/faults.py: one lost message, and a peer's progress of a partition was lost."""
    async def story(peers: list[Peer]) -> None:
        few, many = await part_ways(peers, together=0, apart=2)
        only_downloaded(many[1 - silent])
        works = many[silent].methods[method]

        async def never(link: object, header: dict[str, Any], body: bytes) -> Any:
            await asyncio.sleep(100)

        many[silent].methods[method] = never
        with pytest.raises(StateError, match="cannot tell yet") as error:
            await fates(few[0], many[0], many)
        assert many[silent].id[-6:] in str(error.value)
        beating = asyncio.ensure_future(beat(peers))
        await few[0].averager._follower.see_what_it_has(held(few[0]), many[0].id)
        assert few[0].head != many[0].head and few[0].averager.pending() == [0], "nothing has changed"
        many[silent].methods[method] = works
        await few[0].averager._follower.see_what_it_has(held(few[0]), many[0].id)
        assert few[0].head == many[0].head and few[0].averager.pending() == [100 + 2 * 30]
        beating.cancel()

    tell(story)


def test_who_never_answers_keeps_nobody_in_a_history_that_has_lost(tell: Tell) -> None:
    """Alive, and never a word of what it knows."""
    async def story(peers: list[Peer]) -> None:
        few, many = await part_ways(peers, together=0, apart=2)
        only_downloaded(many[0])

        async def never(link: object, header: dict[str, Any], body: bytes) -> Any:
            await asyncio.sleep(1000)

        many[1].methods["commits"] = never
        beating = asyncio.ensure_future(beat(peers))
        began = asyncio.get_running_loop().time()
        while few[0].head != many[0].head:
            took_s = asyncio.get_running_loop().time() - began
            assert took_s < FATES_S + 100
            await few[0].averager._follower.see_what_it_has(held(few[0]), many[0].id)
            await asyncio.sleep(1)
        assert took_s >= FATES_S and few[0].averager.pending() == [0], "what nobody tells counts as common"
        beating.cancel()

    tell(story)


def test_who_refuses_does_not_know(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        few, many = await part_ways(peers, together=0, apart=2)
        refuse(many[0], "commits", PeerRefused("this peer is still joining"))
        assert len((await fates(few[0], many[0], many)).lost) == 2

    tell(story)


def test_the_commits_of_a_third_history_tell_nothing(tell: Tell) -> None:
    """It has a commit of that version, but not the one that led to that head."""
    async def story(peers: list[Peer]) -> None:
        one, two, three = peers[:1], peers[1:2], peers[2:]
        for group in (one, two, three):
            assert await open_round(group) is not None
        await asyncio.sleep(1)
        meet(peers)
        for peer in three:
            only_downloaded(peer)
        assert not (await fates(one[0], three[0], [*two, *three])).lost, "nobody can tell"

    tell(story)


def test_a_contribution_that_the_others_committed_after_the_cut_is_found(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        away, others = peers[0], peers[1:]
        refuse(away, "commit", PeerGone("cut off"))
        commit = await open_round([others[0], away, *others[1:]])
        assert commit is not None and commit.includes(away.id)
        await asyncio.sleep(1)
        assert away.head[0] == 0 and away.averager.pending() == [100]
        found = await fates(away, others[0], others)
        assert found.absorbed == (commit.opening.id,) and not found.lost and found.common == 0
        assert await held(away).applier.adopt(held(others[0]).ledger.state, found)
        assert away.head == others[0].head and away.averager.pending() == [0]
        assert held(away).ledger.recent() == {commit.opening.id: 1}

    tell(story)


def test_its_history_is_the_new_one_from_the_fork_on(tell: Tell) -> None:
    """So it can tell others, and itself the next time."""
    async def story(peers: list[Peer]) -> None:
        few, many = await part_ways(peers, together=2, apart=2)
        await few[0].averager._follower.see_what_it_has(held(few[0]), many[0].id)
        ours, theirs = held(few[0]).applier.history, held(many[0]).applier.history
        for version in range(1, 5):
            one, other = ours.commit(version), theirs.commit(version)
            assert one is not None and other is not None and one.hash == other.hash
            assert version == 4 or ours.passes(version, theirs.since(version, limit=1)[0].opening.base)
        assert ours.knows(4, many[0].head[1]) and ours.knows(2, theirs.since(2, limit=1)[0].opening.base)
        assert not ours.knows(3, theirs.since(3, limit=1)[0].opening.base), "it has not had that state itself"

    tell(story)


def test_a_round_that_ends_meanwhile_has_a_fate_of_its_own(tell: Tell) -> None:
    """Its contribution would have been neither in the new history nor in the drift."""
    async def story(peers: list[Peer]) -> None:
        few, many = await part_ways(peers, together=0, apart=1)
        before = await fates(few[0], many[0], many)
        learn(few[0], 0.01, 40)
        assert await open_round(few) is not None
        state = held(many[0]).ledger.state
        applier = held(few[0]).applier
        assert not await applier.adopt(state, before)
        assert few[0].head[0] == 2 and few[0].averager.pending() == [0], "nothing has changed"
        now = await fates(few[0], many[0], many)
        assert await applier.adopt(state, now)
        assert few[0].head == many[0].head and few[0].averager.pending() == [100 + 30 + 40]
        assert await applier.adopt(state, Fates()), "there is nothing to do any more"

    tell(story)
