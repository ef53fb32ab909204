"""A round's decisions: pure functions that all peers must answer alike, and that no peer can bend."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging import plan
from swarm.averaging.outer import OuterStep
from swarm.config import RunConfig

MakeRun = Callable[..., RunConfig]
fixed = settings(max_examples=80, derandomize=True, deadline=None)
peers = st.lists(st.text("abcdefghijk123", min_size=1, max_size=12), min_size=1, max_size=12, unique=True)
durations = st.lists(st.floats(0.001, 300), min_size=3, max_size=16)


@fixed
@given(peers, st.integers(0, 255), st.integers(1, 2**40), st.randoms(use_true_random=False))
def test_rank_is_the_same_permutation_for_everybody(some: list[str], fragment: int, version: int, random) -> None:  # type: ignore[no-untyped-def]
    order = plan.rank(some, fragment=fragment, version=version)
    assert sorted(order) == sorted(some)
    shuffled = list(some)
    random.shuffle(shuffled)
    assert plan.rank(shuffled, fragment=fragment, version=version) == order


@fixed
@given(peers, st.integers(0, 255), st.integers(1, 1000), st.integers(0, 11))
def test_a_peer_that_leaves_moves_nobody_else(some: list[str], fragment: int, version: int, leaver: int) -> None:
    gone = some[leaver % len(some)]
    order = plan.rank(some, fragment=fragment, version=version)
    rest = plan.rank([peer for peer in some if peer != gone], fragment=fragment, version=version)
    assert rest == [peer for peer in order if peer != gone]


def test_every_peer_opens_about_as_often() -> None:
    names = [f"peer-{i}" for i in range(5)]
    first = Counter(plan.rank(names, fragment=f, version=v)[0] for f in range(4) for v in range(1, 251))
    assert all(140 < first[name] < 260 for name in names)
    orders = {tuple(plan.rank(names, fragment=0, version=version)) for version in range(1, 60)}
    assert len(orders) > 30, "each round has another order"
    assert plan.rank(names, fragment=0, version=11) != plan.rank(names, fragment=1, version=11)


def due_at(run: RunConfig, fragment: int, *, step: int = 0) -> list[int]:
    """Tokens trained at each commit of a fragment until the run is complete. `step`: what everybody trains between two
    looks, so that a round may come a little late."""
    found, tokens = [], 0
    while tokens < run.train.total_tokens:
        target = plan.target_tokens(run, fragment=fragment, version=len(found), tokens=tokens, staggered=True)
        assert target >= 1
        tokens += target if not step else -(-target // step) * step
        found.append(tokens)
    return found


def lengths(commits: list[int]) -> list[int]:
    return [later - earlier for earlier, later in zip([0, *commits], commits, strict=False)]


def test_fragments_take_turns_from_the_first_round_on(make_run: MakeRun) -> None:
    run = make_run({"total_tokens": 10_000}, tokens_per_round=1000)
    assert [due_at(run, fragment)[:3] for fragment in range(4)] == [
        [250, 1250, 2250], [500, 1500, 2500], [750, 1750, 2750], [1000, 2000, 3000]
    ]
    assert {
        plan.target_tokens(run, fragment=f, version=v, tokens=9_900, staggered=False) for f in range(4) for v in (0, 3)
    } == {1000}, "sync runs: a step is a step"
    many = dataclasses.replace(make_run(tokens_per_round=1), fragments=256)
    assert plan.target_tokens(many, fragment=0, version=0, tokens=0, staggered=True) == 1, "never zero"


def test_all_fragments_end_with_the_run_and_none_in_a_short_round(make_run: MakeRun) -> None:
    run = make_run({"total_tokens": 10_000}, tokens_per_round=1000)
    for fragment in range(4):
        commits = due_at(run, fragment)
        assert commits[-1] == 10_000 and 500 <= lengths(commits)[-1] < 1500
        assert set(lengths(commits)[1:-1]) == {1000}
    assert due_at(make_run({"total_tokens": 400}, tokens_per_round=1000), 3) == [400], "a run of one round"


@fixed
@given(st.integers(1, 3_000), st.integers(1, 40), st.integers(0, 3), st.integers(1, 700))
def test_every_fragment_has_one_last_round_in_which_nothing_is_cut_short(
    length: int, rounds: int, fragment: int, step: int
) -> None:
    """Whatever a step is: the plain average comes once, or once more for what was only estimated."""
    total = length * rounds
    run = dataclasses.replace(
        RUN, train=dataclasses.replace(RUN.train, total_tokens=total),
        averaging=dataclasses.replace(RUN.averaging, tokens_per_round=length),
    )
    commits = [0, *due_at(run, fragment, step=step)]
    last = [
        OuterStep(run, version, before, now).last
        for version, (before, now) in enumerate(zip(commits, commits[1:], strict=False), start=1)
    ]
    assert last[-1] and 1 <= sum(last) <= 2 and last == sorted(last)


def test_rounds_grow_from_a_fresh_start_and_then_stay(make_run: MakeRun) -> None:
    run = make_run({"total_tokens": 10**6}, tokens_per_round=8_000, first_round_tokens=1_000, ramp_tokens=50_000)
    for fragment in range(4):
        found = lengths(due_at(run, fragment))
        growing = [length for length in found[1:-1] if length < 8_000]
        assert growing == sorted(growing) and 1_000 <= growing[0] < 1_200 and 10 < len(growing) < 20
        assert set(found[1 + len(growing):-1]) == {8_000}, "from the end of the ramp on"
    assert plan.round_tokens(run.averaging, 25_000) == 4_500
    assert [plan.round_tokens(run.averaging, tokens) for tokens in (0, 50_000, 10**9)] == [1_000, 8_000, 8_000]


def test_fragments_keep_their_turns_while_rounds_grow(make_run: MakeRun) -> None:
    run = make_run({"total_tokens": 10**6}, tokens_per_round=8_000, first_round_tokens=1_000, ramp_tokens=50_000)
    commits = sorted((at, fragment) for fragment in range(4) for at in due_at(run, fragment)[:-1])
    order = [fragment for _, fragment in commits]
    assert order[:200] == [0, 1, 2, 3] * 50
    gaps = [later - earlier for (earlier, _), (later, _) in zip(commits[80:], commits[81:300], strict=False)]
    assert min(gaps) > 500 and max(gaps) < 4_000, "and their distance, roughly: the uplink has pauses"


def test_without_a_ramp_rounds_are_as_ever_and_a_trained_start_has_none(make_run: MakeRun) -> None:
    averaging = make_run(tokens_per_round=700).averaging
    assert {plan.round_tokens(averaging, tokens) for tokens in (0, 1, 699, 10**12)} == {700}


@fixed
@given(st.integers(1, 5000), peers)
def test_parts_tile_the_fragment(num_blocks: int, owners: list[str]) -> None:
    parts = plan.split(num_blocks, owners)
    assert parts[0][0] == 0 and parts[-1][1] == num_blocks
    assert all(one[1] == two[0] for one, two in zip(parts, parts[1:], strict=False))
    sizes = [end - start for start, end, _ in parts]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    of_owners = [owner for _, _, owner in parts]
    assert of_owners == sorted(of_owners) and len(set(of_owners)) == min(num_blocks, len(owners))
    assert len({of_owners.count(owner) for owner in of_owners}) == 1, "as many parts for each"
    assert parts == plan.split(num_blocks, owners[::-1])


def test_only_long_runs_are_cut_and_never_into_too_many_parts() -> None:
    one = plan.MIN_PIECE_BLOCKS
    lengths = (2, 4 * one - 1, 4 * one, 6 * one, 8 * one, 99 * one)
    assert [len(plan.split(num_blocks, ["a", "b"])) for num_blocks in lengths] == [2, 2, 4, 6, 8, 8]
    for count in range(1, 100):
        parts = plan.split(10**6, [f"{number:03}" for number in range(count)])
        assert len(parts) <= plan.MAX_PARTS and len({owner for _, _, owner in parts}) == min(count, plan.MAX_PARTS)


@fixed
@given(st.integers(1, 10**5), peers)
def test_every_owner_gets_its_first_part_before_anybody_its_second(num_blocks: int, owners: list[str]) -> None:
    of_parts = [sorted(owners).index(owner) for _, _, owner in plan.split(num_blocks, owners)]
    waves = plan.waves(of_parts)
    assert sorted(part for wave in waves for part in wave) == list(range(len(of_parts)))
    for wave in waves:
        assert sorted({of_parts[part] for part in wave}) == sorted(of_parts[part] for part in wave) == sorted(
            set(of_parts)
        )
    for owner in set(of_parts):
        order = [part for wave in waves for part in wave if of_parts[part] == owner]
        assert order == sorted(order)


claims = st.dictionaries(st.text("abcdef", min_size=1, max_size=5), st.integers(1, 2**40), min_size=1, max_size=20)


@fixed
@given(claims)
def test_weights_add_up_and_the_cap_holds(tokens: dict[str, int]) -> None:
    shares = plan.weights(tokens)
    assert shares.keys() == tokens.keys()
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert all(0 < share <= 1 for share in shares.values())
    median = statistics.median(tokens.values())
    typical = [peer for peer, count in tokens.items() if count <= median]
    for peer, count in tokens.items():
        for other in typical:
            cap = min(count, plan.WEIGHT_CAP * median)
            assert shares[peer] / shares[other] == pytest.approx(cap / tokens[other], rel=1e-9)


def test_weights_of_honest_peers_are_their_tokens_and_claims_gain_little() -> None:
    assert plan.weights({"a": 100, "b": 300}) == {"a": 0.25, "b": 0.75}
    assert plan.weights({"a": 3, "b": 2, "c": 5}) == {"a": 0.3, "b": 0.2, "c": 0.5}
    greedy = plan.weights({"a": 100, "b": 100, "c": 100, "liar": 2**40})
    assert greedy["liar"] == pytest.approx(0.4)


def test_the_deadline_before_anything_is_known_follows_the_bytes() -> None:
    assert plan.deadline_s([], bytes_each=0) == plan.deadline_s([1.0, 1.0], bytes_each=0) == 10.0
    assert plan.deadline_s([], bytes_each=1_280_000) == pytest.approx(20.0)
    assert plan.deadline_s([], bytes_each=10**12) == 600.0


@fixed
@given(durations, st.floats(0, 60))
def test_the_deadline_is_bounded_and_follows_the_durations(recent: list[float], later: float) -> None:
    deadline = plan.deadline_s(recent, bytes_each=10**9)
    assert 3.0 <= deadline <= 600.0
    assert deadline >= min(600.0, 2 * statistics.median(recent))
    assert plan.deadline_s([value + later for value in recent], bytes_each=0) >= deadline - 1e-9
    assert plan.deadline_s(recent[::-1], bytes_each=0) == deadline


@fixed
@given(st.lists(st.floats(0.5, 2.0), min_size=5, max_size=15), st.floats(0, 10_000))
def test_one_outlier_does_not_carry_the_deadline_away(recent: list[float], outlier: float) -> None:
    """One frozen peer in a round must not make the next ones wait for minutes."""
    assert plan.deadline_s([*recent, outlier], bytes_each=0) <= 2 * (2.0 + 6 * 1.5)


def test_the_deadline_grows_with_the_spread() -> None:
    steady, jumpy = [4.0, 4.1, 3.9, 4.0, 4.0], [2.0, 7.0, 4.0, 1.0, 6.0]
    assert plan.deadline_s(steady, bytes_each=0) == pytest.approx(8.0)
    assert plan.deadline_s(jumpy, bytes_each=0) == pytest.approx(32.0)


@pytest.mark.parametrize(("reaches", "leading"), [
    ({"a": "public", "b": "", "c": "punched"}, "abc"),
    ({"a": "public", "b": "", "c": "punched", "d": "outbound"}, "ab"),
    ({"a": "public", "d": "outbound"}, "a"),
    ({"c": "punched", "e": "punched"}, "ce"),
    ({"c": "punched", "d": "outbound"}, "cd"),  # nobody whom all can dial: better anybody than nobody
    ({"d": "outbound"}, "d"),
])
def test_who_leads_can_be_dialled_by_all(reaches: dict[str, str], leading: str) -> None:
    assert plan.leaders(reaches) == list(leading)


def test_an_outbound_peer_that_is_only_heard_of_counts_too() -> None:
    reaches = {"a": "public", "c": "punched"}
    assert plan.leaders(reaches, others_outbound=True) == ["a"]
    assert plan.leaders({"c": "punched"}, others_outbound=True) == ["c"]


@pytest.fixture(autouse=True)
def _run(make_run: MakeRun) -> None:
    global RUN
    RUN = make_run()


RUN: RunConfig


# ---- more peers than a round has room for ----


def test_all_are_invited_while_there_is_room() -> None:
    peers = [f"peer {number}" for number in range(63)]
    assert plan.invited(peers, fragment=0, version=1, most=63) == peers
    assert plan.invited([], fragment=0, version=1, most=63) == []


def test_of_many_others_have_their_turn_each_time_and_nobody_is_left_out_for_long() -> None:
    peers = [f"peer {number}" for number in range(150)]
    turns = [plan.invited(peers, fragment=0, version=version, most=50) for version in range(1, 31)]
    assert all(len(set(turn)) == 50 and set(turn) <= set(peers) for turn in turns)
    assert turns[0] == plan.invited(peers[::-1], fragment=0, version=1, most=50), "every opener would invite the same"
    times = [sum(peer in turn for turn in turns) for peer in peers]
    assert min(times) >= 3 and max(times) <= 18 and sum(times) == 30 * 50


def test_who_leaves_goes_first() -> None:
    peers = [f"peer {number}" for number in range(100)]
    leaving = peers[90:]
    for version in range(5):
        turn = plan.invited(peers, first=leaving, fragment=0, version=version, most=20)
        assert set(turn[:10]) == set(leaving) and len(set(turn)) == 20
    assert set(plan.invited(peers, first=peers, fragment=0, version=1, most=20)) <= set(peers)
