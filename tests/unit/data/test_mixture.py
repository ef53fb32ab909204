"""Shares by tokens to half a percent; the same rows again from the same cursor; what stalls is never replaced."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data.feeder import FIRST_PATIENCE_S, PATIENCE_S
from swarm.data.mixture import CATCH_UP_ROWS, open_mixture
from swarm.data.text_stream import TextClosed
from swarm.data.tokenizer import byte_tokenizer
from swarm.errors import ConfigError, NetworkError, StateError
from tests.unit.data.made_up import LENGTH, ROWS, World, in_order, of_sources, origins
from tests.unit.data.task_sets import p3_rows, run_over, write_jsonl

RECIPE = {"pile": 0.55, "p3": 0.2, "ni": 0.2, "cot": 0.05}


@pytest.fixture
def world():
    made: list = []

    def make(*mixtures, **options):
        one = World(*(mixtures or (RECIPE,)), **options)
        made.append(one)
        return one

    yield make
    for one in made:
        for source in one.sources.values():
            source.gate.set()


def draw(mixture, batches, size=4):
    return [row for _ in range(batches) for row in origins(mixture.next_batch(size))]


def shares(mixture):
    tokens = mixture.tokens()
    return {name: count / sum(tokens.values()) for name, count in tokens.items()}


# --- shares and order


def test_shares_are_exact_over_ten_million_tokens(world):
    one = world(rows=5000)
    for source in one.sources.values():
        source.padding = {"pile": 0, "p3": 3, "ni": 1, "cot": 5}[source.name]
    mixture = one.mixture()
    for _ in range(10_000_000 // (64 * 2048)):  # rows of 8 stand for rows of 2048: it is rows that cannot be divided
        mixture.next_batch(64)
    for name, share in shares(mixture).items():
        assert share == pytest.approx(RECIPE[name], rel=0.005), "each share, to half a percent of it"
    mixture.close()


@settings(deadline=None, max_examples=15)
@given(wanted=st.lists(st.floats(0.02, 1), min_size=1, max_size=6), batches=st.integers(1, 60))
def test_no_source_is_ever_further_off_than_rows(wanted, batches):
    mixture_of = {f"s{n}": share / sum(wanted) for n, share in enumerate(wanted)}
    one = World(mixture_of, rows=50)
    mixture = one.mixture()
    draw(mixture, batches)
    total = batches * 4 * LENGTH
    for name, count in mixture.tokens().items():
        assert abs(count - mixture_of[name] * total) <= LENGTH * len(wanted)
    mixture.close()


def test_each_source_is_read_in_its_order_and_none_twice(world):
    mixture = world().mixture()
    found = of_sources(draw(mixture, 100))
    assert len(found) == 4
    for rows in found.values():
        assert rows == in_order(len(rows))
    mixture.close()


def test_two_runs_with_the_same_seeds_give_the_same(world):
    drawn = []
    for _ in range(2):
        mixture = world().mixture()
        drawn.append(draw(mixture, 80))
        mixture.close()
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("batches", [0, 1, 7, 30, 61])
def test_a_restart_neither_repeats_nor_skips(batches, world):
    mixture = world().mixture()
    draw(mixture, batches, size=3)
    state = json.loads(json.dumps(mixture.state()))
    rest = draw(mixture, 40, size=3)
    again = world().mixture(state)
    assert again.state() == state
    assert draw(again, 40, size=3) == rest
    assert len(json.dumps(state)) < 1000
    for one in (mixture, again):
        one.close()


def test_a_mixture_that_runs_can_be_set_back(world):
    mixture = world().mixture()
    draw(mixture, 5)
    state = mixture.state()
    rest = draw(mixture, 20)
    mixture.load_state(state)
    assert draw(mixture, 20) == rest
    mixture.close()


@pytest.mark.parametrize(
    "change",
    [
        {}, {"phases": []}, {"phases": {"x": {}}}, {"phases": {"7": {}}}, {"phases": {"-1": {}}},
        {"phases": {"0": {"places": {}, "tokens": {}, "rows": 0}}},
        {"phases": {"0": {"places": {"a": [0, 0, 0, -1]}, "tokens": {"a": 0}, "rows": 0}}},
        {"phases": {"0": {"places": {"a": [0, 0, 0]}, "tokens": {"a": 0}, "rows": 0}}},
        {"phases": {"0": {"places": {"a": [0, 0, 0, 1.5]}, "tokens": {"a": 0}, "rows": 0}}},
        {"phases": {"0": {"places": {"a": [0, 0, 0, True]}, "tokens": {"a": 0}, "rows": 0}}},
        {"phases": {"0": {"places": {"b": [0, 0, 0, 0]}, "tokens": {"a": 0}, "rows": 0}}},
        {"pass": 0, "position": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_cursor_is_refused_and_changes_nothing(change, world):
    mixture = world({"a": 1.0}).mixture()
    draw(mixture, 3)
    before = mixture.state()
    with pytest.raises(StateError) as caught:
        mixture.load_state(change)
    assert caught.value.do and mixture.state() == before
    assert draw(mixture, 1)[0] == (0, 0, 0, 2, 0)
    mixture.close()


# --- phases


def test_phases_begin_when_the_swarm_says_so(world):
    one = world({"a": 1.0, "b": 1e-9}, {"a": 0.5, "b": 0.5})
    mixture = one.mixture()
    found = of_sources(draw(mixture, 5))
    assert found[0] == in_order(len(found[0]))
    one.tokens = 1000
    assert {row[:2] for row in draw(mixture, 5)} == {(1, 0), (1, 1)}
    one.tokens = 999  # a swarm whose newest commit was taken back
    assert of_sources(draw(mixture, 1))[0] == in_order(len(found[0]) + 4)[-4:], "each phase has its place"
    mixture.close()


def test_a_restart_keeps_the_places_of_every_phase(world):
    one = world({"a": 1.0}, {"a": 1.0})
    mixture = one.mixture()
    draw(mixture, 2)
    one.tokens = 1500
    draw(mixture, 3)
    again = world({"a": 1.0}, {"a": 1.0})
    again.tokens = 1500
    second = again.mixture(mixture.state())
    assert of_sources(draw(second, 1))[0] == in_order(16, phase=1)[12:]
    assert second.tokens() == {"a": 24 * LENGTH}
    for each in (mixture, second):
        each.close()


def test_the_next_phase_is_opened_before_it_begins(world):
    one = world({"a": 1.0}, {"a": 1.0})
    mixture = one.mixture()
    one.tokens = 850
    draw(mixture, 1)
    assert not one.sources[1, "a"].asked
    one.tokens = 950
    draw(mixture, 1)
    with mixture._changed:
        assert mixture._changed.wait_for(lambda: mixture._blends[1].feeders["a"].has_row(), 60)
    one.tokens = 1000
    waits = mixture.waits
    draw(mixture, 1)
    assert mixture.waits == waits, "training waited for the new phase"
    assert list(mixture._blends) == [1], "the old one is closed"
    mixture.close()


# --- sources that stall


def test_what_stalls_is_held_back_reported_and_made_up(world):
    one = world({"a": 0.5, "b": 0.5})
    mixture = one.mixture()
    draw(mixture, 5)
    one["b"].error = NetworkError("no route", why="cable")
    rows = draw(mixture, 25)
    assert rows[-40:] == [row for row in rows[-40:] if row[1] == 0], "not drawn while it is away"
    [warning] = one.warnings
    assert "'b' has stalled" in warning and "no route (cable)" in warning and "goes on with the others" in warning
    assert shares(mixture)["b"] < 0.35
    one["b"].error = None
    one.retry.release()
    with mixture._changed:
        assert mixture._changed.wait_for(lambda: mixture._blends[0].feeders["b"].has_row(), 60)
    rows = draw(mixture, 15)
    behind = [row[1] for row in rows[: 2 * CATCH_UP_ROWS]]
    assert behind.count(0) == CATCH_UP_ROWS // 2, "the others keep half of their share meanwhile"
    assert one.warnings[1:] == ["the source 'b' is back: the tokens that it is behind by are made up now"]
    draw(mixture, 40)
    assert shares(mixture)["b"] == pytest.approx(0.5, abs=0.01)
    found = of_sources(draw(mixture, 1))
    assert set(found) == {0, 1}
    mixture.close()


def test_nothing_of_a_source_is_lost_by_its_stall(world):
    one = world({"a": 0.5, "b": 0.5})
    mixture = one.mixture()
    rows = draw(mixture, 5)
    one["b"].error = OSError("gone")
    rows += draw(mixture, 20)
    one["b"].error = None
    one.retry.release()
    with mixture._changed:
        mixture._changed.wait_for(lambda: mixture._blends[0].feeders["b"].has_row(), 60)
    rows += draw(mixture, 20)
    for found in of_sources(rows).values():
        assert found == in_order(len(found))
    mixture.close()


def test_one_that_hangs_is_not_waited_for_longer_than_its_patience(world):
    one = world({"a": 0.5, "b": 0.5})
    mixture = one.mixture()
    draw(mixture, 2)
    one["b"].gate.clear()
    one.tick = PATIENCE_S / 4
    rows = draw(mixture, 30)
    assert [row[1] for row in rows[-20:]] == [0] * 20
    assert "it does not answer" in one.warnings[0]
    mixture.close()


def test_a_stall_at_the_start_does_not_keep_the_others_from_training(world):
    one = world({"a": 0.9, "b": 0.1})
    one["b"].error = NetworkError("the hub is down")
    mixture = one.mixture()
    assert {row[1] for row in draw(mixture, 10)} == {0}
    assert len(one.warnings) == 1
    mixture.close()
    slow = world({"a": 0.9, "b": 0.1})
    slow["b"].gate.clear()
    slow.tick = FIRST_PATIENCE_S / 4
    mixture = slow.mixture()
    assert {row[1] for row in draw(mixture, 3)} == {0}
    mixture.close()


def test_where_all_stall_training_waits_and_is_told_so(world):
    one = world({"a": 0.5, "b": 0.5})
    mixture = one.mixture()
    draw(mixture, 1)
    for name in "ab":
        one[name].error = OSError("gone")
    warnings: list[str] = []
    one.warnings = warnings

    def back(text):
        warnings.append(text)
        if len(warnings) == 2:
            for name in "ab":
                one[name].error = None
                one.retry.release()

    mixture._warn = back
    rows = draw(mixture, 20)
    assert len(rows) == 80 and mixture.waits > 0
    assert "training waits" in warnings[1] and "training waits" not in warnings[0]
    mixture.close()


def test_a_source_that_cannot_be_is_an_error_at_the_start(world):
    one = world({"a": 0.5, "b": 0.5})
    one["b"].error = ConfigError("sources.b is nonsense", do="mend it")
    with pytest.raises(ConfigError, match="nonsense"):
        one.mixture()


def test_closing_wakes_who_waits(world):
    one = world({"a": 1.0})
    mixture = one.mixture()
    one["a"].error = OSError("gone")
    mixture._warn = lambda text: mixture.close()
    with pytest.raises(TextClosed):
        draw(mixture, 30)
    with pytest.raises(TextClosed):
        mixture.next_batch(1)
    assert mixture.state()["phases"]["0"]["tokens"]["a"] > 0, "where it was is still known"
    mixture.close()


def test_nobody_waits_while_sources_are_quick(world):
    one = world()
    mixture = one.mixture()
    for _ in range(30):
        with mixture._changed:  # as long as an inner step takes, feeders have time
            feeders = mixture._blends[0].feeders.values()
            assert mixture._changed.wait_for(lambda feeders=feeders: all(f._ready for f in feeders), 60)
        draw(mixture, 1)
    assert mixture.waits == 0 and mixture.waited_s == 0.0
    mixture.close()


# --- the whole way, from files


@pytest.fixture
def run(tmp_path):
    pile = [{"text": f"document {i} " * 30} for i in range(60)]
    return run_over(
        {
            "pile": {"files": [str(write_jsonl(tmp_path / "pile.jsonl", pile))]},
            "p3": {"format": "p3", "files": [str(write_jsonl(tmp_path / "p3.jsonl", p3_rows(300)))]},
        },
        phases=[{"tokens": 500, "objective": "ul2"}, {"objective": "prefix", "mixture": {"pile": 3, "p3": 1}}],
    )  # fmt: skip


def opened(run, reader, tokens=0, state=None):
    mixture = open_mixture(run, byte_tokenizer(), vocabulary=320, reader=reader, swarm_tokens=lambda: tokens)
    if state:
        mixture.load_state(state)
    mixture.start()
    return mixture


@pytest.mark.parametrize("tokens", [0, 500])
def test_from_files_the_cursor_is_all_there_is(tokens, run):
    one, same, other = (opened(run, reader, tokens) for reader in ("anna", "anna", "bert"))
    first = [one.next_batch(5) for _ in range(25)]
    assert all(a.tokens.equal(same.next_batch(5).tokens) for a in first)
    assert sum(a.tokens.equal(other.next_batch(5).tokens) for a in first) == 0, "another peer, the same data"
    again = opened(run, "anna", tokens, json.loads(json.dumps(one.state())))
    for _ in range(20):
        a, b = one.next_batch(5), again.next_batch(5)
        assert a.tokens.equal(b.tokens) and a.segments == b.segments
    assert len(json.dumps(one.state())) < 1000
    for each in (one, same, other, again):
        each.close()


def test_from_files_shares_hold(run):
    mixture = opened(run, "anna", 500)
    for _ in range(300):
        mixture.next_batch(4)
    tokens = mixture.tokens()
    assert tokens["p3"] / sum(tokens.values()) == pytest.approx(0.25, abs=0.002)
    mixture.close()


def test_files_of_a_later_phase_are_missed_at_once(tmp_path):
    there = str(write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 500}] * 20))
    run = run_over(
        {"here": {"files": [there]}, "gone": {"files": [str(tmp_path / "gone.jsonl")]}},
        phases=[{"tokens": 10, "mixture": {"here": 1}}, {"mixture": {"gone": 1}}],
    )
    with pytest.raises(ConfigError, match=r"gone\.jsonl"):
        opened(run, "anna")


@pytest.mark.parametrize("later", [False, True])
def test_columns_that_are_not_there_are_an_error_at_the_start(later, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "x", "answer": "y"}] * ROWS)
    sources = {"code": {"stdlib": True}, "p3": {"format": "p3", "files": [str(path)]}}
    phases = [{"tokens": 10, "mixture": {"code": 1}}, {}] if later else [{}]
    with pytest.raises(ConfigError, match="not rows of format p3") as caught:
        opened(run_over(sources, phases=phases), "anna")
    assert "question, answer" in caught.value.why


def test_a_row_that_is_broken_further_on_is_an_error_at_the_start_too(run, tmp_path):
    with (tmp_path / "p3.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ConfigError, match="is not JSON"):
        opened(run, "anna", 500)
