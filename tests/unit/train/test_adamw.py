"""AdamW in 8 bits and on bfloat16 weights: as torch's own where nothing is rounded, and it trains as well."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from swarm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from swarm.data.batch import Batch
from swarm.model import working
from swarm.model.build import build_model
from swarm.model.fragments import cut
from swarm.train import moments
from swarm.train.adamw import FragmentAdamW, StridedAdamW, adamw
from swarm.train.inner import InnerOptimizer
from swarm.train.moments import BLOCK, MIN_VALUES, EightBit, Exact, eight_bit_problem, moments_of

TRAIN = TrainConfig(learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0)


def parameters_of(*shapes: tuple[int, ...], seed: int = 0, halved: bool = False) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]
    if halved:
        working.halve(made)
    return made


def gradients_of(parameters: list[torch.nn.Parameter], number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    return [torch.randn(p.shape, generator=generator) * 0.01 for p in parameters]


def values_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    return working.read(parameter, 0, parameter.numel())


# --- the moments


def test_eight_bits_work_on_this_machine() -> None:
    assert eight_bit_problem(torch.device("cpu")) == ""


def test_where_they_do_not_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("no bitsandbytes here\nand more")

    monkeypatch.setattr(moments, "_bitsandbytes", missing)
    moments._maps.cache_clear()
    problem = eight_bit_problem(torch.device("cpu"))
    assert "cpu" in problem and "no bitsandbytes here" in problem and "more" not in problem


def test_eight_bit_moments_begin_at_zero_and_are_near_what_was_written() -> None:
    parameter = torch.zeros(20, 1000)
    found = EightBit(parameter)
    assert not any(values.any() for values in found.read(0, 20_000))
    first = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 1e-4
    second = first.square() * 3
    found.write(0, first, second)
    for wanted, read in zip((first, second), found.read(0, 20_000), strict=True):
        largest = wanted.abs().view(-1)[:19_968].view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
        assert ((wanted - read).abs()[:19_968] <= 0.02 * largest).all()
    assert (found.read(0, 20_000)[1] >= 0).all()


def test_a_span_of_moments_is_written_alone_also_the_last_one() -> None:
    found = EightBit(torch.zeros(3 * BLOCK + 5))
    found.write(BLOCK, torch.ones(BLOCK), torch.ones(BLOCK))
    found.write(3 * BLOCK, torch.full((5,), -2.0), torch.full((5,), 4.0))
    first, second = found.read(0, 3 * BLOCK + 5)
    for found_values, last in ((first, -2.0), (second, 4.0)):
        wanted = torch.tensor([0.0] * BLOCK + [1.0] * BLOCK + [0.0] * BLOCK + [last] * 5)
        assert torch.allclose(found_values, wanted, rtol=0.01)


def test_small_parameters_keep_exact_moments_and_32_bits_are_exact() -> None:
    assert isinstance(moments_of(torch.zeros(MIN_VALUES), 8), EightBit)
    assert isinstance(moments_of(torch.zeros(MIN_VALUES - 1), 8), Exact)
    assert isinstance(moments_of(torch.zeros(MIN_VALUES), 32), Exact)


def test_eight_bit_moments_take_two_bytes_a_parameter_and_the_scales() -> None:
    found = EightBit(torch.zeros(100 * BLOCK))
    held = [found._codes, found._scales]
    assert sum(t.untyped_storage().nbytes() for t in held) == 2 * 100 * BLOCK + 2 * 100 * 4


# --- the step


def test_with_exact_weights_and_moments_the_strides_are_torchs_adamw() -> None:
    shapes = ((700, 900), (130,), (5, 5))  # the first one is longer than a stride
    ours, theirs = parameters_of(*shapes), parameters_of(*shapes)
    strided, reference = StridedAdamW(ours, TRAIN, bits=32), adamw(theirs, TRAIN)
    assert ours[0].numel() > 2 * working.STRIDE
    for number in range(5):
        for parameter, gradient in zip(theirs, gradients_of(theirs, number), strict=True):
            parameter.grad = gradient
        reference.step()
        strided.step(gradients_of(ours, number), TRAIN.learning_rate)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("bits", "halved", "limit"), [(8, False, 0.12), (32, True, 0.001), (8, True, 0.12)])
def test_rounded_steps_go_where_exact_ones_go(bits: int, halved: bool, limit: float) -> None:
    ours, theirs = parameters_of((100, 100), (64,), halved=halved), parameters_of((100, 100), (64,))
    began = [p.detach().clone().view(-1) for p in theirs]
    one, other = FragmentAdamW(ours, TRAIN, bits=bits), FragmentAdamW(theirs, TRAIN)
    for number in range(30):
        for optimizer, parameters in ((one, ours), (other, theirs)):
            optimizer.give(gradients_of(parameters, number))
            optimizer.clip()
            optimizer.step(0.01)
    for start, mine, exact in zip(began, ours, theirs, strict=True):
        moved = values_of(exact) - start
        assert (values_of(mine) - values_of(exact)).norm() < limit * moved.norm()


@pytest.mark.parametrize("halved", [False, True])
def test_a_gradient_is_clipped_by_the_norm_of_the_fragment(halved: bool) -> None:
    """8 bits clip with the step, torch before it; what comes out is the same."""
    ours, theirs = parameters_of((40, 40), (30,), halved=halved), parameters_of((40, 40), (30,))
    one, other = FragmentAdamW(ours, TRAIN, bits=8), FragmentAdamW(theirs, TRAIN)
    large = [g * 1000 for g in gradients_of(theirs, 0)]
    norms = []
    for optimizer in (one, other):
        optimizer.give([g.clone() for g in large])
        norms.append(optimizer.clip())
        optimizer.step(0.01)
        optimizer.give([torch.zeros_like(g) for g in large])
        optimizer.clip()
        optimizer.step(0.01)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 100
    for mine, exact in zip(ours, theirs, strict=True):
        assert torch.allclose(values_of(mine), values_of(exact), atol=2e-5)


def test_a_gradient_that_is_not_finite_shows() -> None:
    parameters = parameters_of((70, 70), halved=True)
    optimizer = FragmentAdamW(parameters, TRAIN, bits=8)
    optimizer.give([torch.full((70, 70), torch.nan)])
    assert optimizer.clip() != optimizer.clip()
    optimizer.give([torch.full((70, 70), torch.inf)])
    assert optimizer.clip() == torch.inf


def test_without_a_gradient_a_parameter_stays() -> None:
    parameters = parameters_of((70, 70), (70, 70), halved=True)
    before = [values_of(p) for p in parameters]
    optimizer = FragmentAdamW(parameters, TRAIN, bits=8)
    optimizer.give([None, torch.ones(70, 70)])
    optimizer.clip()
    optimizer.step(0.01)
    assert torch.equal(values_of(parameters[0]), before[0])
    assert not torch.equal(values_of(parameters[1]), before[1])


def test_vectors_do_not_decay() -> None:
    parameters = [torch.nn.Parameter(torch.ones(80, 80)), torch.nn.Parameter(torch.ones(6400))]
    optimizer = FragmentAdamW(parameters, TRAIN, bits=8)
    for _ in range(3):
        optimizer.give([torch.zeros(80, 80), torch.zeros(6400)])
        optimizer.step(0.1)
    assert parameters[0].max() < 1 and (parameters[1] == 1).all()


# --- a model


def run_with(steps: int) -> RunConfig:
    gptj = {
        "model_type": "gptj", "n_layer": 2, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_positions": 64,
        "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return RunConfig(
        name="test", model=ModelConfig(config=gptj), data=DataConfig(stdlib=True), tokenizer="other", fragments=2,
        train=TrainConfig(sequence_length=32, batch_sequences=8, learning_rate=3e-3, total_tokens=steps * 256),
    )


def text(number: int) -> torch.Tensor:
    """[8, 32]: sequences that count up in steps of one to four, with some noise: learnable, never quite."""
    generator = torch.Generator().manual_seed(number)
    start = torch.randint(0, 64, (8, 1), generator=generator)
    stride = torch.randint(1, 5, (8, 1), generator=generator)
    tokens = (start + stride * torch.arange(32)) % 64
    noise = torch.rand(tokens.shape, generator=generator) < 0.1
    return torch.where(noise, torch.randint(0, 64, tokens.shape, generator=generator), tokens)


STEPS = 150


@pytest.fixture(scope="module")
def train() -> Callable[..., list[float]]:
    run = run_with(STEPS)
    original = build_model(run)
    losses: dict[tuple[int, bool], list[float]] = {}

    def curve(*, bits: int, halved: bool) -> list[float]:
        if (bits, halved) not in losses:
            model: PreTrainedModel = copy.deepcopy(original)
            if halved:
                working.halve(model.parameters())
            inner = InnerOptimizer(model, cut(model, 2), run, optimizer_bits=bits)
            found = []
            for number in range(STEPS):
                found.append(inner.gradients(Batch(text(number))))
                assert inner.step(3e-3)
            losses[bits, halved] = found
        return losses[bits, halved]

    return curve


@pytest.mark.parametrize(("bits", "halved"), [(8, False), (32, True), (8, True)])
def test_a_model_learns_as_well_with_fewer_bits(
    train: Callable[..., list[float]], bits: int, halved: bool
) -> None:
    """Within 1 %, over the last fifth of the curve and over all of it."""
    exact, ours = train(bits=32, halved=False), train(bits=bits, halved=halved)
    assert exact[-1] < 0.6 * exact[0], "there is something to learn"
    for part in (slice(0, STEPS), slice(-STEPS // 5, STEPS)):
        assert sum(ours[part]) == pytest.approx(sum(exact[part]), rel=0.01)


def test_a_fragment_takes_its_step_from_fp32_sums(train: Callable[..., list[float]]) -> None:
    """A gradient that bfloat16 would round: the step is that of the sum itself."""
    run = run_with(1)
    model = build_model(run)
    halved = copy.deepcopy(model)
    working.halve(halved.parameters())
    sums = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * (1 + 2**-10) * 1e-3
        for name, p in model.named_parameters()
    }
    for one in (model, halved):
        inner = InnerOptimizer(one, cut(one, 2), run, optimizer_bits=32)
        for fragment in cut(one, 2):
            names = [tensor.name for tensor in fragment.tensors]
            assert inner.step_fragment(fragment.index, {name: sums[name].clone() for name in names}, 1e-3)
        assert all(parameter.grad is None for parameter in one.parameters())
    for parameter, other in zip(model.parameters(), halved.parameters(), strict=True):
        assert torch.allclose(parameter.view(-1), values_of(other), rtol=2**-14, atol=1e-7)


def test_a_sync_run_has_no_inner_optimizer_to_save_on() -> None:
    run = run_with(1)
    run = RunConfig(**{**vars(run), "averaging": type(run.averaging)(mode="sync", bits=32)})
    model = build_model(run)
    inner = InnerOptimizer(model, cut(model, 2), run, optimizer_bits=8)
    inner.gradients(Batch(text(0)))
    large = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert inner.clip() and all(optimizer._strided is None for optimizer in inner._optimizers.values())
    assert all(p.grad.norm() <= before for p, before in zip(model.parameters(), large, strict=True))
