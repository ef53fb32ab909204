"""The chain: exact gradients whatever the cut, and whatever happens on the way (I2, I6)."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter

import pytest
import torch

from swarm.data.batch import Batch
from swarm.errors import BadMessage, PeerRefused
from swarm.pipeline import admission, onward, wire
from swarm.pipeline import chain as chains
from swarm.pipeline.messages import Bits, Hop, Microbatch, Verdict
from swarm.pipeline.work import BACKWARD, FORWARD, OWN, REPAIR
from tests.unit.averaging.simulation import play
from tests.unit.pipeline.chains import Peer, World, finish, largest_error, sums
from tests.unit.pipeline.toy import HIDDEN, LENGTH, VOCABULARY, in_one_process, microbatches

CUTS = [
    stages for count in (1, 2, 3, 4)
    for edges in itertools.combinations(range(1, 4), count - 1)
    for stages in [list(itertools.pairwise([0, *edges, 4]))]
]


@pytest.mark.parametrize("stages", [*CUTS, [(0, 3), (1, 4)], [(0, 2), (1, 3), (2, 4)], [(0, 4), (2, 4)]])
def test_every_cut_has_the_gradients_of_one_process(stages: list[tuple[int, int]]) -> None:
    texts = microbatches(12, seed=1)
    wanted, losses = in_one_process(4, texts)

    async def story() -> None:
        world = World(4, seed=1)
        peers = [Peer(world, f"peer{i}", *stage) for i, stage in enumerate(stages)]
        await finish([peers[0].origin(texts)])
        assert largest_error(sums(world), wanted) < 1e-5
        assert sorted(peers[0].losses) == pytest.approx(sorted(losses), rel=1e-5)
        assert all(peer.compute.in_flight == 0 for peer in peers), "nothing waits for a verdict that has come"

    play(story())


@pytest.mark.parametrize("seed", range(12))
def test_kills_freezes_delays_and_repeated_calls_lose_nothing_and_count_nothing_twice(seed: int) -> None:
    texts = [microbatches(40, seed=seed), microbatches(40, seed=100 + seed)]
    wanted, _ = in_one_process(4, texts[0] + texts[1])
    dice = random.Random(seed)

    async def story() -> None:
        world = World(4, seed=seed, twice=0.1)
        origins = [Peer(world, "origin0", 0, 1), Peer(world, "origin1", 0, 2)]
        stages = [(1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (1, 4)]
        count = itertools.count()
        others = [Peer(world, f"peer{next(count)}", *stage) for stage in stages]

        async def mischief() -> None:
            while True:
                await asyncio.sleep(dice.expovariate(1 / 0.7))
                victim = dice.choice(others)
                if dice.random() < 0.5:
                    victim.freeze(dice.uniform(0.5, 12))
                    continue
                victim.kill()
                others.remove(victim)
                others.append(Peer(world, f"peer{next(count)}", victim.first, victim.end))
                asyncio.get_running_loop().call_later(6, setattr, victim, "forgotten", True)

        trouble = asyncio.ensure_future(mischief())
        made = [peer.origin(own) for peer, own in zip(origins, texts, strict=True)]
        await finish(made)
        trouble.cancel()
        assert [origin.lost_tokens for origin, _ in made] == [0, 0]
        assert sum(len(peer.losses) for peer in origins) == 80
        assert sum(peer.chain.onward.reroutes for peer in world.peers.values()) > 0, "there was trouble"
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


def forwards(world: World) -> Counter[int]:
    """fragment -> how often it was computed forward, over all peers. Counts from now on."""
    counts: Counter[int] = Counter()
    for peer in world.peers.values():
        real = peer.compute._run

        def counting(graph, *args, real=real, **more):  # type: ignore[no-untyped-def]
            counts.update(graph.fragments.keys())
            return real(graph, *args, **more)

        peer.compute._run = counting  # type: ignore[method-assign]
    return counts


def test_activations_cross_each_link_once_each_way() -> None:
    """Four stages: 2(S-1) = 6 activations a microbatch; through a hub it would be 5(S-1) = 15."""
    texts = microbatches(6, seed=2)

    async def story() -> None:
        world = World(4, seed=2)
        peers = [Peer(world, f"peer{i}", i, i + 1) for i in range(4)]
        await finish([peers[0].origin(texts)])
        bytes_of_all = sum(size for *_, size in world.messages)
        activation = wire.values_bytes((*texts[0].shape, HIDDEN), 32)
        tokens = wire.tokens_bytes(tuple(texts[0].shape), vocabulary=VOCABULARY)  # type: ignore[arg-type]
        assert bytes_of_all == 6 * (6 * activation + 3 * tokens)
        carriers = {frozenset((one, other)) for one, other, _, size in world.messages if size}
        assert carriers == {frozenset((a.id, b.id)) for a, b in itertools.pairwise(peers)}, "neighbours only"

    play(story())


@pytest.mark.parametrize(("bits", "back_bits", "error"), [(8, 8, 0.02), (4, 8, 0.25), (32, 32, 1e-5)])
def test_fewer_bits_forward_cost_little_and_carry_less(bits: Bits, back_bits: Bits, error: float) -> None:
    texts = microbatches(30, seed=14, sequences=8)
    wanted, losses = in_one_process(4, texts)

    async def story() -> None:
        world = World(4, seed=14, bits=bits, back_bits=back_bits)
        peers = [Peer(world, f"peer{i}", i, i + 1) for i in range(4)]
        await finish([peers[0].origin(texts)])
        found = torch.cat([values.flatten() for _, values in sorted(sums(world).items())])
        exact = torch.cat([values.flatten() for _, values in sorted(wanted.items())])
        assert float((found - exact).norm() / exact.norm()) < error
        assert sum(peers[0].losses) / 30 == pytest.approx(sum(losses) / 30, rel=error / 10)
        shape = (*texts[0].shape, HIDDEN)
        sent = {size for *_, method, size in world.messages if method == "microbatch"}
        ids = wire.tokens_bytes((8, texts[0].shape[1]), vocabulary=VOCABULARY)
        assert sent == {ids + wire.values_bytes(shape, bits)}
        back = {size for *_, method, size in world.messages if method == "microbatch's answer"}
        assert back == {wire.values_bytes(shape, back_bits)}

    play(story())


@pytest.mark.parametrize("moment_s", [0.11, 0.16, 0.26, 0.33])
def test_a_death_is_repaired_by_the_neighbour_above_and_nothing_else_is_done_again(moment_s: float) -> None:
    """Forward or backward: only the fragment of the dead peer is computed a second time."""
    tokens = microbatches(1, seed=3)[0]
    wanted, _ = in_one_process(4, [tokens])

    async def story() -> None:
        world = World(4, seed=3, delay_s=0.02)
        peers = [Peer(world, f"peer{i}", i, i + 1) for i in range(4)]
        spare = Peer(world, "spare", 1, 2)
        for peer_id in (spare.id, peers[1].id):  # which is slow, so the other one is asked first
            peers[0].router.asked(peer_id)
        peers[0].router.answered(spare.id, fragments=1, total_s=9.0, inside_s=9.0, service_s=9.0, queue=0)
        peers[0].router.answered(peers[1].id, fragments=1, total_s=0.05, inside_s=0.05, service_s=0.05, queue=0)
        counts = forwards(world)
        asyncio.get_running_loop().call_later(moment_s, peers[1].kill)
        origin, until = peers[0].origin([tokens])
        await origin.run(until=until)
        assert counts[0] == counts[2] == counts[3] == 1 and 1 <= counts[1] <= 2
        assert origin.lost_tokens == 0 and peers[0].chain.onward.reroutes == 1
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


@pytest.mark.parametrize("dies", [False, True])
def test_what_was_asked_of_the_dead_goes_first_at_whoever_is_left_and_further_down(dies: bool) -> None:
    async def story() -> None:
        world = World(3, seed=18)
        peers = [Peer(world, name, index, index + 1) for name, index in (("a", 0), ("b", 1), ("c", 1), ("d", 2))]
        for peer in peers[1:3]:
            peers[0].router.asked(peer.id)
        peers[0].router.answered(peers[1].id, fragments=1, total_s=0.05, inside_s=0.05, service_s=0.05, queue=0)
        peers[0].router.answered(peers[2].id, fragments=1, total_s=9.0, inside_s=9.0, service_s=9.0, queue=0)
        if dies:
            asyncio.get_running_loop().call_later(0.09, peers[1].kill)
        await peers[0].chain.begin_own(0, Batch(microbatches(1, seed=18)[0]))
        a, b, c, d = (peer.work.urgencies for peer in peers)
        assert a == {OWN, BACKWARD}
        if dies:
            assert c == {REPAIR, BACKWARD} and d == {REPAIR}
        else:
            assert b == {FORWARD, BACKWARD} and d == {FORWARD} and not c

    play(story())


def test_a_frozen_peer_is_passed_over_in_seconds_and_told_to_forget_when_it_is_back() -> None:
    texts = microbatches(3, seed=4)
    wanted, _ = in_one_process(2, texts)

    async def story() -> None:
        world = World(2, seed=4)
        origin, frozen, other = Peer(world, "a", 0, 1), Peer(world, "b", 1, 2), Peer(world, "c", 1, 2)
        for peer in (frozen, other):
            origin.router.asked(peer.id)
        origin.router.answered(frozen.id, fragments=1, total_s=0.05, inside_s=0.05, service_s=0.05, queue=0)
        origin.router.answered(other.id, fragments=1, total_s=5.0, inside_s=5.0, service_s=5.0, queue=0)
        clock = asyncio.get_running_loop().time
        began = clock()
        asyncio.get_running_loop().call_later(0.09, frozen.freeze, 30)
        await finish([origin.origin(texts)])
        assert clock() - began < onward.SILENT_S + 1.5
        await asyncio.sleep(40)
        assert frozen.compute.in_flight == 0 and not frozen.chain._entries
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_answer_that_waits_for_the_line_is_not_silence_but_a_frozen_machine_is(is_frozen: bool) -> None:
    texts = microbatches(3, seed=16)
    wanted, _ = in_one_process(2, texts)

    async def story() -> None:
        world = World(2, seed=16)
        origin, asked = Peer(world, "a", 0, 1), Peer(world, "b", 1, 2)
        world.answers_wait_s = 3 * onward.SILENT_S
        if is_frozen:  # while its answers are coming
            asyncio.get_running_loop().call_later(onward.SILENT_S, asked.freeze, 1.5 * onward.SILENT_S)
        await finish([origin.origin(texts)])
        assert (origin.chain.onward.reroutes > 0) == is_frozen
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


@pytest.mark.parametrize(("sender", "receiver"), ["ab", "ba", "bc", "cb"])
def test_what_waits_for_the_fullest_line_of_a_path_is_told_to_the_origin(sender: str, receiver: str) -> None:
    async def story() -> None:
        world = World(3, seed=17)
        peers = {name: Peer(world, name, index, index + 1) for index, name in enumerate("abc")}
        size = wire.values_bytes((1, LENGTH, HIDDEN), 32)
        world.waiting_bytes = {(peer.id, other.id): size for peer in peers.values() for other in peers.values()}
        world.waiting_bytes[peers[sender].id, peers[receiver].id] = 7 * size
        answer = await peers["a"].chain.begin_own(0, Batch(microbatches(1, seed=1)[0]))
        assert 6.0 < answer.crowded <= 7.0, "in microbatches; token ids travel one way"

    play(story())


def test_a_peer_that_was_given_up_and_answers_when_asked_again_is_not_told_to_forget() -> None:
    texts = microbatches(4, seed=15)
    wanted, _ = in_one_process(2, texts)

    async def story() -> None:
        world = World(2, seed=15)
        origin, only = Peer(world, "a", 0, 1), Peer(world, "b", 1, 2)
        asyncio.get_running_loop().call_later(0.09, only.freeze, onward.SILENT_S + 2)
        made = origin.origin(texts)
        await finish([made])
        assert origin.chain.onward.reroutes > 0, "it was silent for too long"
        assert made[0].lost_tokens == 0
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


def test_what_a_dead_origin_has_sent_is_forgotten_in_time() -> None:
    tokens = microbatches(1, seed=4)[0]

    async def story() -> None:
        world = World(3, seed=4)
        origin, middle, last = (Peer(world, name, i, i + 1) for i, name in enumerate("abc"))
        asyncio.get_running_loop().call_later(0.3, origin.kill)
        asking = asyncio.ensure_future(origin.chain.begin_own(0, Batch(tokens)))
        await asyncio.sleep(5)
        asking.cancel()
        assert middle.compute.in_flight == last.compute.in_flight == 1
        for peer in (middle, last):
            await peer.chain.forget_old()
        assert middle.compute.in_flight == last.compute.in_flight == 1, "its word may still come"
        await asyncio.sleep(chains.FORGET_S)
        for peer in (middle, last):
            await peer.chain.forget_old()
        assert middle.compute.in_flight == last.compute.in_flight == 0

    play(story())


def test_asking_twice_is_asking_once() -> None:
    texts = microbatches(10, seed=5)
    wanted, _ = in_one_process(3, texts)

    async def story() -> None:
        world = World(3, seed=5, twice=1.0)
        peers = [Peer(world, f"peer{i}", i, i + 1) for i in range(3)]
        counts = forwards(world)
        await finish([peers[0].origin(texts)])
        assert counts == {0: 10, 1: 10, 2: 10}
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


def test_microbatches_are_under_way_together() -> None:
    """Three stages of 50 ms each way, links of 100 ms: one after the other would take 0.7 s each."""
    texts = microbatches(40, seed=6)

    async def story() -> None:
        world = World(3, seed=6, delay_s=0.1)
        peers = [Peer(world, f"peer{i}", i, i + 1) for i in range(3)]
        clock = asyncio.get_running_loop().time
        began = clock()
        origin, until = peers[0].origin(texts, credit=16)
        await origin.run(until=until)
        took_s = clock() - began
        bound_s = 40 * 2 * 0.05  # a forward and a backward of the busiest peer
        assert origin.credit.now > 2 and took_s < 1.6 * bound_s

    play(story())


def test_a_loss_can_be_asked_for_without_learning() -> None:
    tokens = microbatches(1, seed=7)[0]
    _, losses = in_one_process(3, [tokens])

    async def story() -> None:
        world = World(3, seed=7)
        peers = [Peer(world, f"peer{i}", i, i + 1) for i in range(3)]
        answer = await peers[0].chain.begin_own(0, Batch(tokens), train=False)
        assert answer.loss == pytest.approx(losses[0], rel=1e-6)
        await asyncio.sleep(1)
        assert all(peer.compute.in_flight == 0 for peer in peers)
        assert all(method != "microbatch's answer" or size == 0 for _, _, method, size in world.messages)

    play(story())


def test_where_nobody_holds_the_rest_it_is_said_and_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onward, "NOBODY_S", 3.0)
    tokens = microbatches(1, seed=8)[0]
    wanted, _ = in_one_process(2, [tokens])

    async def story() -> None:
        world = World(2, seed=8)
        alone = Peer(world, "a", 0, 1)
        with pytest.raises(PeerRefused, match="nobody holds fragment 1"):
            await alone.chain.begin_own(0, Batch(tokens))
        origin, until = alone.origin([tokens])
        asyncio.get_running_loop().call_later(10, lambda: Peer(world, "b", 1, 2))
        await origin.run(until=until)
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


def test_strangers_are_refused_before_anything_is_computed() -> None:
    async def story() -> None:
        world = World(3, seed=9)
        peer = Peer(world, "peer", 1, 3)
        asked = Microbatch(origin="B" * 20, number=1, start=1, sequences=2, length=6, bits=32, back_bits=32)
        with pytest.raises(PeerRefused, match="fragment 0 is not held here"):
            await peer.chain.serve(asked.model_copy(update={"start": 0}), b"", asker="B" * 20)
        for body in (b"", b"x" * 1000):
            with pytest.raises(BadMessage):
                await peer.chain.serve(asked, body, asker="B" * 20)
        for size in ({"sequences": 11}, {"length": 61}, {"sequences": 4096, "length": 2**20}):
            with pytest.raises(BadMessage, match="a microbatch of"):
                await peer.chain.serve(asked.model_copy(update=size), b"", asker="B" * 20)
        assert peer.compute.in_flight == 0 and not peer.chain._entries
        peer.chain.max_in_flight = 0
        for origin in ("B" * 20, peer.id):  # a made-up one of its own, too
            with pytest.raises(PeerRefused, match=admission.BUSY):
                await peer.chain.serve(asked.model_copy(update={"origin": origin}), b"", asker="B" * 20)

    play(story())


def test_an_answer_that_lies_about_its_path_is_not_taken() -> None:
    tokens = microbatches(1, seed=10)[0]
    wanted, _ = in_one_process(2, [tokens])

    async def story() -> None:
        world = World(2, seed=10)
        origin, liar = Peer(world, "a", 0, 1), Peer(world, "b", 1, 2)
        honest = liar.answer

        async def lie(
            asker: str, method: str, header: dict[str, object], body: bytes
        ) -> tuple[dict[str, object], bytes]:
            answer, data = await honest(asker, method, header, body)
            if method == "microbatch":
                answer = answer | {"path": [Hop(peer_id=origin.id, start=1, end=2).model_dump()]}
            return answer, data

        liar.answer = lie  # type: ignore[method-assign, assignment]
        asyncio.get_running_loop().call_later(4, lambda: Peer(world, "honest", 1, 2))
        await finish([origin.origin([tokens])])
        assert largest_error(sums(world), wanted) < 1e-5, "the liar's part was done by another"
        assert liar.compute.tokens(1) == 0

    play(story())


def test_a_version_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onward, "NOBODY_S", 2.0)
    tokens = microbatches(1, seed=11)[0]

    async def story() -> None:
        world = World(1, seed=11)
        peer = Peer(world, "a", 0, 1)
        at = [0]
        peer.chain._is_ready = lambda start, end, version: at[0] >= version
        with pytest.raises(PeerRefused, match="version 3 did not come"):
            await peer.chain.begin_own(0, Batch(tokens), version=3)
        asyncio.get_running_loop().call_later(1, at.__setitem__, 0, 3)
        assert (await peer.chain.begin_own(0, Batch(tokens), version=3)).loss > 0

    play(story())


def test_a_stage_may_change_between_two_microbatches() -> None:
    """What is under way is finished as it was begun; what comes afterwards finds the new stage."""
    texts = microbatches(4, seed=12)
    wanted, _ = in_one_process(3, texts)

    async def story() -> None:
        world = World(3, seed=12)
        origin, middle, last = Peer(world, "a", 0, 1), Peer(world, "b", 1, 3), Peer(world, "c", 2, 3)
        paths = []
        for number, tokens in enumerate(texts):
            answer = asyncio.ensure_future(origin.chain.begin_own(number, Batch(tokens)))
            await asyncio.sleep(0.12)  # it is at the middle
            middle.end = middle.chain.end = 3 if middle.chain.end == 2 else 2
            paths.append([(hop.peer_id, hop.start, hop.end) for hop in (await answer).path])
            for peer in (origin, middle, last):
                own = [Verdict(number=number, start=a, end=b) for who, a, b in paths[-1] if who == peer.id]
                assert await peer.chain.judge(origin.id, own) == []
        assert paths[1][1:] == paths[3][1:] == [(middle.id, 1, 2), (last.id, 2, 3)]
        assert largest_error(sums(world), wanted) < 1e-5
        middle.chain.first = middle.first = 2
        middle.chain.end = middle.end = 3
        asked = Microbatch(origin=origin.id, number=9, start=1, sequences=2, length=6, bits=32, back_bits=32)
        with pytest.raises(PeerRefused, match="fragment 1 is not held here"):
            await middle.chain.serve(asked, b"", asker=origin.id)

    play(story())


def test_a_microbatch_whose_fragment_was_given_up_while_it_waited_is_refused() -> None:
    async def story() -> None:
        world = World(3, seed=13)
        peer = Peer(world, "b", 1, 3)
        asked = Microbatch(origin="B" * 20, number=1, start=1, sequences=2, length=6, bits=32, back_bits=32)
        serving = asyncio.ensure_future(peer.chain.serve(asked, b"", asker="B" * 20))
        await asyncio.sleep(0)  # it has come, and is not begun
        peer.chain.first = 2
        with pytest.raises(PeerRefused, match="fragment 1 is not held here"):
            await serving
        assert peer.compute.in_flight == 0 and not peer.chain._entries

    play(story())


@pytest.mark.parametrize("is_frozen", [False, True])
def test_who_handed_over_early_goes_on_itself_where_nobody_else_can(is_frozen: bool) -> None:
    """Measured with three stages of two holders each: the only other holder of a fragment died, and those that had
    handed over to it waited half a minute for it to come back, though they held the fragment as well."""
    texts = microbatches(24, seed=7)
    wanted, _ = in_one_process(4, texts)

    async def story() -> None:
        clock = asyncio.get_running_loop().time
        world = World(4, seed=7)
        peer, helper, last = Peer(world, "peer", 0, 2), Peer(world, "other", 1, 2), Peer(world, "end", 2, 4)
        peer.router.leave_at = lambda *args, start, **more: start + 1  # type: ignore[method-assign]
        made, is_over = peer.origin(texts)
        running = asyncio.ensure_future(made.run(until=is_over))
        while not any(method == "microbatch" and to == helper.id for _, to, method, _ in world.messages):
            await asyncio.sleep(0.01)
        helper.freeze(1000.0) if is_frozen else helper.kill()
        began = clock()
        await running
        assert clock() - began < 20.0 and len(peer.losses) == len(texts)
        helper.frozen_until = 0.0
        assert made.lost_tokens == 0 and largest_error(sums(world), wanted) < 1e-5
        assert peer.compute.in_flight == last.compute.in_flight == 0

    play(story())


def test_going_on_needs_no_second_place() -> None:
    """A peer whose places are full has planned memory for all fragments of what is in them."""
    texts = microbatches(6, seed=8)
    wanted, _ = in_one_process(4, texts)

    async def story() -> None:
        world = World(4, seed=8)
        origin, middle = Peer(world, "origin", 0, 1), Peer(world, "second", 1, 3)
        helper, _ = Peer(world, "other", 2, 3), Peer(world, "end", 3, 4)
        middle.chain.max_in_flight = 1
        middle.router.leave_at = lambda *args, start, **more: start + 1  # type: ignore[method-assign]
        helper.kill()
        await finish([origin.origin(texts, credit=1)])
        assert largest_error(sums(world), wanted) < 1e-5 and len(origin.losses) == 6
        assert middle.compute.in_flight == 0

    play(story())
