"""The outer step against independent references, and the same bits whoever computes it (I1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging import outer
from swarm.averaging.global_state import GlobalState, initial_state
from swarm.averaging.outer import OuterStep, learning_rate
from swarm.averaging.roll import Entry
from swarm.config import RunConfig

MakeRun = Callable[..., RunConfig]
N = 600


def vector(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale


def step_of(run: RunConfig, version: int, before: int, after: int) -> OuterStep:
    return OuterStep(run, version, before, after)


@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.3, 0.5)])
def test_nesterov_against_float64(make_run: MakeRun, rate: float, momentum: float) -> None:
    run = make_run({"total_tokens": 10**9}, outer_learning_rate=rate, outer_momentum=momentum)
    weights, buffers = vector(0), [torch.zeros(N)] * outer.num_buffers(run)
    exact_weights, exact_momentum = weights.double().numpy().copy(), np.zeros(N)
    for version in range(1, 31):
        average = vector(version, 0.01)
        weights, buffers = outer.apply(
            step_of(run, version, version * 10, version * 10 + 10), weights, buffers, average, torch.ones(N)
        )
        gradient = average.double().numpy()
        exact_momentum = momentum * exact_momentum + gradient
        exact_weights = exact_weights - rate * (gradient + momentum * exact_momentum)
        assert np.abs(weights.numpy() - exact_weights).max() < 2e-7 * version * 4
        assert all(np.abs(buffer.numpy() - exact_momentum).max() < 1e-7 * version for buffer in buffers)
    assert len(buffers) == outer.num_buffers(run) == (1 if momentum else 0), "no momentum, no memory for it"


def test_nesterov_equals_torch_sgd(make_run: MakeRun) -> None:
    run = make_run({"total_tokens": 10**9}, outer_learning_rate=0.7, outer_momentum=0.9)
    parameter = torch.nn.Parameter(vector(0))
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    weights, buffers = vector(0), [torch.zeros(N)]
    for version in range(1, 21):
        parameter.grad = vector(version, 0.01)
        sgd.step()
        weights, buffers = outer.apply(
            step_of(run, version, version, version + 1), weights, buffers, vector(version, 0.01), torch.ones(N)
        )
    assert torch.allclose(weights, parameter.detach(), atol=2e-6, rtol=0)


def test_every_operation_is_rounded_on_its_own(make_run: MakeRun) -> None:
    """The same bits as numpy's fp32, one operation after the other: no kernel has fused a multiply and an add."""
    run = make_run({"total_tokens": 10**9}, outer_learning_rate=0.7, outer_momentum=0.9)
    weights, momentum, average = vector(1), vector(2), vector(3)
    new, buffers = outer.apply(step_of(run, 3, 5, 6), weights, [momentum], average, torch.ones(N))
    nine, seven = np.float32(0.9), np.float32(0.7)
    expected = momentum.numpy() * nine + average.numpy()
    assert np.array_equal(buffers[0].numpy(), expected)
    assert np.array_equal(new.numpy(), weights.numpy() - (expected * nine + average.numpy()) * seven)


def test_adamw_is_rounded_operation_by_operation(make_run: MakeRun) -> None:
    run = make_run({"learning_rate": 3e-3, "total_tokens": 10**9, "weight_decay": 0.1}, mode="sync", bits=32)
    weights, first, second, gradient = vector(1), vector(2, 0.1), vector(3, 0.1).abs(), vector(4, 0.1)
    decay = (torch.arange(N) % 2).float()
    step = step_of(run, 7, 0, 6)
    new, buffers = outer.apply(step, weights, [first, second], gradient, decay)
    beta1, beta2 = run.train.betas
    rate, f = learning_rate(run, 0), np.float32
    m = first.numpy() * f(beta1) + gradient.numpy() * f(1 - beta1)
    v = second.numpy() * f(beta2) + (gradient.numpy() * gradient.numpy()) * f(1 - beta2)
    denominator = np.sqrt(v) / f((1 - beta2**7) ** 0.5) + f(1e-8)
    change = m * f(rate / (1 - beta1**7)) / denominator
    expected = weights.numpy() * (f(1) - decay.numpy() * f(rate * 0.1)) - change
    assert np.array_equal(buffers[0].numpy(), m) and np.array_equal(buffers[1].numpy(), v)
    assert np.array_equal(new.numpy(), expected)


def test_inputs_are_left_alone(make_run: MakeRun) -> None:
    """A state is immutable: somebody may be downloading it."""
    for run in (make_run(), make_run(mode="sync", bits=32), make_run({"total_tokens": 2})):
        count = outer.num_buffers(run)
        inputs = [vector(0), *(vector(i + 1).abs() for i in range(count)), vector(8), torch.ones(N)]
        before = [values.clone() for values in inputs]
        new, buffers = outer.apply(step_of(run, 1, 1, 2), inputs[0], inputs[1:-2], inputs[-2], inputs[-1])
        assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))
        pointers = {values.data_ptr() for values in inputs}
        assert not pointers & {new.data_ptr(), *(buffer.data_ptr() for buffer in buffers)}


def test_the_last_round_is_a_plain_average(make_run: MakeRun) -> None:
    run = make_run({"total_tokens": 1000}, outer_learning_rate=0.7, outer_momentum=0.9, tokens_per_round=80)
    weights, momentum, average = vector(0), vector(1), vector(2, 0.01)
    cases = [(0, 989, False), (989, 1000, True), (400, 5000, True), (1000, 1001, False)]
    for before, after, last in [*cases, (900, 990, True), (990, 995, True)]:  # what is on its way is an estimate
        step = step_of(run, 9, before, after)
        new, buffers = outer.apply(step, weights, [momentum], average, torch.ones(N))
        assert step.last is last
        assert torch.equal(new, weights - average) is last
        assert torch.equal(buffers[0], torch.zeros(N)) is last


def test_the_last_round_of_a_sync_run_is_like_any_other(make_run: MakeRun) -> None:
    run = make_run({"total_tokens": 1000}, mode="sync", bits=32, tokens_per_round=80)
    assert [step_of(run, 9, before, after).last for before, after in ((900, 999), (999, 1000))] == [False, True]
    inputs = [vector(0), [vector(1, 0.1), vector(2, 0.1).abs()], vector(3), torch.ones(N)]
    one = outer.apply(step_of(run, 9, 920, 1000), *inputs)
    other = outer.apply(step_of(make_run({"total_tokens": 10**6}, mode="sync", bits=32), 9, 920, 1000), *inputs)
    assert torch.count_nonzero(one[1][0]) and not torch.equal(one[0], inputs[0] - inputs[2])
    assert torch.equal(one[1][0], other[1][0]), "its moments are kept"


def test_momentum_that_starts_again_is_that_of_a_first_round(make_run: MakeRun) -> None:
    run = make_run({"total_tokens": 10**9}, outer_learning_rate=0.7, outer_momentum=0.9)
    weights, momentum, average = vector(0), vector(1), vector(2, 0.01)
    restarted = outer.apply(OuterStep(run, 9, 5, 6, restart=True), weights, [momentum], average, torch.ones(N))
    fresh = outer.apply(step_of(run, 9, 5, 6), weights, [torch.zeros(N)], average, torch.ones(N))
    assert torch.equal(restarted[0], fresh[0]) and torch.equal(restarted[1][0], fresh[1][0])
    assert torch.equal(restarted[1][0], average)
    without = make_run({"total_tokens": 10**9}, outer_learning_rate=0.7, outer_momentum=0.0)
    new, buffers = outer.apply(OuterStep(without, 9, 5, 6, restart=True), weights, [], average, torch.ones(N))
    assert torch.equal(new, weights - average * 0.7) and buffers == []


def advanced(run: RunConfig, *rounds: dict[str, int]) -> list[GlobalState]:
    states = [initial_state(2, vector(0), outer.num_buffers(run))]
    for number, contributions in enumerate(rounds, start=1):
        states.append(outer.advance(run, states[-1], contributions, vector(number, 0.01), torch.zeros(N)))
    return states


def test_a_commit_makes_the_next_version_and_its_roll(make_run: MakeRun) -> None:
    run = make_run({"total_tokens": 10**9}, outer_learning_rate=0.7, outer_momentum=0.5)
    first, second, third = advanced(run, {"a": 30}, {"a": 10, "b": 10})
    assert (first.version, second.version, third.version) == (0, 1, 2)
    assert (third.fragment, third.tokens, first.roll) == (2, 50, ())
    assert third.roll == (Entry("a", 2, 10, 40), Entry("b", 2, 10, 10))
    exact = outer.apply(step_of(run, 2, 30, 50), second.weights, list(second.buffers), vector(2, 0.01), torch.zeros(N))
    assert torch.equal(third.weights, exact[0]) and torch.equal(third.buffers[0], exact[1][0])


def test_who_sees_only_the_newest_version_takes_the_same_step(make_run: MakeRun) -> None:
    """One downloads what others have computed: that state alone says whether the momentum starts again (I1)."""
    run = make_run({"total_tokens": 10**9}, outer_momentum=0.9)
    few, many = {"a": 100}, dict.fromkeys("abcd", 100)
    states = advanced(run, few, few, many, many)
    for before, after, contributions, number in zip(states, states[1:], [few, few, many, many], range(1, 5),
                                                    strict=False):
        copy = GlobalState(2, before.version, before.tokens, before.weights.clone(),
                           tuple(buffer.clone() for buffer in before.buffers), tuple(before.roll))
        again = outer.advance(run, copy, dict(reversed(contributions.items())), vector(number, 0.01), torch.zeros(N))
        assert again.digest == after.digest
    assert torch.equal(states[3].buffers[0], vector(3, 0.01)), "three of four were new"
    assert not torch.equal(states[4].buffers[0], vector(4, 0.01)), "and then they were not"
    never = advanced(dataclasses.replace(run, averaging=dataclasses.replace(run.averaging, momentum_restart=1.0)),
                     few, few, many)
    assert not torch.equal(never[3].buffers[0], vector(3, 0.01))


def test_a_sync_run_keeps_no_roll(make_run: MakeRun) -> None:
    run = make_run(mode="sync", bits=32)
    assert [state.roll for state in advanced(run, {"a": 1}, {"b": 1, "c": 5})] == [(), (), ()]


@pytest.mark.parametrize("warmup", [0, 200])
def test_sync_equals_torch_adamw(make_run: MakeRun, warmup: int) -> None:
    """60 steps with warm-up, cosine and decay of matrices only, as one process with torch.optim.AdamW would do."""
    tokens = 10
    run = make_run(
        {"learning_rate": 1e-2, "warmup_tokens": warmup, "total_tokens": 500, "weight_decay": 0.3,
         "betas": (0.9, 0.95)}, mode="sync", bits=32,
    )
    decay = torch.zeros(N)
    decay[:400] = 1
    weights, buffers = vector(0), [torch.zeros(N), torch.zeros(N)]
    matrix, bias = torch.nn.Parameter(weights[:400].clone()), torch.nn.Parameter(weights[400:].clone())
    adamw = torch.optim.AdamW(
        [{"params": [matrix], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for version in range(1, 61):
        gradient = vector(version, 0.05)
        before = (version - 1) * tokens
        for group in adamw.param_groups:
            group["lr"] = learning_rate(run, before)
        matrix.grad, bias.grad = gradient[:400].clone(), gradient[400:].clone()
        adamw.step()
        step = step_of(run, version, before, before + tokens)
        weights, buffers = outer.apply(step, weights, buffers, gradient, decay)
        reference = torch.cat([matrix.detach(), bias.detach()])
        assert torch.allclose(weights, reference, atol=1e-6, rtol=1e-6), f"step {version}"
    assert len(buffers) == outer.num_buffers(run) == 2


@pytest.mark.parametrize("sync", [False, True])
def test_the_same_bits_with_any_number_of_threads(make_run: MakeRun, sync: bool) -> None:
    run = make_run(mode="sync", bits=32) if sync else make_run()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(200_000, generator=generator) for _ in range(4)]
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            new, buffers = outer.apply(
                step_of(run, 5, 50, 60), inputs[0], [i.abs() for i in inputs[1:3 if sync else 2]], inputs[3],
                torch.ones(200_000),
            )
            results.append([new, *buffers])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    warmup=st.integers(0, 10_000), total=st.integers(1, 100_000), floor=st.floats(0, 1),
    tokens=st.lists(st.integers(0, 200_000), min_size=2, max_size=8),
)
def test_the_schedule_rises_then_falls(warmup: int, total: int, floor: float, tokens: list[int]) -> None:
    from swarm.config import DataConfig, ModelConfig, TrainConfig

    run = RunConfig(
        name="test", model=ModelConfig(config={"model_type": "gptj"}), data=DataConfig(stdlib=True),
        train=TrainConfig(learning_rate=0.01, warmup_tokens=warmup, total_tokens=total, final_learning_rate=floor),
    )
    rates = [(t, learning_rate(run, t)) for t in sorted(tokens)]
    assert all(0 <= rate <= 0.01 * (1 + 1e-12) for _, rate in rates)
    rising = [rate for t, rate in rates if t < warmup]
    falling = [rate for t, rate in rates if t >= warmup]
    assert rising == sorted(rising)
    assert all(later <= earlier + 1e-15 for earlier, later in zip(falling, falling[1:], strict=False))
    assert all(rate >= 0.01 * floor * (1 - 1e-12) for rate in falling)


def test_the_schedule_at_its_corners(make_run: MakeRun) -> None:
    train = {"learning_rate": 2e-3, "warmup_tokens": 99, "total_tokens": 1099, "final_learning_rate": 0.1}
    run = make_run(train)
    assert learning_rate(run, 0) == pytest.approx(2e-5)
    assert learning_rate(run, 98) == pytest.approx(2e-3 * 0.99)
    assert learning_rate(run, 99) == pytest.approx(2e-3)
    assert learning_rate(run, 599) == pytest.approx(2e-3 * 0.55)
    assert learning_rate(run, 1099) == learning_rate(run, 10**15) == pytest.approx(2e-4)
    assert learning_rate(make_run({**train, "warmup_tokens": 0}), 0) == pytest.approx(2e-3)
    odd = make_run({**train, "warmup_tokens": 5000})  # the warm-up is longer than the run
    assert 0 < learning_rate(odd, 1099) < learning_rate(odd, 4999) < 2e-3
