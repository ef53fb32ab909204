"""Inner steps of a real model: pieces add up to the whole, clipping is by fragment, too little memory is survived."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from swarm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from swarm.data.batch import Batch
from swarm.model.build import build_model
from swarm.model.fragments import cut
from swarm.model.prefix import model_inputs
from swarm.train.adamw import RAMP_STEPS
from swarm.train.inner import InnerOptimizer

GPTJ: dict[str, Any] = {
    "model_type": "gptj", "n_layer": 2, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 64,
    "vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256,
}
TOKENS = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(0))
BATCH = Batch(TOKENS)


def run_with(**train: Any) -> RunConfig:
    return RunConfig(
        name="test", model=ModelConfig(config=GPTJ), data=DataConfig(stdlib=True), fragments=2,
        train=TrainConfig(**{"sequence_length": 12, "batch_sequences": 8, **train}),
    )


def inner_of(model: PreTrainedModel, run: RunConfig, **hooks: Any) -> InnerOptimizer:
    return InnerOptimizer(model, cut(model, run.fragments), run, **hooks)


@pytest.fixture(scope="module")
def original() -> PreTrainedModel:
    return build_model(run_with())


@pytest.fixture
def model(original: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(original)


def gradients_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def limit_memory(model: PreTrainedModel, sequences: int) -> list[int]:
    """Make the model run out of memory above so many sequences, in the forward. Returns the sizes that were tried."""
    tried: list[int] = []

    def check(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > sequences:
            raise torch.OutOfMemoryError("not enough memory")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return tried


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], atol=1e-7, rtol=1e-4) for n in one)


def test_the_whole_batch_is_what_transformers_says(model: PreTrainedModel) -> None:
    inner = inner_of(model, run_with())
    loss = inner.gradients(BATCH)
    ours = gradients_of(model)
    model.zero_grad()
    reference = model(input_ids=TOKENS, labels=TOKENS).loss
    reference.backward()
    assert loss == pytest.approx(float(reference.detach()), rel=1e-6)
    assert close(ours, gradients_of(model))


@pytest.mark.parametrize("microbatch", [1, 2, 3, 5])
def test_pieces_add_up_to_the_whole(model: PreTrainedModel, microbatch: int) -> None:
    """Also where they are of different size: 3 + 3 + 2 sequences."""
    inner = inner_of(model, run_with())
    whole_loss = inner.gradients(BATCH)
    whole = gradients_of(model)
    between: list[int] = []
    pieces = inner_of(model, run_with(batch_sequences=microbatch), between=lambda: between.append(1))
    assert pieces.gradients(BATCH) == pytest.approx(whole_loss, rel=1e-5)
    assert close(gradients_of(model), whole)
    assert len(between) == -(-8 // microbatch), "averaging gets its turn before each piece"


SEGMENTS = (
    ((0, 12),), ((11, 12),), ((5, 12),), ((0, 4), (2, 6), (2, 2)), ((12, 12),), ((0, 12),), ((3, 3), (0, 9)),
    ((10, 12),),
)


@pytest.mark.parametrize("microbatch", [8, 3, 1])
def test_the_gradient_is_of_the_mean_over_all_targets(
    model: PreTrainedModel, original: PreTrainedModel, microbatch: int
) -> None:
    """However they are spread over the pieces: rows have 11, 1, 7, 3 + 4, none, 11, 8 and 2 of them."""
    original.zero_grad()
    batch = Batch(TOKENS, SEGMENTS)
    assert [part.num_targets for part in batch.split(1)] == [11, 1, 7, 7, 0, 11, 8, 2]
    loss = inner_of(model, run_with(batch_sequences=microbatch)).gradients(batch)
    total = torch.zeros(())
    for ids, row in zip(TOKENS, SEGMENTS, strict=True):
        first = 0
        for prefix, length in row:
            part = ids[None, first : first + length]
            logits = original(input_ids=part, **model_inputs(original, (((prefix, length),),))).logits[0]
            given = max(1, prefix)
            if length > given:
                total = total + functional.cross_entropy(logits[given - 1 : -1], part[0, given:], reduction="sum")
            first += length
    (total / 47).backward()
    assert loss == pytest.approx(float(total.detach()) / 47, rel=1e-5)
    assert close(gradients_of(model), gradients_of(original))


def test_a_batch_without_targets_teaches_nothing(model: PreTrainedModel) -> None:
    inner = inner_of(model, run_with())
    assert inner.gradients(Batch(TOKENS, (((12, 12),),) * 8)) == 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inner.step(1e-2)
    assert all(torch.isfinite(p).all() and p.shape == before[name].shape for name, p in model.named_parameters())


@pytest.mark.parametrize(("room", "tried"), [(4, [8, 4, 4]), (3, [8, 4, 2, 2, 2, 2]), (1, [8, 4, 2] + [1] * 8)])
def test_out_of_memory_halves_the_pieces_and_keeps_the_gradient(
    model: PreTrainedModel, original: PreTrainedModel, room: int, tried: list[int]
) -> None:
    inner_of(original, run_with()).gradients(BATCH)
    warnings: list[str] = []
    sizes = limit_memory(model, room)
    inner = inner_of(model, run_with(), warn=warnings.append)
    inner.gradients(BATCH)
    assert close(gradients_of(model), gradients_of(original))
    assert sizes == tried and len(warnings) == len({size for size in tried}) - 1
    assert "out of memory" in warnings[0]
    sizes.clear()
    inner.gradients(BATCH)
    assert set(sizes) == {tried[-1]} and len(warnings) == len(set(tried)) - 1, "it is remembered"


def test_out_of_memory_in_the_middle_of_a_batch_counts_nothing_twice(
    model: PreTrainedModel, original: PreTrainedModel
) -> None:
    """The gradient of the pieces that were done is thrown away with the attempt."""
    inner_of(original, run_with()).gradients(BATCH)
    calls = [0]

    def fail_on_the_second(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("somebody else took the memory")

    model.register_forward_pre_hook(fail_on_the_second, with_kwargs=True)
    inner_of(model, run_with(batch_sequences=4)).gradients(BATCH)
    assert close(gradients_of(model), gradients_of(original)) and calls[0] == 2 + 4


def test_a_single_sequence_that_does_not_fit_is_an_error(model: PreTrainedModel) -> None:
    limit_memory(model, 0)
    with pytest.raises(torch.OutOfMemoryError):
        inner_of(model, run_with()).gradients(BATCH)


def norm_of(model: PreTrainedModel, names: list[str]) -> float:
    gradients = gradients_of(model)
    return float(torch.cat([gradients[name].reshape(-1) for name in names]).norm())


def test_the_gradient_is_clipped_by_fragment(model: PreTrainedModel) -> None:
    run = run_with(clip_norm=0.05)
    inner = inner_of(model, run)
    inner.gradients(BATCH)
    groups = [[tensor.name for tensor in fragment.tensors] for fragment in cut(model, 2)]
    assert all(norm_of(model, names) > 0.05 for names in groups)
    before = gradients_of(model)
    inner.clip()
    for names in groups:
        assert norm_of(model, names) == pytest.approx(0.05, rel=1e-3)
        factors = {round(float(gradients_of(model)[n].norm() / before[n].norm()), 5) for n in names}
        assert len(factors) == 1, "one factor for the whole fragment"


@pytest.mark.parametrize("clip_norm", [0.0, 1e6])
def test_what_is_short_enough_is_left_as_it_is(model: PreTrainedModel, clip_norm: float) -> None:
    inner = inner_of(model, run_with(clip_norm=clip_norm))
    inner.gradients(BATCH)
    before = gradients_of(model)
    inner.clip()
    assert all(torch.equal(before[name], values) for name, values in gradients_of(model).items())


def test_a_step_is_torch_adamw_with_a_ramp(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """Decay for matrices only, betas of the run; the first steps are shorter."""
    run = run_with(weight_decay=0.5, betas=(0.8, 0.9), clip_norm=0.0)
    inner = inner_of(model, run)
    reference = copy.deepcopy(original)
    adamw = torch.optim.AdamW(
        [{"params": [p for p in reference.parameters() if p.dim() >= 2], "weight_decay": 0.5},
         {"params": [p for p in reference.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        betas=(0.8, 0.9),
    )
    for step in range(1, RAMP_STEPS + 3):
        inner.gradients(BATCH)
        inner.step(1e-2)
        adamw.zero_grad()
        reference(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * min(1.0, step / RAMP_STEPS)
        adamw.step()
    theirs = dict(reference.named_parameters())
    assert all(torch.allclose(p, theirs[name], atol=2e-4) for name, p in model.named_parameters())
    assert inner.gradients(BATCH) < 3.5, "and it learns: this batch by heart, from 5.6"


def test_every_parameter_is_trained(model: PreTrainedModel) -> None:
    inner = inner_of(model, run_with())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inner.gradients(BATCH)
    inner.step(1e-2)
    changed: Callable[[str], bool] = lambda name: not torch.equal(before[name], inner.parameters[name])  # noqa: E731
    assert all(changed(name) for name in before) and inner.parameters.keys() == before.keys()


def test_a_fragment_may_come_and_go_between_two_steps(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """What stays is trained as if nothing had happened; what comes back has lost its moments and starts its ramp."""
    run = run_with(clip_norm=0.0)
    first, second = cut(model, 2)
    inner, reference = InnerOptimizer(model, [first], run), InnerOptimizer(original, cut(original, 2), run)
    assert inner.parameters.keys() == {tensor.name for tensor in first.tensors}
    for _ in range(3):
        gradients = {name: torch.ones_like(p) for name, p in inner.parameters.items()}
        assert inner.step_fragment(0, gradients, 1e-2) and reference.step_fragment(0, gradients, 1e-2)
        inner.add(second, dict(model.named_parameters()))
        later = {tensor.name: torch.ones_like(inner.parameters[tensor.name]) for tensor in second.tensors}
        before = inner.parameters[second.tensors[0].name].detach().clone()
        assert inner.step_fragment(1, later, 1e-2)
        moved = (inner.parameters[second.tensors[0].name] - before).abs().max()
        assert 0 < float(moved.detach()) < 1.1e-2 / RAMP_STEPS, "each time the first step of the ramp"
        inner.remove(second)
    ours, theirs = dict(model.named_parameters()), dict(original.named_parameters())
    assert all(torch.equal(ours[tensor.name], theirs[tensor.name]) for tensor in first.tensors)
    assert all(p.grad is None for p in model.parameters()), "gradients are no memory between two steps"
