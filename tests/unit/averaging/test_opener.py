"""One opener and what befalls its round: who is left out, who is asked again, when it gives up. The protocol is the
real one on a made-up clock and network (simulation.py); nobody opens rounds by itself here."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from swarm.averaging.member import BUSY
from swarm.averaging.messages import Commit
from swarm.averaging.opener import ATTEMPTS
from swarm.errors import PeerRefused
from tests.unit.averaging.four_peers import Tell, meet, open_round, opener_of
from tests.unit.averaging.simulation import Peer


def contributors(commit: Commit) -> dict[str, int]:
    return {commit.opening.members[c.member]: c.tokens for c in commit.contributors}


def owners(commit: Commit) -> set[str]:
    return {commit.opening.owner(part) for part in commit.opening.parts}


def test_all_that_was_learnt_is_in_the_commit_and_everybody_has_it(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        began = asyncio.get_running_loop().time()
        commit = await open_round(peers)
        assert commit is not None
        assert asyncio.get_running_loop().time() - began < 2.5, "four legs of 0.05 to 0.75 s"
        assert contributors(commit) == {peer.id: 100 * number for number, peer in enumerate(peers, start=1)}
        assert owners(commit) <= {peer.id for peer in peers} and len(owners(commit)) == min(4, 3), "three blocks"
        await asyncio.sleep(1)
        assert len({peer.head for peer in peers}) == 1 and peers[0].head[::2] == (1, 1000)
        assert all(peer.averager.pending() == [0] for peer in peers)

    tell(story)


def test_members_learn_from_the_opening_how_to_reach_each_other(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        assert await open_round(peers) is not None
        everybody = {peer.id: peer.maddrs(peer.id) for peer in peers}
        assert all(peer.met == everybody for peer in peers[1:]) and peers[0].met == {}

    tell(story)


def test_alone_it_needs_nobody(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        commit = await open_round(peers[:1])
        assert commit is not None and contributors(commit) == {peers[0].id: 100} and peers[0].head[0] == 1

    tell(story)


def test_where_nobody_has_learnt_anything_there_is_no_round(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        assert await open_round(peers) is not None
        await asyncio.sleep(1)
        assert await open_round(peers) is None and {peer.head[0] for peer in peers} == {1}

    tell(story)


def test_who_is_busy_with_a_better_opener_stops_it_and_nobody_is_blamed(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        asked = []

        async def busy(*_: object) -> Any:
            asked.append(1)
            raise PeerRefused(f"{BUSY} with the round of another")

        peers[2].methods["open"] = busy
        assert await open_round(peers) is None
        assert len(asked) == 1, "it does not try again: the other one's round will come"
        await asyncio.sleep(2)
        assert [peer.averager.pending() for peer in peers] == [[100], [200], [300], [400]]
        assert not any(peer.averager._fragments[0].rounds.member.in_round() for peer in peers), "all are free again"

    tell(story)


def test_an_owner_that_dies_is_given_nothing_in_the_next_attempt(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        await peers[1].kill()
        commit = await open_round(peers)
        assert commit is not None
        assert peers[1].id not in contributors(commit) and peers[1].id not in owners(commit)
        assert contributors(commit) == {peers[0].id: 100, peers[2].id: 300, peers[3].id: 400}

    tell(story)


def test_who_dies_before_it_has_sent_its_part_is_left_out_of_the_results(tell: Tell) -> None:
    """It has answered the opening, so the owners wait for it; the opener asks them for a result without it."""
    async def story(peers: list[Peer]) -> None:
        victim = peers[3]
        take_part = victim.averager._fragments[0].rounds.member.take_part

        async def and_die(*arguments: Any) -> dict[str, Any]:
            answer = await take_part(*arguments)
            asyncio.get_running_loop().call_later(0.9, lambda: asyncio.ensure_future(victim.kill()))
            return answer

        async def not_yet(*arguments: Any) -> None:
            await asyncio.sleep(100)

        member = victim.averager._fragments[0].rounds.member
        member.take_part, member._push = and_die, not_yet  # type: ignore[method-assign]
        commit = await open_round(peers, owners=peers[:3])
        assert commit is not None
        assert contributors(commit) == {peers[0].id: 100, peers[1].id: 200, peers[2].id: 300}
        await asyncio.sleep(1)
        assert len({peer.head for peer in peers[:3]}) == 1
        assert victim.averager.pending() == [400], "what it has learnt is still its own"

    tell(story)


def test_half_of_the_living_are_not_enough(tell: Tell) -> None:
    """They do not answer, though they are heard: perhaps it is this peer that is cut off."""
    async def story(peers: list[Peer]) -> None:
        for silent in peers[2:]:
            async def never(*_: object) -> Any:
                await asyncio.sleep(10_000)

            silent.methods["open"] = never
        beats = asyncio.ensure_future(keep_meeting(peers))
        assert await open_round(peers) is None
        beats.cancel()
        assert {peer.head[0] for peer in peers} == {0}
        assert [peer.averager.pending() for peer in peers] == [[100], [200], [300], [400]]

    tell(story)


async def keep_meeting(peers: list[Peer]) -> None:
    while True:
        meet(peers)
        await asyncio.sleep(1)


def test_one_silent_peer_is_left_out(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        async def never(*_: object) -> Any:
            await asyncio.sleep(10_000)

        peers[3].methods["open"] = never
        beats = asyncio.ensure_future(keep_meeting(peers))
        commit = await open_round(peers, owners=peers[:3])
        beats.cancel()
        assert commit is not None and peers[3].id not in contributors(commit) and len(contributors(commit)) == 3

    tell(story)


def test_a_member_at_another_version_is_named_and_nothing_is_committed(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        assert await open_round(peers[1:]) is not None  # the first one never hears of it
        await asyncio.sleep(1)
        assert await open_round(peers) is None
        assert set(opener_of(peers[0]).elsewhere) <= {peer.id for peer in peers[1:]}
        assert opener_of(peers[0]).elsewhere and peers[0].head[0] == 0

    tell(story)


def test_owners_that_refuse_for_ever_end_it(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        asked = []

        async def no(*_: object) -> Any:
            asked.append(1)
            raise PeerRefused("not today")

        for peer in peers[1:]:
            peer.methods["open"] = no
        commit = await open_round(peers, owners=peers[1:])
        assert len(asked) <= 3 * ATTEMPTS
        assert commit is None and len(asked) >= ATTEMPTS, "one owner is lost in each attempt, and then it gives up"
        await asyncio.sleep(2)
        assert [peer.averager.pending() for peer in peers] == [[100], [200], [300], [400]]
        assert not any(peer.averager._fragments[0].rounds.member.in_round() for peer in peers)

    tell(story)


@pytest.mark.parametrize("answer", [{"tokens": -1}, {"tokens": True}, {"tokens": "9"}, {"tokens": 10**9}, {}])
def test_an_answer_that_is_none_counts_as_a_refusal(tell: Tell, answer: dict[str, Any]) -> None:
    async def story(peers: list[Peer]) -> None:
        async def odd(*_: object) -> Any:
            return answer, b""

        peers[3].methods["open"] = odd
        commit = await open_round(peers, owners=peers[:3])
        assert commit is not None and peers[3].id not in contributors(commit)

    tell(story)


@pytest.mark.parametrize("asked", [False, True])
def test_an_owner_that_signs_nothing_valid_is_given_nothing(tell: Tell, asked: bool) -> None:
    """Its result would make a commit that everybody refuses, round after round."""
    async def story(peers: list[Peer]) -> None:
        bad = peers[1].averager._fragments[0].rounds.member.owner
        made = bad._reduce

        async def forged(*arguments: Any) -> Any:
            return (await made(*arguments)).model_copy(update={"signature": "0" * 128})

        bad._reduce = forged  # type: ignore[method-assign]
        sent = bad._send

        async def send(peer_id: str, method: str, header: dict[str, Any], body: bytes, deadline_s: float) -> None:
            if not asked:
                await sent(peer_id, method, {**header, "signature": "0" * 128}, body, deadline_s)

        bad._send = send
        beats = asyncio.ensure_future(keep_meeting(peers))
        commit = await open_round(peers)
        beats.cancel()
        assert commit is not None and peers[1].id not in owners(commit)
        await asyncio.sleep(2)
        assert {peer.head[0] for peer in peers} == {1} and len({peer.head for peer in peers}) == 1

    tell(story)


def test_it_gives_way_to_another_opening_at_once(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        opening = asyncio.ensure_future(open_round(peers))
        await asyncio.sleep(0.05)
        assert not opening.done()
        opener_of(peers[0]).give_way("0" * 64)
        assert await opening is None
        await asyncio.sleep(2)
        assert all(peer.head[0] == 0 for peer in peers)
        assert [peer.averager.pending() for peer in peers] == [[100], [200], [300], [400]]
        assert await open_round(peers) is not None, "and can open the next one"

    tell(story)


def test_two_openers_at_the_same_moment_make_one_history(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        commits = await asyncio.gather(
            open_round(peers), open_round(peers[::-1]), open_round([peers[1], peers[0], *peers[2:]])
        )
        await asyncio.sleep(5)
        assert len({peer.head for peer in peers}) == 1
        assert sum(commit is not None for commit in commits) <= 1 or peers[0].head[0] == 1
        total = peers[0].head[2] + sum(peer.averager.pending()[0] for peer in peers)
        assert total == 1000, "no token lost, none twice"
        if any(peer.averager.pending() != [0] for peer in peers):
            assert await open_round(peers) is not None, "nobody is still busy with one that came to nothing"
            await asyncio.sleep(2)
        assert {peer.head[2] for peer in peers} == {1000}

    tell(story)


def test_a_round_for_which_too_little_was_learnt_comes_to_nothing(tell: Tell) -> None:
    """A step of a `sync` run is all of it: what was said before the last commit is not there any more."""
    async def story(peers: list[Peer]) -> None:
        names = [peer.id for peer in peers]
        assert await opener_of(peers[0]).open(names[1:], names, at_least=1001) is None
        await asyncio.sleep(1)
        assert [peer.averager.pending() for peer in peers] == [[100], [200], [300], [400]]
        commit = await opener_of(peers[0]).open(names[1:], names, at_least=1000)
        assert commit is not None and commit.tokens == 1000

    tell(story)


def test_a_contribution_that_is_lost_on_its_way_is_not_done_without_where_all_is_needed(tell: Tell) -> None:
    async def story(peers: list[Peer]) -> None:
        names = [peer.id for peer in peers]
        pushes = 0

        async def swallow(*_: object) -> Any:
            nonlocal pushes
            pushes += 1
            return {}, b""

        for owner in peers:
            real = owner.methods["push"]

            async def push(link: Any, header: dict[str, Any], body: bytes, real: Any = real) -> Any:
                return await (swallow() if link.peer_id == peers[3].id else real(link, header, body))

            owner.methods["push"] = push
        assert await opener_of(peers[0]).open(names[1:], names, at_least=1000) is None
        assert pushes > 0
        commit = await opener_of(peers[0]).open(names[1:], names)
        assert commit is not None and commit.tokens == 600, "without that need the others go on"

    tell(story)
