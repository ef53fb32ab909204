"""Every fragment is on two disks beside its holders' where that can be, no disk is overfull, and who comes or goes
changes as little as can be."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from swarm.averaging.spare_choice import SPARES, Keeper, assign, rank
from swarm.network.records import MAX_SPARES

Swarm = dict[str, Keeper]
AMPLE = 10**9


@st.composite
def swarms(draw: st.DrawFn, *, rooms: st.SearchStrategy[int]) -> tuple[Swarm, list[int]]:
    """Some peers with stages, whole ones and such that hold nothing among them; and the sizes of the fragments."""
    num_fragments = draw(st.integers(1, 8))
    keepers = {}
    for number in range(draw(st.integers(1, 10))):
        first = draw(st.integers(0, num_fragments))
        end = draw(st.integers(first, num_fragments))
        keepers[f"peer-{number}"] = Keeper(frozenset(range(first, end)), draw(rooms))
    return keepers, [draw(st.integers(1, 100)) for _ in range(num_fragments)]


def copies(assigned: Mapping[str, Sequence[int]], fragment: int) -> list[str]:
    return sorted(peer_id for peer_id, kept in assigned.items() if fragment in kept)


def most_copies(keepers: Swarm, num_fragments: int) -> int:
    """Of fragments of one byte each: the largest flow from fragments, `SPARES` each, to peers with their room."""
    pairs = [(f, p) for f in range(num_fragments) for p, keeper in keepers.items() if f not in keeper.held]
    if not pairs:
        return 0
    limits = [[float(f == fragment) for f, _ in pairs] for fragment in range(num_fragments)]
    limits += [[float(p == peer_id) for _, p in pairs] for peer_id in keepers]
    bounds = [float(SPARES)] * num_fragments + [float(min(k.room_bytes, MAX_SPARES)) for k in keepers.values()]
    found = linprog(-np.ones(len(pairs)), A_ub=np.array(limits), b_ub=np.array(bounds), bounds=(0, 1))
    return round(-found.fun)


@settings(max_examples=300, deadline=None)
@given(swarms(rooms=st.integers(0, 250)))
def test_no_disk_is_overfull_and_nobody_keeps_what_it_holds_or_too_much(found: tuple[Swarm, list[int]]) -> None:
    keepers, sizes = found
    assigned = assign(keepers, sizes)
    assert set(assigned) == set(keepers)
    for peer_id, kept in assigned.items():
        assert kept == sorted(set(kept)) and not keepers[peer_id].held.intersection(kept)
        assert sum(sizes[index] for index in kept) <= keepers[peer_id].room_bytes
    assert all(len(copies(assigned, index)) <= SPARES for index in range(len(sizes)))


@settings(max_examples=300, deadline=None)
@given(swarms(rooms=st.sampled_from([0, AMPLE])))
def test_every_fragment_is_on_two_disks_where_there_are_two(found: tuple[Swarm, list[int]]) -> None:
    keepers, sizes = found
    assigned = assign(keepers, sizes)
    for index in range(len(sizes)):
        able = [peer_id for peer_id, keeper in keepers.items() if keeper.room_bytes and index not in keeper.held]
        assert copies(assigned, index) == sorted(rank(able, fragment=index)[:SPARES])


@settings(max_examples=300, deadline=None)
@given(swarms(rooms=st.integers(0, 4)))
def test_tight_disks_are_used_as_well_as_can_be(found: tuple[Swarm, list[int]]) -> None:
    """With fragments of one size; with several this is bin packing."""
    keepers, sizes = found
    assigned = assign(keepers, [1] * len(sizes))
    assert sum(map(len, assigned.values())) == most_copies(keepers, len(sizes))


@settings(max_examples=200, deadline=None)
@given(swarms(rooms=st.sampled_from([0, AMPLE])), st.randoms(use_true_random=False))
def test_it_is_the_same_whatever_the_order_in_which_peers_are_known(
    found: tuple[Swarm, list[int]], dice: random.Random
) -> None:
    keepers, sizes = found
    shuffled = list(keepers.items())
    dice.shuffle(shuffled)
    assert assign(dict(shuffled), sizes) == assign(keepers, sizes)


@settings(max_examples=300, deadline=None)
@given(swarms(rooms=st.sampled_from([0, AMPLE])), st.integers(0, 8), st.integers(0, 8))
def test_a_newcomer_moves_only_what_it_keeps_itself(found: tuple[Swarm, list[int]], first: int, length: int) -> None:
    """Read backwards: who leaves moves only what it has kept."""
    keepers, sizes = found
    newcomer = Keeper(frozenset(range(first, min(first + length, len(sizes)))), AMPLE)
    before, after = assign(keepers, sizes), assign({**keepers, "newcomer": newcomer}, sizes)
    for index in range(len(sizes)):
        gone = set(copies(before, index)) - set(copies(after, index))
        come = set(copies(after, index)) - set(copies(before, index))
        assert come <= {"newcomer"} and len(gone) <= 1
        if gone:
            assert come == {"newcomer"} and len(copies(before, index)) == SPARES


def test_whole_peers_keep_none_and_are_no_spare() -> None:
    everything = frozenset(range(4))
    keepers = {"whole": Keeper(everything, AMPLE), "part": Keeper(frozenset({0, 1}), AMPLE)}
    assert assign(keepers, [10] * 4) == {"whole": [], "part": [2, 3]}


def test_a_disk_that_holds_one_takes_the_fragment_with_fewest_holders() -> None:
    keepers = {
        "a": Keeper(frozenset({0, 1}), 0), "b": Keeper(frozenset({0, 2}), 0), "c": Keeper(frozenset({1}), 0),
        "keeper": Keeper(frozenset(), 10),
    }
    assert assign(keepers, [10, 10, 10])["keeper"] == [2]


def test_every_fragment_gets_one_copy_before_any_gets_two() -> None:
    keepers = {f"peer-{number}": Keeper(frozenset(), 2) for number in range(3)}
    assigned = assign(keepers, [1] * 6)
    assert [len(copies(assigned, index)) for index in range(6)] == [1] * 6


def test_what_is_on_a_full_disk_moves_where_another_has_room_for_it() -> None:
    """Only `a` may keep fragment 1, and by rank it would keep fragment 0, which `b` can keep as well."""
    keepers = {"a": Keeper(frozenset(), 1), "b": Keeper(frozenset({1}), 1)}
    assert assign(keepers, [1, 1]) == {"a": [1], "b": [0]}


def test_a_fragment_that_is_too_large_for_a_disk_is_on_another() -> None:
    keepers = {"small": Keeper(frozenset(), 9), "large": Keeper(frozenset(), 10)}
    assert assign(keepers, [10]) == {"small": [], "large": [0]}


def test_no_status_names_more_spares_than_it_may() -> None:
    keepers = {"half": Keeper(frozenset(range(100)), AMPLE)}
    assert len(assign(keepers, [1] * 256)["half"]) == MAX_SPARES


def test_copies_are_spread_evenly_over_many_peers() -> None:
    keepers = {f"peer-{number}": Keeper(frozenset({number % 32}), AMPLE) for number in range(64)}
    kept = [len(indices) for indices in assign(keepers, [1] * 32).values()]
    assert sum(kept) == 64 and max(kept) <= 5
