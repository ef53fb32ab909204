"""Swarms in which most is new at once: the real protocol, and everybody takes the same step, those too who have just
downloaded the version before (I1)."""

from __future__ import annotations

import asyncio

import pytest

from swarm.averaging import outer
from swarm.averaging.outer import OuterStep
from tests.unit.averaging.four_peers import Tell, learn, open_round
from tests.unit.averaging.simulation import Peer

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[OuterStep]:
    """Every outer step that any peer takes."""
    taken: list[OuterStep] = []
    apply = outer.apply

    def noted(step: OuterStep, *rest: object) -> object:
        taken.append(step)
        return apply(step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(outer, "apply", noted)
    return taken


def decided(steps: list[OuterStep]) -> dict[int, list[bool]]:
    """Version -> whether the momentum starts again, in the eyes of each peer that has made it."""
    found: dict[int, list[bool]] = {}
    for step in steps:
        found.setdefault(step.version, []).append(step.restart)
    return dict(sorted(found.items()))


async def alone(peer: Peer, rounds: int) -> None:
    for _ in range(rounds):
        assert await open_round([peer]) is not None
        learn(peer, 0.05, 100)


def agree(peers: list[Peer]) -> bool:
    return len({peer.head for peer in peers}) == 1


def test_three_join_one_by_a_download_and_all_start_the_momentum_again(tell: Tell, steps: list[OuterStep]) -> None:
    async def story(peers: list[Peer]) -> None:
        await alone(peers[0], 3)
        for peer in peers:
            peer.start_beating()
        await asyncio.sleep(2)
        for peer in peers[1:]:
            assert await peer.averager.synchroniser.join() == 1
            [state] = peer.averager.states()
            assert [(e.peer_id, e.version, e.trained) for e in state.roll] == [(peers[0].id, 3, 300)]
        assert agree(peers)
        for _ in range(2):
            commit = await open_round(peers)
            assert commit is not None and len(commit.contributors) == 4
            await asyncio.sleep(1)
            assert agree(peers)
            for peer in peers:
                learn(peer, 0.05, 100)
        assert len(peers[2].averager.states()[0].roll) == 4

    tell(story)
    assert decided(steps) == {1: [False], 2: [False], 3: [False], 4: [True] * 4, 5: [False] * 4}


def test_one_joins_one_and_the_momentum_goes_on(tell: Tell, steps: list[OuterStep]) -> None:
    async def story(peers: list[Peer]) -> None:
        await alone(peers[0], 2)
        for peer in peers:
            peer.start_beating()
        await asyncio.sleep(2)
        await peers[1].averager.synchroniser.join()
        learn(peers[0], 0.05, 100)  # 200 tokens each
        assert await open_round(peers[:2]) is not None
        await asyncio.sleep(1)
        assert agree(peers[:2])

    tell(story)
    assert decided(steps) == {1: [False], 2: [False], 3: [False] * 2}


def test_who_catches_up_commit_by_commit_decides_as_those_who_were_there(tell: Tell, steps: list[OuterStep]) -> None:
    async def story(peers: list[Peer]) -> None:
        await alone(peers[0], 1)
        for peer in peers[1:3]:
            assert await peer.averager._fragments[0].applier.catch_up(peers[0].id)
        assert await open_round(peers[:3]) is not None
        await asyncio.sleep(1)
        for peer in peers[:3]:
            learn(peer, 0.05, 100)
        assert await open_round(peers[:3]) is not None
        await asyncio.sleep(1)
        assert await peers[3].averager._fragments[0].applier.catch_up(peers[1].id)
        assert agree(peers)

    tell(story)
    assert decided(steps) == {1: [False] * 4, 2: [True] * 4, 3: [False] * 4}, "two of three were new in the second"


def test_a_commit_that_is_replaced_leaves_no_trace_in_the_roll(tell: Tell) -> None:
    """Two commits of one version: the roll of the worse one goes with it."""
    async def story(peers: list[Peer]) -> None:
        few = await open_round(peers[:1])
        assert few is not None
        applier = peers[0].averager._fragments[0].applier
        assert [entry.peer_id for entry in applier.ledger.state.roll] == [peers[0].id]
        more = await open_round(peers[1:])
        assert more is not None and more.tokens > few.tokens
        await asyncio.sleep(1)
        assert await applier.consider(more, source=peers[1].id)
        assert {entry.peer_id for entry in applier.ledger.state.roll} == {peer.id for peer in peers[1:]}
        assert agree(peers)

    tell(story)
