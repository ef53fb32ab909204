"""Neighbourhoods: small, the same for all who know the same peers, and steady while a swarm grows and shrinks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.network.prefixes import FEWEST, MAX_DEPTH, MOST, neighbourhoods, place, settled_depth


def names(count: int, seed: int = 0) -> list[str]:
    return [f"peer {seed} {number}" for number in range(count)]


def test_places_are_bits_that_follow_from_the_id_alone() -> None:
    places = [place(name) for name in names(500)]
    assert all(len(each) == MAX_DEPTH and set(each) <= {"0", "1"} for each in places)
    assert place("peer 0 0") == places[0] and len(set(places)) > 490
    assert 200 < sum(each[0] == "1" for each in places) < 300


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 400), st.integers(1, 70), st.integers(0, 9))
def test_everybody_is_in_one_small_neighbourhood_of_its_own_prefix(count: int, most: int, seed: int) -> None:
    peers = names(count, seed)
    found = neighbourhoods(peers, most=most)
    assert sorted(peer for inside in found.values() for peer in inside) == sorted(peers)
    for prefix, inside in found.items():
        assert len(inside) <= most or len(prefix) == MAX_DEPTH
        assert inside == sorted(inside) and all(place(peer).startswith(prefix) for peer in inside)
        above = [peer for peer in peers if place(peer).startswith(prefix[:-1])]
        assert not prefix or len(above) > most, "no more are cut than must be"
    shuffled = random.Random(seed).sample(peers, len(peers))
    assert neighbourhoods(shuffled, most=most) == found


def test_up_to_64_are_one_neighbourhood() -> None:
    assert neighbourhoods(names(MOST)) == {"": sorted(names(MOST))}
    assert neighbourhoods([]) == {"": []}
    assert set(neighbourhoods(names(MOST + 1))) == {"0", "1"}


def test_who_joins_moves_only_a_few_neighbours() -> None:
    before, after = neighbourhoods(names(3000)), neighbourhoods(names(3001))
    newcomer = place(names(3001)[-1])
    changed = [prefix for prefix in before if before[prefix] != after.get(prefix)]
    assert all(newcomer.startswith(prefix) for prefix in changed) and len(changed) == 1


def test_what_no_bit_tells_apart_stays_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from swarm.network import prefixes

    monkeypatch.setattr(prefixes, "place", lambda peer_id: "0" * MAX_DEPTH)
    [(prefix, inside)] = prefixes.neighbourhoods(names(100)).items()
    assert prefix == "0" * MAX_DEPTH and len(inside) == 100


# ---- how deep ----


def records(depths: dict[str, int]) -> dict[str, list[str]]:
    """Prefix -> who has its record there."""
    found: dict[str, list[str]] = {}
    for peer, depth in depths.items():
        found.setdefault(place(peer)[:depth], []).append(peer)
    return found


def on_the_way(me: str, homes: dict[str, list[str]]) -> dict[int, list[str]]:
    """Whom a peer finds under each prefix of its own place."""
    return {
        depth: [peer for peer in homes.get(place(me)[:depth], []) if peer != me] for depth in range(MAX_DEPTH + 1)
    }


def settle(depths: dict[str, int], times: int = 12) -> dict[str, int]:
    """Everybody looks and moves a few times, at the same moment each time."""
    for _ in range(times):
        homes = records(depths)
        depths = {me: settled_depth(place(me), on_the_way(me, homes), depth=depths[me]) for me in depths}
    return depths


@pytest.fixture(scope="module")
def settled() -> dict[str, int]:
    """500 who have come at the same moment, and found nobody."""
    return settle(dict.fromkeys(names(500), 0), times=5)


def test_no_record_is_large_once_a_swarm_has_settled(settled: dict[str, int]) -> None:
    assert max(len(inside) for inside in records(settled).values()) <= MOST
    assert settle(settled, times=1) == settled, "and nobody moves any more"


@pytest.mark.parametrize("count", [1, 2, MOST])
def test_a_small_swarm_keeps_one_record(count: int) -> None:
    assert set(settle(dict.fromkeys(names(count), 0), times=2).values()) == {0}


def test_a_swarm_that_shrinks_comes_together_again_and_all_can_be_found(settled: dict[str, int]) -> None:
    left = settle({peer: settled[peer] for peer in names(40)})
    assert max(left.values()) <= 1
    for me in left:
        seen = {peer for inside in on_the_way(me, records(left)).values() for peer in inside}
        assert len(seen) >= FEWEST - 1, "its neighbours, whatever depth they live at"


def test_a_newcomer_goes_where_most_are(settled: dict[str, int]) -> None:
    me = names(501)[-1]
    depth = settled_depth(place(me), on_the_way(me, records(settled)), depth=0)
    assert depth in {settled[peer] for peer in settled if place(peer)[:3] == place(me)[:3]}
    assert settled_depth(place(me), {}, depth=3) == 0, "who finds nobody is at the root"


def test_who_lives_deeper_stands_for_as_many_as_have_split() -> None:
    me = "me"
    deep = {3: [f"neighbour {number}" for number in range(10)]}
    assert settled_depth(place(me), deep, depth=0) == 1, "8 times 10 are too many for the root, 4 times are not"
    assert settled_depth(place(me), {**deep, 1: deep[3]}, depth=0) == 1, "who has moved is counted once, where it is"


def test_neither_65_nor_what_they_split_into_is_split_and_joined_for_ever() -> None:
    for seed in range(5):
        depths = settle(dict.fromkeys(names(MOST + 1, seed), 0), times=4)
        assert settle(depths, times=2) == depths
