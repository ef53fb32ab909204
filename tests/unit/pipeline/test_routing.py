"""Routing by the sender's own estimates, on a made-up clock."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from swarm.pipeline.routing import FIRST_BAN_S, LONGEST_BAN_S, SAMPLE, Holder, Router

A, B, C = (Holder(name, 1, 2) for name in "ABC")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def router(seed: int = 0) -> tuple[Router, Clock]:
    clock = Clock()
    return Router(clock=clock, rng=random.Random(seed)), clock


def learn(made: Router, peer_id: str, service_s: float, *, link_s: float = 0.0, queue: int = 0) -> None:
    made.asked(peer_id)
    made.answered(
        peer_id, fragments=1, total_s=service_s + link_s, inside_s=service_s, service_s=service_s, queue=queue
    )


def shares(speeds: dict[Holder, float], *, microbatches: int, in_flight: int) -> Counter[str]:
    """How many each peer gets of a stream of microbatches; each peer does one at a time."""
    made, clock = router()
    counts: Counter[str] = Counter()
    under_way: list[tuple[float, Holder, float]] = []
    free_at = dict.fromkeys(speeds, 0.0)
    for _ in range(microbatches):
        while len(under_way) >= in_flight:
            under_way.sort(key=lambda item: item[0])
            clock.now, holder, asked_at = under_way.pop(0)
            inside_s = clock.now - asked_at
            waiting = sum(other is holder for _, other, _ in under_way)
            made.answered(
                holder.peer_id, fragments=1, total_s=inside_s, inside_s=inside_s, service_s=speeds[holder],
                queue=waiting,
            )
        chosen = made.choose(list(speeds), 1)
        assert chosen is not None
        made.asked(chosen.peer_id)
        free_at[chosen] = max(clock.now, free_at[chosen]) + speeds[chosen]
        under_way.append((free_at[chosen], chosen, clock.now))
        counts[chosen.peer_id] += 1
    return counts


def test_work_is_shared_in_proportion_to_speed() -> None:
    counts = shares({A: 0.1, B: 0.2, C: 0.4}, microbatches=700, in_flight=12)
    assert counts["A"] == pytest.approx(400, rel=0.1)
    assert counts["B"] == pytest.approx(200, rel=0.1)
    assert counts["C"] == pytest.approx(100, rel=0.15)


def test_a_newcomer_is_tried_at_once_and_by_all_that_it_is_then() -> None:
    made, _ = router()
    learn(made, "A", 0.5, link_s=0.1)
    assert made.choose([A, B], 1) is B, "nothing is known of it"
    learn(made, "B", 5.0)
    assert {made.choose([A, B], 1) for _ in range(20)} == {A}


def test_a_far_peer_is_chosen_less_than_a_near_one() -> None:
    made, _ = router()
    learn(made, "A", 0.1, link_s=0.5)
    learn(made, "B", 0.1, link_s=0.05)
    assert made.choose([A, B], 1) is B
    for _ in range(5):
        made.asked("B")
    assert made.choose([A, B], 1) is A, "but not at any price"


def test_a_queue_that_is_told_of_counts() -> None:
    made, _ = router()
    learn(made, "A", 0.1, queue=9)
    learn(made, "B", 0.3)
    assert made.choose([A, B], 1) is B


def test_a_bad_moment_is_not_remembered_for_ever() -> None:
    made, clock = router()
    learn(made, "B", 3.0, link_s=2.0, queue=9)
    chosen = []
    for _ in range(100):
        learn(made, "A", 0.1)
        chosen.append(made.choose([A, B], 1))
        clock.now += 0.1
    assert 1 <= chosen.count(B) <= 9 and chosen[0] is A


def test_who_fails_is_left_alone_ever_longer_and_forgiven_once_it_answers() -> None:
    made, clock = router()
    learn(made, "A", 0.1)
    learn(made, "B", 9.0)
    for times in range(8):
        made.asked("A")
        made.failed("A")
        ban_s = min(FIRST_BAN_S * 2**times, LONGEST_BAN_S)
        clock.now += ban_s - 0.01
        assert made.choose([A, B], 1) is B
        clock.now += 0.02
        made.asked("B")
        made.withdrawn("B")
        assert made.choose([A, B], 1) is A
    learn(made, "A", 0.1)
    made.asked("A")
    made.failed("A")
    clock.now += FIRST_BAN_S + 0.01
    assert made.choose([A, B], 1) is A


def test_all_that_a_dead_peer_was_asked_counts_once() -> None:
    made, clock = router()
    learn(made, "A", 0.1)
    learn(made, "B", 9.0)
    for _ in range(5):
        made.asked("A")
    for _ in range(5):
        clock.now += 0.01
        made.failed("A")
    assert made.of("A").outstanding == 0 and made.of("A").failures == 1
    clock.now += FIRST_BAN_S - 0.05
    assert made.choose([A, B], 1) is B
    clock.now += 0.02
    assert made.choose([A, B], 1) is A, "it is back, and would have been left alone for 31 s"


def test_a_banned_peer_is_better_than_nobody() -> None:
    made, clock = router()
    for peer_id in "AB":
        made.asked(peer_id)
        made.failed(peer_id)
        clock.now += 0.1
    assert made.choose([A, B], 1) is A, "the one whose ban ends first"
    assert made.choose([A, B], 1, excluded=["A", "B"]) is None and made.choose([], 1) is None


def test_only_who_holds_the_fragment_is_asked() -> None:
    made, _ = router()
    wide, late = Holder("W", 0, 4), Holder("L", 3, 4)
    assert {made.choose([A, wide, late], 3) for _ in range(20)} <= {wide, late}
    assert made.choose([A], 2) is None


def test_longer_stages_are_compared_by_what_a_fragment_takes() -> None:
    made, _ = router()
    learn(made, "A", 0.1)
    made.asked("W")
    made.answered("W", fragments=3, total_s=0.15, inside_s=0.15, service_s=0.15, queue=0)
    assert made.choose([A, Holder("W", 1, 4)], 1) == Holder("W", 1, 4)


def test_of_a_crowd_some_are_compared_and_everybody_gets_a_turn() -> None:
    made, _ = router()
    crowd = [Holder(f"P{i}", 1, 2) for i in range(4 * SAMPLE)]
    for holder in crowd:
        learn(made, holder.peer_id, 0.1)
    assert len({made.choose(crowd, 1) for _ in range(500)}) > 3 * SAMPLE


def test_what_a_peer_says_of_itself_is_bounded_by_the_clock() -> None:
    made, _ = router()
    made.asked("A")
    made.answered("A", fragments=1, total_s=1.0, inside_s=1e5, service_s=1e5, queue=0)
    assert made.of("A").service_s == 1.0 and made.of("A").link_s == 0.0


def test_who_is_busy_hands_over_early() -> None:
    made, _ = router()
    learn(made, "N", 0.1)
    after = [Holder("N", 1, 4)]
    assert made.leave_at(after, start=0, end=3, queue=0, service_s=0.1, num_fragments=4) == 3
    assert made.leave_at(after, start=0, end=3, queue=9, service_s=0.1, num_fragments=4) == 1
    assert made.leave_at([], start=0, end=4, queue=9, service_s=0.1, num_fragments=4) == 4, "nobody else can do it"
    assert made.leave_at(after, start=2, end=3, queue=9, service_s=0.1, num_fragments=4) == 3, "at least one"


def test_counts_of_what_is_out_return_to_nothing() -> None:
    made, clock = router()
    for end in (made.failed, made.refused, made.withdrawn):
        made.asked("A")
        end("A")
    assert made.of("A").outstanding == 0
    clock.now += LONGEST_BAN_S
    made.forget(["B"])
    assert made.of("A").queue == 0, "whoever is gone for good is forgotten"
