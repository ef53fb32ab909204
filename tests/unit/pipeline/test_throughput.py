"""Flow against the linear program it is the dual of; fair rates against flow; what worth prefers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from swarm.pipeline.throughput import NOTHING, Floats, Stages, fair_rates, flow, masks_of, stages_of, worth


def stages(*rows: tuple[int, int, float], num_fragments: int) -> Stages:
    firsts, ends, speeds = (np.array([row[i] for row in rows]) for i in range(3))
    return stages_of(firsts.astype(np.int64), ends.astype(np.int64), speeds.astype(float), num_fragments=num_fragments)


def linear_program(firsts: Floats, ends: Floats, speeds: Floats, work: Floats) -> float:
    """As in the docstring of throughput.py: y[p, f] and F, the most F."""
    num_peers, num_fragments = len(speeds), len(work)
    variables = num_peers * num_fragments
    peers = np.zeros((num_peers, variables + 1))
    for peer in range(num_peers):
        peers[peer, peer * num_fragments:(peer + 1) * num_fragments] = 1
    fragments = np.zeros((num_fragments, variables + 1))
    for fragment in range(num_fragments):
        fragments[fragment, fragment:variables:num_fragments] = 1
        fragments[fragment, variables] = -work[fragment]
    inside = masks_of(firsts.astype(np.int64), ends.astype(np.int64), num_fragments).ravel() > 0
    bounds = [(0, None) if held else (0, 0) for held in inside] + [(0, None)]
    objective = np.append(np.zeros(variables), -1)
    done = linprog(objective, peers, speeds, fragments, np.zeros(num_fragments), bounds)
    assert done.status == 0
    return float(-done.fun)


@pytest.mark.parametrize("seed", range(60))
def test_flow_is_the_linear_programs_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_fragments, num_peers = int(rng.integers(1, 14)), int(rng.integers(1, 14))
    firsts = rng.integers(0, num_fragments, num_peers)
    ends = np.minimum(num_fragments, firsts + rng.integers(1, 8, num_peers))
    speeds, work = rng.uniform(0.3, 9, num_peers), rng.uniform(0.4, 3, num_fragments)
    found = flow(stages_of(firsts, ends, speeds, num_fragments=num_fragments), work)
    assert found == pytest.approx(linear_program(firsts, ends, speeds, work), abs=1e-7)


def test_the_worst_cut_may_be_in_two_places() -> None:
    """One peer holds everything and is alone at both ends; others crowd the middle."""
    crowd = stages((0, 6, 4.0), (2, 4, 100.0), num_fragments=6)
    assert flow(crowd, np.ones(6)) == pytest.approx(1.0)


def test_flow_of_one_whole_model_peer_and_of_gaps() -> None:
    assert flow(stages((0, 4, 2.0), num_fragments=4), np.ones(4)) == pytest.approx(0.5)
    assert flow(stages((0, 3, 2.0), num_fragments=4), np.ones(4)) == 0.0
    assert flow(stages((0, 0, 2.0), num_fragments=4), np.ones(4)) == 0.0


def test_stages_that_are_the_same_become_one_and_empty_ones_nothing() -> None:
    found = stages((1, 3, 2.0), (0, 0, 9.0), (1, 3, 5.0), (0, 1, 1.0), num_fragments=3)
    assert found.mask.tolist() == [[1, 0, 0], [0, 1, 1]]
    assert found.speed.tolist() == [1.0, 7.0]
    assert found.largest.tolist() == [1.0, 5.0]


def none(num_fragments: int) -> Floats:
    return np.zeros((1, num_fragments))


@pytest.mark.parametrize("seed", range(12))
def test_fair_rates_spend_all_speed_and_their_least_comes_near_the_flow(seed: int) -> None:
    rng = np.random.default_rng(seed)
    firsts = np.concatenate([[0, 8], rng.integers(0, 12, 10)])
    ends = np.concatenate([[8, 16], np.minimum(16, firsts[2:] + rng.integers(2, 9, 10))])
    speeds, work = rng.uniform(0.5, 8, 12), rng.uniform(0.5, 2, 16)
    everybody = stages_of(firsts, ends, speeds, num_fragments=16)
    rates, largest, _ = fair_rates(everybody, work, own=none(16), own_speed=0.0, prices=work, sweeps=300)
    assert (rates[0] * work).sum() == pytest.approx(speeds.sum())
    best = flow(everybody, work)
    assert 0.97 * best <= rates.min() <= best * (1 + 1e-9)
    assert (largest <= rates * (1 + 1e-9)).all() and (largest > 0).all()


def test_one_more_peer_is_the_same_as_one_more_among_the_stages() -> None:
    work = np.ones(6)
    two = stages((0, 4, 3.0), (2, 6, 2.0), num_fragments=6)
    three = stages((0, 4, 3.0), (2, 6, 2.0), (1, 5, 4.0), num_fragments=6)
    own = masks_of(np.array([1]), np.array([5]), 6)
    beside = fair_rates(two, work, own=own, own_speed=4.0, prices=work, sweeps=20)
    among = fair_rates(three, work, own=none(6), own_speed=0.0, prices=work, sweeps=20)
    for one, other in zip(beside, among, strict=True):
        np.testing.assert_allclose(one, other)


def test_a_large_peer_works_where_others_do_not() -> None:
    """Equal division would leave the ends at 1."""
    crowd = stages((0, 4, 4.0), (1, 3, 8.0), num_fragments=4)
    rates, _, _ = fair_rates(crowd, np.ones(4), own=none(4), own_speed=0.0, prices=np.ones(4), sweeps=100)
    assert rates[0, 0] == pytest.approx(2.0, rel=0.02)
    assert rates[0, 1] == pytest.approx(4.0, rel=0.02)


def test_fair_rates_of_nobody_are_nothing() -> None:
    empty = stages((0, 0, 1.0), num_fragments=3)
    rates, largest, prices = fair_rates(empty, np.ones(3), own=none(3), own_speed=0.0, prices=np.ones(3), sweeps=5)
    assert not rates.any() and not largest.any() and np.isfinite(prices).all()


def value(rates: list[float], largest: list[float], scale: float = 1.0) -> float:
    return float(worth(np.array([rates]), np.array([largest]), np.ones(len(rates)), scale=scale)[0])


def test_worth_is_a_soft_minimum() -> None:
    assert value([2.0, 2.0], [0.0, 0.0]) == pytest.approx(2.0)
    assert 1.0 <= value([1.0, 5.0], [0.0, 0.0]) < 1.2
    assert value([1.0, 2.0], [0.0, 0.0]) > value([1.0, 1.5], [0.0, 0.0])


def test_worth_prefers_two_holders_to_one_and_one_gap_to_two() -> None:
    assert value([2.0, 2.0], [1.0, 1.0]) > value([2.0, 2.0], [2.0, 1.0])
    two, one, no_gap = value([0.0, 0.0, 2.0], [0.0] * 3), value([0.0, 2.0, 2.0], [0.0] * 3), value([2.0] * 3, [0.0] * 3)
    assert 0 < two < one < NOTHING * 2 < no_gap


def test_worth_weighs_fragments_by_their_work() -> None:
    rates, largest = np.array([[1.0, 3.0], [3.0, 1.0]]), np.zeros((2, 2))
    light_first, heavy_first = worth(rates, largest, np.array([1.0, 9.0]), scale=1.0)
    assert light_first > heavy_first
