"""The origin: how many microbatches are under way, and its verdicts."""

from __future__ import annotations

import asyncio

import pytest

from swarm.data.batch import Batch
from swarm.pipeline import origin as origins
from swarm.pipeline.origin import Credit, Origin
from tests.unit.averaging.simulation import play
from tests.unit.pipeline.chains import Peer, World, finish, largest_error, sums
from tests.unit.pipeline.toy import in_one_process, microbatches


def told(credit: Credit, crowded: float, times: int = 1) -> int:
    for _ in range(times):
        credit.learn(crowded, number=0, following=0)
    return credit.now


def test_credit_doubles_until_somebody_is_busy_and_then_feels_its_way() -> None:
    credit = Credit(largest=64)
    assert credit.now == 2
    assert [told(credit, 0.0, credit.now) for _ in range(3)] == [4, 8, 16]
    assert told(credit, 2.0, 16) == 16, "busy, and no more"
    assert told(credit, 0.0, 16) == 17, "one more at a time from now on"
    assert told(credit, 7.0, 17) == 13, "a fifth less"
    assert told(credit, 7.0, 12) == 13, "as many answers as are under way, before anything is changed again"
    assert told(credit, 9.0, 1) == 10, "a fifth, or a few that wait"


def test_credit_falls_at_once_by_those_that_wait_in_vain() -> None:
    credit = Credit(first=32, largest=32)
    assert told(credit, 16.0, 32) == 20
    assert told(credit, 99.0, 20) == 10, "but by half at most"


def test_credit_has_bounds() -> None:
    credit = Credit(largest=3)
    assert told(credit, 0.0, 50) == 3
    assert told(credit, 99.0, 50) == 1
    assert Credit(largest=1).now == 1


def test_one_odd_answer_changes_nothing() -> None:
    credit = Credit(first=4, largest=8)
    for crowded in (0.0, 0.0, 50.0, 0.0):
        told(credit, crowded)
    assert credit.now == 8


def test_what_was_begun_before_a_change_says_nothing_of_it() -> None:
    credit = Credit(first=16, largest=32)
    for number in range(16):
        credit.learn(10.0, number=number, following=number + 16)
    assert credit.now == 10, "the last of them left while numbers to 31 were under way"
    for number in range(16, 31):
        credit.learn(10.0, number=number, following=number + 10)
    assert credit.now == 10, "they had been begun before"
    for number in range(31, 41):
        credit.learn(10.0, number=number, following=number + 10)
    assert credit.now == 5


def test_text_may_come_later() -> None:
    texts = microbatches(6, seed=4)
    wanted, _ = in_one_process(2, texts)

    async def story() -> None:
        world = World(2, seed=1)
        peer, left = Peer(world, "a", 0, 1), list(texts)
        Peer(world, "b", 1, 2)

        async def draw() -> Batch:
            await asyncio.sleep(3.0)
            return Batch(left.pop(0))

        made = Origin("a", peer.chain, peer, draw=draw, first_number=0, largest_credit=2)
        await made.run(until=lambda: not left)
        assert largest_error(sums(world), wanted) < 1e-5
        await made.run(until=lambda: True)  # nothing is under way: it ends at once

    play(story())


def test_several_origins_share_the_same_peers() -> None:
    texts = [microbatches(15, seed=seed) for seed in range(3)]
    wanted, losses = in_one_process(3, [tokens for own in texts for tokens in own])

    async def story() -> None:
        world = World(3, seed=1)
        peers = [Peer(world, name, 0, 1) for name in "abc"]
        for name in "de":
            Peer(world, name, 1, 3)
        await finish([peer.origin(own) for peer, own in zip(peers, texts, strict=True)])
        assert largest_error(sums(world), wanted) < 1e-5
        assert sorted(loss for peer in peers for loss in peer.losses) == pytest.approx(sorted(losses), rel=1e-5)

    play(story())


def test_a_verdict_is_told_again_until_it_is_heard() -> None:
    tokens = microbatches(1, seed=2)[0]
    wanted, _ = in_one_process(2, [tokens])

    async def story() -> None:
        world = World(2, seed=2)
        first, last = Peer(world, "a", 0, 1), Peer(world, "b", 1, 2)
        asyncio.get_running_loop().call_later(0.2, last.freeze, 12)  # its answer is out, the verdict is not in
        origin, until = first.origin([tokens])
        await origin.run(until=until)
        assert asyncio.get_running_loop().time() > 1012
        assert origin.lost_tokens == 0 and last.compute.in_flight == 0
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


def test_a_peer_that_never_hears_the_verdict_is_told_of_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origins, "VERDICT_TRIES", 2)
    tokens = microbatches(1, seed=3)[0]

    async def story() -> None:
        world = World(2, seed=3)
        first, last = Peer(world, "a", 0, 1), Peer(world, "b", 1, 2)
        asyncio.get_running_loop().call_later(0.2, last.freeze, 500)
        origin, until = first.origin([tokens])
        await origin.run(until=until)
        assert origin.lost_tokens == tokens.numel() and last.compute.tokens(1) == 0
        assert first.losses, "the microbatch itself was done"

    play(story())


def test_a_synchronous_step_is_over_when_everybody_has_added_up() -> None:
    texts = microbatches(4, seed=4)
    wanted, losses = in_one_process(3, texts)

    async def story() -> None:
        world = World(3, seed=4)
        peers = [Peer(world, name, i, i + 1) for i, name in enumerate("abc")]
        origin, _ = peers[0].origin([])
        loss = await origin.step([Batch(tokens) for tokens in texts], version=0)
        assert loss == pytest.approx(sum(losses) / 4, rel=1e-6)
        loss = await origin.step([Batch(tokens) for tokens in texts], version=1)
        assert all(peer.compute.tokens(i) == 8 * texts[0].numel() for i, peer in enumerate(peers))
        assert loss == pytest.approx(sum(losses) / 4, rel=1e-6)
        assert largest_error(sums(world), {name: 2 * values for name, values in wanted.items()}) < 1e-5

    play(story())


def test_a_bug_is_not_taken_for_a_slow_peer() -> None:
    async def story() -> None:
        world = World(1, seed=5)
        peer = Peer(world, "a", 0, 1)
        origin, until = peer.origin(microbatches(1, seed=5))
        peer.chain.begin_own = broken  # type: ignore[method-assign, assignment]
        with pytest.raises(ZeroDivisionError):
            await origin.run(until=until)

    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    play(story())
