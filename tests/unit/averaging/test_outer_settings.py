"""What the outer step is where the run config leaves it open."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.averaging import outer
from swarm.averaging.outer import OuterStep
from swarm.averaging.outer_settings import expected_rounds, momentum_of, outer_settings, rate_of
from swarm.averaging.plan import round_tokens
from swarm.config import RunConfig

MakeRun = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("rounds", "rate", "momentum"),
    [(0.2, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (18, 1.0, 0.61), (35, 1.0, 0.8), (49, 0.98, 0.86), (70, 0.7, 0.9),
     (10_000, 0.7, 0.9)],
)
def test_the_longer_the_run_the_longer_the_memory(
    make_run: MakeRun, rounds: float, rate: float, momentum: float
) -> None:
    run = make_run({"total_tokens": round(rounds * 1000)}, tokens_per_round=1000)
    assert outer_settings(run) == (rate, momentum)


def test_what_is_said_holds_and_the_rest_follows(make_run: MakeRun) -> None:
    train = {"total_tokens": 35_000}
    assert outer_settings(make_run(train, tokens_per_round=1000, outer_momentum=0.9)) == (0.7, 0.9)
    assert outer_settings(make_run(train, tokens_per_round=1000, outer_momentum=0.0)) == (1.0, 0.0)
    assert outer_settings(make_run(train, tokens_per_round=1000, outer_learning_rate=0.3)) == (0.3, 0.8)
    both = make_run(train, tokens_per_round=1000, outer_learning_rate=0.3, outer_momentum=0.45)
    assert outer_settings(both) == (0.3, 0.45)


@given(st.floats(0.01, 1e9))
def test_no_average_moves_the_weights_more_than_seven_times_as_far(rounds: float) -> None:
    momentum = momentum_of(rounds)
    assert 0 <= momentum <= 0.9 and 0.7 <= rate_of(momentum) <= 1
    assert rate_of(momentum) / (1 - momentum) <= 7.2
    assert momentum <= momentum_of(rounds * 2)


@pytest.mark.parametrize(("first", "ramp"), [(1000, 10_000), (250, 10_000), (250, 40_000), (500, 10**6), (999, 1)])
def test_rounds_that_grow_are_counted_as_they_are_opened(make_run: MakeRun, first: int, ramp: int) -> None:
    run = make_run(
        {"total_tokens": 40_000}, tokens_per_round=1000, first_round_tokens=first, ramp_tokens=ramp
    )
    tokens = rounds = 0
    while tokens < run.train.total_tokens:
        tokens += round_tokens(run.averaging, tokens)
        rounds += 1
    assert 0.75 * rounds <= expected_rounds(run) <= rounds + 1


def test_a_run_of_few_rounds_keeps_no_momentum_and_a_longer_one_that_of_the_rule(make_run: MakeRun) -> None:
    short = make_run({"total_tokens": 6_000}, tokens_per_round=1000)
    assert outer.num_buffers(short) == 0
    longer = make_run({"total_tokens": 35_000}, tokens_per_round=1000)
    said = make_run(
        {"total_tokens": 35_000}, tokens_per_round=1000, outer_learning_rate=1.0, outer_momentum=0.8
    )
    assert outer.num_buffers(longer) == 1
    weights, momentum, average = (torch.randn(40, generator=torch.Generator().manual_seed(n)) for n in range(3))
    results = []
    for run in (longer, said):
        step = OuterStep(run, 3, 2000, 3000)
        new, buffers = outer.apply(step, weights, [momentum], average, torch.ones(40))
        results.append((new, *buffers))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
