"""Tokens are believed up to what a peer has had before; lies leave no past behind, and no history grows for ever."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging import pace
from swarm.averaging.pace import Paces


def after(*commits: dict[str, int], first: int = 1) -> Paces:
    paces = Paces()
    for version, tokens in enumerate(commits, start=first):
        paces.saw(tokens, version=version)
    return paces


EQUAL = {"a": 100, "b": 100, "c": 100, "d": 100}


def test_steady_peers_are_believed_whatever_their_speed() -> None:
    uneven = {"slow": 20, "a": 100, "b": 100, "fast": 190}
    paces = after(*[uneven] * 8)
    assert paces.believed(uneven, version=9) == uneven
    longer = {peer_id: 5 * count for peer_id, count in uneven.items()}
    assert paces.believed(longer, version=9) == longer, "a longer round is no lie: all have more"


def test_a_claim_beyond_the_own_past_counts_as_the_past_supports() -> None:
    paces = after(*[EQUAL] * 8)
    claims = {**EQUAL, "d": 1_000_000}
    assert paces.believed(claims, version=9) == {**EQUAL, "d": 200}
    slow = after(*[{**EQUAL, "d": 25}] * 8)
    assert slow.believed(claims, version=9) == {**EQUAL, "d": 50}


def test_who_has_no_past_counts_up_to_the_median() -> None:
    paces = after(*[EQUAL] * 3)
    assert paces.believed({**EQUAL, "new": 900}, version=4)["new"] == 100
    assert paces.believed({**EQUAL, "new": 30}, version=4)["new"] == 30
    young = {"a": 100, "b": 150, "c": 900}
    assert Paces().believed(young, version=1) == {"a": 100, "b": 150, "c": 300}, "where all are new, up to twice"
    assert after(young).believed(young, version=2) == {"a": 100, "b": 150, "c": 600}


def test_two_have_no_median_and_are_believed() -> None:
    assert after(*[EQUAL] * 3).believed({"a": 1, "d": 10**9}, version=4) == {"a": 1, "d": 10**9}
    assert after({"a": 1, "b": 2}).believed({"a": 5}, version=2) == {"a": 5}


def test_a_lie_told_every_round_is_believed_slowly() -> None:
    """And so is a truth: a newcomer that is nine times as fast as the others gets there in some eight rounds."""
    paces = after(*[EQUAL] * 4)
    believed = []
    for version in range(5, 17):
        claims = {**EQUAL, "new": 900}
        believed.append(paces.believed(claims, version=version)["new"])
        paces.saw(claims, version=version)
    assert believed[:4] == [100, 200, 300, 400]
    assert believed == sorted(believed) and believed[5] < 900 <= believed[9]


def test_what_missed_rounds_may_all_come_at_once() -> None:
    paces = after(*[EQUAL] * 4, *[{"a": 100, "b": 100, "c": 100}] * 3)
    assert paces.believed({**EQUAL, "d": 400}, version=8)["d"] == 400
    assert paces.believed({**EQUAL, "d": 4000}, version=8)["d"] == 800, "twice its pace, four times over"
    assert paces.believed({**EQUAL, "d": 10**9}, version=10_000)["d"] == 200 * pace.MAX_GAP
    paces.saw({**EQUAL, "d": 400}, version=8)
    assert paces.believed({**EQUAL, "d": 4000}, version=9)["d"] == 200, "its pace is what it was"


def test_a_commit_that_replaces_another_takes_its_place() -> None:
    paces = after(*[EQUAL] * 4)
    paces.saw({**EQUAL, "d": 10}, version=5)
    paces.saw(EQUAL, version=5)
    assert paces.believed({**EQUAL, "d": 900}, version=6)["d"] == 200
    paces.saw({"a": 100, "b": 100, "c": 100}, version=5)
    assert paces.believed({**EQUAL, "d": 900}, version=6)["d"] == 400, "it was not in that one: two rounds at once"


def test_another_history_may_have_fewer_versions() -> None:
    """The swarm was parted; the side that won is younger in versions."""
    paces = after(*[EQUAL] * 4, first=50)
    paces.saw(EQUAL, version=7)
    assert paces.believed(EQUAL, version=8) == EQUAL


def test_rounds_of_two_say_nothing_of_paces() -> None:
    paces = after(*[{"a": 100, "d": 900}] * 5)
    assert paces.believed({**EQUAL, "d": 900}, version=6)["d"] == 200, "as if all were new"


def test_only_so_many_are_remembered() -> None:
    paces = Paces()
    for version in range(1, 5 * pace.MAX_PEERS):
        paces.saw({"a": 10, "b": 10, f"passer-by {version}": 10}, version=version)
    assert len(paces._pasts) == pace.MAX_PEERS
    assert {"a", "b"} < paces._pasts.keys(), "who contributes is not forgotten"
    assert all(len(past.paces) <= pace.REMEMBERED for past in paces._pasts.values())


claims = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 2**40), min_size=1, max_size=8)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), claims), max_size=12), claims, st.integers(1, 50))
def test_nobody_is_believed_more_than_it_says_or_less_than_a_token(
    commits: list[tuple[int, dict[str, int]]], now: dict[str, int], version: int
) -> None:
    paces = Paces()
    for number, tokens in commits:
        paces.saw(tokens, version=number)
    believed = paces.believed(now, version=version)
    assert believed.keys() == now.keys()
    assert all(1 <= believed[peer_id] <= now[peer_id] for peer_id in now)
    again = Paces()
    for number, tokens in commits:
        again.saw(dict(reversed(tokens.items())), version=number)
    assert again.believed(now, version=version) == believed, "the order within a commit makes no difference"


def test_to_look_changes_nothing() -> None:
    paces = after(EQUAL)
    first = paces.believed({**EQUAL, "d": 900}, version=2)
    assert paces.believed({**EQUAL, "d": 900}, version=2) == first == {**EQUAL, "d": 200}
