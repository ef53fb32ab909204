"""What is loaded next and what is served meanwhile, and the snapshot that tells: newcomers grow, gaps go first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from swarm.pipeline.loading import next_fragment, stage_to_serve, windows
from swarm.pipeline.snapshot import NO_STAGE, SPEED_CAP, Claim, Fragments, Holder, Snapshot, Stage

EIGHT = Fragments((1,) * 8, (1.0,) * 8)


def holder(name: str, serving: Stage, target: Stage | None = None, *, room: int = 4, speed: float = 4.0) -> Holder:
    return Holder(name, serving, serving if target is None else target, room, speed)


def loaded_in_order(known: Snapshot, me: Holder, have: set[int]) -> tuple[list[int], list[Stage]]:
    """Everything it loads, and what it serves after each."""
    order, served = [], []
    while (fragment := next_fragment(known, me, have)) is not None:
        have.add(fragment)
        order.append(fragment)
        me = replace(me, serving=stage_to_serve(known, me, have))
        served.append(me.serving)
    return order, served


def test_a_newcomer_begins_where_rate_is_lowest_and_grows() -> None:
    known = Snapshot([holder("a", (0, 4), speed=9), holder("b", (4, 8), speed=5), holder("c", (5, 6), speed=1)], EIGHT)
    order, served = loaded_in_order(known, holder("new", NO_STAGE, (2, 6)), set())
    assert order == [4, 5, 3, 2] or order == [4, 3, 2, 5]
    assert served[0] == (4, 5) and served[-1] == (2, 6)
    assert all(outer[0] <= inner[0] and inner[1] <= outer[1] for inner, outer in zip(served, served[1:], strict=False))


def test_what_nobody_serves_is_loaded_first() -> None:
    known = Snapshot([holder("a", (0, 5))], EIGHT)
    assert next_fragment(known, holder("new", NO_STAGE, (2, 6)), set()) == 5
    assert next_fragment(known, holder("new", (3, 4), (2, 6)), {3}) == 5


def test_a_slide_moves_fragment_by_fragment() -> None:
    known = Snapshot([holder("a", (0, 4), room=8), holder("b", (4, 8), speed=1)], EIGHT)
    order, served = loaded_in_order(known, holder("me", (2, 6), (4, 8)), {2, 3, 4, 5})
    assert order == [6, 7]
    assert served[-1] == (4, 8) and all(end - first == 4 for first, end in served)


def test_a_far_move_keeps_serving_until_the_new_stage_is_worth_more() -> None:
    others = [holder("a", (0, 4), speed=2), holder("b", (4, 8), speed=2)]
    order, served = loaded_in_order(Snapshot(others, EIGHT), holder("me", (0, 4), (4, 8)), {0, 1, 2, 3})
    assert sorted(order) == [4, 5, 6, 7]
    assert all(end > first for first, end in served) and served[0] != NO_STAGE and served[-1] == (4, 8)


def test_a_gap_is_served_as_soon_as_it_is_there() -> None:
    others = [holder("a", (0, 4), speed=3), holder("b", (4, 7), speed=2)]
    me = holder("me", (0, 4), (4, 8))
    assert next_fragment(Snapshot(others, EIGHT), me, {0, 1, 2, 3}) == 7
    assert stage_to_serve(Snapshot(others, EIGHT), me, {0, 1, 2, 3, 7}) == (7, 8)


def test_the_last_holder_does_not_leave_before_it_must() -> None:
    """Only it serves 0 to 4; what it has of its target, others serve as well."""
    known = Snapshot([holder("b", (4, 8), speed=2)], EIGHT)
    assert stage_to_serve(known, holder("me", (0, 4), (4, 8)), {0, 1, 2, 3, 5, 6}) == (0, 4)


def test_nothing_is_left_to_load_at_the_target_and_nothing_served_without_anything() -> None:
    known = Snapshot([], EIGHT)
    assert next_fragment(known, holder("me", (2, 4)), {2, 3}) is None
    assert stage_to_serve(known, holder("me", NO_STAGE, (2, 4)), set()) == NO_STAGE


def test_windows_fill_the_room_and_none_is_inside_another() -> None:
    assert windows({0, 1, 2, 5}, 2, EIGHT) == [(0, 2), (1, 3), (5, 6)]
    assert windows({0, 1, 2, 5}, 8, EIGHT) == [(0, 3), (5, 6)]
    assert windows(set(), 8, EIGHT) == []


def test_windows_count_bytes() -> None:
    uneven = Fragments((30, 10, 10, 10, 25), (1.0,) * 5)
    assert windows({0, 1, 2, 3, 4}, 40, uneven) == [(0, 2), (1, 4), (3, 5)]
    assert windows({0, 2}, 20, uneven) == [(2, 3)]


def test_rates_are_of_what_others_serve_not_of_where_they_are_going() -> None:
    me = holder("me", NO_STAGE, (4, 8))
    known = Snapshot([holder("a", (0, 4)), holder("b", NO_STAGE, (4, 8)), me], EIGHT)
    assert known.served_rates(me).tolist() == [1.0] * 4 + [0.0] * 4
    assert not known.gaps(me).any()


def test_a_snapshot_with_other_claims_only_keeps_what_was_worked_out() -> None:
    entries = [holder("a", (0, 4)), holder("b", (4, 8))]
    first = Snapshot(entries, EIGHT)
    assert Snapshot(entries[::-1], EIGHT, like=first)._places is first._places
    moved = [entries[0], replace(entries[1], target=(3, 7))]
    assert Snapshot(moved, EIGHT, like=first)._places is not first._places


@pytest.mark.parametrize("nonsense", [
    holder("bad", (0, 99)), holder("bad", (-1, 3)), holder("bad", (3, 1)), holder("bad", (0, 4), (5, 2)),
    holder("bad", (0, 4), speed=float("nan")), holder("bad", (0, 4), speed=float("inf")),
    holder("bad", (0, 4), speed=0.0), replace(holder("bad", (0, 4)), claim=Claim((0, 12), 1.0)),
])
def test_entries_that_make_no_sense_are_left_out(nonsense: Holder) -> None:
    me = holder("me", (4, 8))
    known = Snapshot([nonsense, holder("a", (0, 4)), me], EIGHT)
    assert [one.peer_id for one in known.holders] == ["a", "me"] and known.claims == {}
    assert known.served_rates(me).tolist() == [1.0] * 4 + [0.0] * 4


def test_a_boast_counts_as_so_many_times_the_median() -> None:
    others = [holder(str(i), (0, 8)) for i in range(4)]
    me = holder("me", (0, 8))
    found = Snapshot([*others, holder("boast", (0, 8), speed=1e300)], EIGHT).served_rates(me)
    np.testing.assert_allclose(found, (4 + SPEED_CAP) * 4.0 / 8)


def test_gaps_are_what_neither_the_others_nor_i_hold_or_load() -> None:
    me = holder("me", (4, 6), (5, 7))
    assert np.flatnonzero(Snapshot([holder("a", (0, 4)), me], EIGHT).gaps(me)).tolist() == [7]
    assert np.flatnonzero(Snapshot([holder("a", (0, 4))], EIGHT).gaps(me)).tolist() == [7]
    assert np.flatnonzero(Snapshot([me], EIGHT).gaps(holder("b", (0, 2)))).tolist() == [2, 3, 7]


def test_worth_of_an_option_is_that_of_the_swarm_with_me_there() -> None:
    known = Snapshot([holder("a", (0, 4)), holder("b", (4, 8)), holder("me", (0, 4))], EIGHT)
    options = np.array([(0, 4), (4, 8), (0, 0)], dtype=np.int64)
    there, other, nowhere = known.worths(holder("me", (0, 4)), options).tolist()
    assert there == pytest.approx(other) and there > nowhere > 0
    without = Snapshot([holder("a", (0, 4)), holder("b", (4, 8))], EIGHT)
    assert without.worths(holder("me", NO_STAGE), options).tolist() == pytest.approx([there, other, nowhere], rel=0.05)
