"""How far the swarm is with fragments that this peer does not hold: two must say so where there are two."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging.elsewhere import Elsewhere, said_tokens
from swarm.network.records import MAX_TOKENS, Head, Status


def peer(*tokens: int | None) -> Status:
    heads = [None if t is None else Head(version=1, digest="a" * 64, tokens=t) for t in tokens]
    return Status(run_id="demo-0123456789ab", name="x", role="trainer", heads=heads)


def test_the_most_that_two_holders_say_counts() -> None:
    assert said_tokens([peer(100, None), peer(90, 50), peer(80, None)]) == {0: 90, 1: 50}
    assert said_tokens([peer(100)]) == {0: 100}, "there is no other to ask"
    assert said_tokens([peer(100), peer(100)]) == {0: 100}
    assert said_tokens([]) == said_tokens([peer(), peer(None, None)]) == {}, "nobody holds anything"


def test_one_liar_ends_nobodys_run() -> None:
    others = Elsewhere(2)
    others.heard([peer(MAX_TOKENS, MAX_TOKENS), peer(None, 70), peer(None, 60)])
    assert others.swarm_tokens({0: 65}) == 65
    assert others.swarm_tokens({0: 900}) == 70


def test_own_books_count_for_what_is_held() -> None:
    others = Elsewhere(2)
    others.heard([peer(10, 500), peer(10, 500)])
    assert others.swarm_tokens({0: 80}) == 80, "whatever others say of fragment 0"
    assert others.swarm_tokens({0: 80, 1: 90}) == 80
    assert others.swarm_tokens({}) == 10


def test_what_nobody_has_spoken_of_bounds_nothing_and_before_any_word_it_is_the_start() -> None:
    others = Elsewhere(4)
    assert others.swarm_tokens({}) == 0 and others.swarm_tokens({1: 30}) == 30
    others.heard([peer(None, None, 0, None)])
    assert others.swarm_tokens({1: 30}) == 0, "fragment 2 is at its start"


def test_fragments_whose_holders_are_gone_are_remembered() -> None:
    others = Elsewhere(2)
    others.heard([peer(40, None)])
    others.heard([])
    assert others.swarm_tokens({1: 100}) == 40
    others.heard([peer(35, None)])
    assert others.swarm_tokens({1: 100}) == 35, "brought back from an older copy"
    others.let_go(1, 20)
    assert others.swarm_tokens({}) == 20


def test_fragments_that_the_run_does_not_have_are_none() -> None:
    others = Elsewhere(1)
    others.heard([peer(50, 1, 2)])
    assert others.swarm_tokens({}) == 50


tokens = st.one_of(st.none(), st.integers(0, 1000))


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.lists(st.lists(tokens, max_size=4), max_size=6), st.permutations(range(6)))
def test_the_order_of_statuses_makes_no_difference(rows: list[list[int | None]], order: list[int]) -> None:
    statuses = [peer(*row) for row in rows]
    shuffled = [statuses[i] for i in order if i < len(statuses)]
    said = said_tokens(statuses)
    assert said == said_tokens(shuffled)
    for fragment, found in said.items():
        claims = sorted((t for row in rows if len(row) > fragment and (t := row[fragment]) is not None), reverse=True)
        assert found == claims[min(1, len(claims) - 1)]
