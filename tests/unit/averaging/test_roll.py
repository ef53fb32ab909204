"""What a state remembers of those who contributed: the same for everybody, bounded, and no lever for a liar."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging import plan, roll
from swarm.averaging.roll import KEPT_VERSIONS, MAX_ENTRIES, PRESENT_VERSIONS, Entry, Roll, after, is_shock, warmth
from swarm.config import RunConfig
from swarm.errors import BadMessage
from swarm.network.keys import Keypair

MakeRun = Callable[..., RunConfig]
NAMES = [Keypair(bytes([number]) * 32).peer_id for number in range(1, 9)]
fixed = settings(max_examples=40, derandomize=True, deadline=None)
commits = st.lists(
    st.dictionaries(st.sampled_from(NAMES), st.integers(1, 2**40), min_size=1, max_size=8), min_size=1, max_size=30
)


def history(*rounds: dict[str, int], start: Roll = (), version: int = 0) -> Roll:
    """The roll after these rounds, each one who contributed how many tokens."""
    for contributions in rounds:
        version += 1
        start = after(start, version, contributions)
    return start


def shocks(*rounds: dict[str, int], limit: float = 0.5) -> list[int]:
    """Versions whose commit is a shock."""
    found, before = [], Roll()
    for version, contributions in enumerate(rounds, start=1):
        now = after(before, version, contributions)
        if is_shock(before, now, version=version, limit=limit):
            found.append(version)
        before = now
    return found


def equal(names: str, tokens: int = 100) -> dict[str, int]:
    return dict.fromkeys(names, tokens)


# ---- the roll ----


@fixed
@given(commits)
def test_it_says_who_contributed_when_and_how_much(rounds: list[dict[str, int]]) -> None:
    found, last = history(*rounds), len(rounds)
    assert [entry.peer_id for entry in found] == sorted({entry.peer_id for entry in found})
    for name in NAMES:
        mine = [(version, of[name]) for version, of in enumerate(rounds, start=1) if name in of]
        entry = next((entry for entry in found if entry.peer_id == name), None)
        assert (entry is not None) == bool(mine and mine[-1][0] > last - KEPT_VERSIONS)
        if entry is not None:
            assert (entry.version, entry.tokens) == mine[-1]
            assert entry.trained <= sum(tokens for _, tokens in mine)
            gaps = [two[0] - one[0] for one, two in zip(mine, mine[1:], strict=False)]
            if all(gap < KEPT_VERSIONS for gap in gaps):
                assert entry.trained == sum(tokens for _, tokens in mine)


def test_who_stays_away_for_long_is_forgotten_and_begins_anew() -> None:
    others = [{"b": 10}] * (KEPT_VERSIONS - 1)
    assert "a" in roll.present(history({"a": 500}, {"b": 10}), 2)
    [known, _] = history({"a": 500}, *others, {"a": 7, "b": 10})
    assert known == Entry("a", KEPT_VERSIONS + 1, 7, 7), "sixteen versions later it is new"
    [known, _] = history({"a": 500}, *others[:-1], {"a": 7, "b": 10})
    assert known.trained == 507


def test_it_is_bounded_and_keeps_the_newest() -> None:
    crowd = [{f"peer-{number:03}": 1 for number in range(64 * i, 64 * i + 64)} for i in range(4)]
    found = history(*crowd)
    assert len(found) == MAX_ENTRIES and {entry.version for entry in found} == {3, 4}
    huge = history(*[{"a": 2**40}] * 15, start=(Entry("a", 1, 1, 10**15 - 5),), version=1)
    assert huge[0].trained == 10**15, "a number of tokens that travels"


@fixed
@given(commits, st.randoms(use_true_random=False))
def test_the_order_in_which_contributors_are_named_is_no_matter(rounds: list[dict[str, int]], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = []
    for contributions in rounds:
        items = list(contributions.items())
        random.shuffle(items)
        shuffled.append(dict(items))
    one, two = history(*rounds), history(*shuffled)
    assert one == two and roll.canonical(one) == roll.canonical(two)


def test_where_commits_have_no_room_for_all_who_is_not_in_one_has_not_left() -> None:
    halves = [equal([f"{side}{number:02}" for number in range(40)]) for side in "ab"]  # type: ignore[arg-type]
    turns = [halves[0]] * 4 + [halves[1]] * 4
    assert shocks(*turns) == [], "80 peers of late: too many for one commit"
    assert shocks(*[dict(list(half.items())[:30]) for half in turns]) == [5], "60 would all have had a place"


# ---- as it travels ----


@fixed
@given(commits)
def test_it_comes_through_json(rounds: list[dict[str, int]]) -> None:
    found = history(*rounds)
    assert roll.from_json(json.loads(roll.canonical(found))) == found
    assert roll.from_json(roll.to_json(found)) == found


def test_the_longest_fits_into_a_head_and_a_files_header() -> None:
    longest = tuple(Entry("Q" * 79 + f"{i}"[:1], 2**40, 2**40, 10**15) for i in range(1, MAX_ENTRIES + 1))
    assert len(roll.canonical(longest)) < 24_000
    assert len(json.dumps({"roll": roll.canonical(longest).decode()})) < 32_000


GOOD = {"peer_id": NAMES[0], "version": 3, "tokens": 5, "trained": 9}


@pytest.mark.parametrize("said", [
    None, {}, "[]", 7, [None], [[]], [{}], [{**GOOD, "more": 1}], [{**GOOD, "version": 0}], [{**GOOD, "tokens": 0}],
    [{**GOOD, "tokens": 2**41}], [{**GOOD, "trained": 10**16}], [{**GOOD, "trained": True}], [{**GOOD, "tokens": 1.0}],
    [{**GOOD, "peer_id": "x"}], [{**GOOD, "peer_id": "../" * 9}], [GOOD, GOOD], [GOOD] * (MAX_ENTRIES + 1),
    [{**GOOD, "version": float("nan")}],
    [{**GOOD, "peer_id": name} for name in sorted(NAMES, reverse=True)],
])
def test_what_is_no_roll_is_refused(said: object) -> None:
    with pytest.raises(BadMessage):
        roll.from_json(said)


# ---- shocks ----


def test_the_first_round_and_a_steady_swarm_are_no_shocks() -> None:
    assert shocks({"a": 10}) == shocks(*[equal("abcd")] * 9) == []
    assert shocks(*[{"a": 10 + i % 7, "b": 90 - i % 5, "c": 33} for i in range(20)]) == []


def test_one_that_joins_one_of_two_that_leaves_and_a_slow_exchange_are_none() -> None:
    assert shocks(*[equal("a")] * 3, *[equal("ab")] * 5) == []
    assert shocks(*[equal("ab")] * 3, *[equal("a")] * 9) == []
    assert shocks(*[equal(names) for names in ("abcd", "abce", "abfe", "agfe", "hgfe", "hgfi")]) == []


def test_where_most_is_new_it_is_one_at_once() -> None:
    assert shocks(*[equal("a")] * 3, *[equal("abcd")] * 5) == [4]
    assert shocks(*[equal("abcd")] * 3, *[equal("efgh")] * 5) == [4], "and not again when the old ones are gone"
    assert shocks(*[equal("abcd")] * 3, *[equal("aefg")] * 9, limit=1.0) == [], "1: never"


def test_who_misses_a_round_or_two_has_not_left() -> None:
    steady, few = equal("abcd"), equal("a")
    for missed in range(1, PRESENT_VERSIONS):
        assert shocks(*[steady] * 3, *[few] * missed, *[steady] * 4) == []
    assert shocks(*[steady] * 3, *[few] * PRESENT_VERSIONS, *[steady] * 4) == [6, 7], "three have left, and come again"


def test_a_claim_does_not_bring_it_about() -> None:
    honest = equal("abcd")
    assert shocks(*[honest] * 3, {**honest, "d": 2**40}, honest, {**honest, "d": 2**40}, honest) == []
    assert shocks(*[honest] * 3, {**honest, "liar": 2**40}, *[honest] * 6) == []


@fixed
@given(commits, st.floats(0.05, 0.95))
def test_a_shock_is_a_matter_of_shares(rounds: list[dict[str, int]], limit: float) -> None:
    """Ten times as many tokens of everybody are no other swarm."""
    small = [{name: tokens % 2**20 + 1 for name, tokens in of.items()} for of in rounds]
    more = [{name: tokens * 8 for name, tokens in of.items()} for of in small]  # 8: shares keep their very bits
    assert shocks(*small, limit=limit) == shocks(*more, limit=limit)
    assert shocks(*small, limit=1.0) == []


# ---- warmth ----


def test_a_newcomer_weighs_little_and_grows(make_run: MakeRun) -> None:
    """Rounds of eight inner steps of 1,024 tokens: forty steps are warm."""
    run = make_run()
    step = run.train.batch_sequences * run.train.sequence_length
    tokens = {"old": 8 * step, "new": 8 * step}
    found, weighed = history(*[{"old": 8 * step}] * 9), []
    for version in range(10, 16):
        weighed.append(warmth(found, tokens, run)["new"])
        assert warmth(found, tokens, run)["old"] == 1.0
        found = after(found, version, tokens)
    assert weighed == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    shares = plan.weights(tokens, {"old": 1.0, "new": 0.1})
    assert shares == pytest.approx({"old": 1 / 1.1, "new": 0.1 / 1.1})


def test_where_all_are_cold_all_weigh_by_their_tokens(make_run: MakeRun) -> None:
    tokens = {"a": 3000, "b": 1000, "c": 2000}
    assert plan.weights(tokens, warmth((), tokens, make_run())) == pytest.approx(plan.weights(tokens))


def test_it_can_be_switched_off_and_is_nothing_in_sync_runs(make_run: MakeRun) -> None:
    tokens = {"a": 3000, "b": 1000}
    assert warmth((), tokens, make_run(warm_steps=0)) == warmth((), tokens, make_run(mode="sync", bits=32)) == {}


@fixed
@given(commits, st.dictionaries(st.sampled_from(NAMES), st.integers(1, 2**40), min_size=1))
def test_warmth_is_bounded_and_what_a_peer_claims_now_hardly_warms_it(
    rounds: list[dict[str, int]], tokens: dict[str, int]
) -> None:
    run = dataclasses.replace(RUN, averaging=dataclasses.replace(RUN.averaging, warm_steps=1000))
    found = warmth(history(*rounds), tokens, run)
    assert found.keys() == tokens.keys()
    assert all(roll.LEAST_WARMTH <= value <= 1.0 for value in found.values())
    liar = max(tokens, key=lambda name: (tokens[name], name))
    if len(tokens) > 2 and tokens[liar] > statistics.median(tokens.values()):
        assert warmth(history(*rounds), {**tokens, liar: 2**41}, run) == found


@fixed
@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=5), st.integers(1, 2**40), min_size=1, max_size=20),
       st.floats(0.1, 1.0), st.integers(0, 19))
def test_a_colder_contribution_weighs_less_and_never_nothing(tokens: dict[str, int], warm: float, which: int) -> None:
    name = sorted(tokens)[which % len(tokens)]
    cold, full = plan.weights(tokens, {name: warm}), plan.weights(tokens)
    assert sum(cold.values()) == pytest.approx(1, abs=1e-12) and cold.keys() == tokens.keys()
    assert 0 < cold[name] <= full[name] * (1 + 1e-12)
    assert all(cold[other] >= full[other] * (1 - 1e-12) for other in tokens if other != name)


@pytest.fixture(autouse=True)
def _run(make_run: MakeRun) -> None:
    global RUN
    RUN = make_run()


RUN: RunConfig
