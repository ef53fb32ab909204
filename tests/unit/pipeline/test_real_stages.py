"""I6 with a real model: every cut of the demo's architecture into stages has the gradients of one process."""

from __future__ import annotations

import itertools

import pytest
import torch

from swarm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from swarm.pipeline import wire
from swarm.pipeline.compute import StageCompute
from swarm.train.run_source import Held, hold

NUM = 4
RUN = RunConfig(
    name="test", fragments=NUM, data=DataConfig(stdlib=True), train=TrainConfig(sequence_length=16),
    model=ModelConfig(config={
        "model_type": "gptj", "n_layer": 6, "n_embd": 32, "n_head": 2, "rotary_dim": 8, "n_positions": 32,
        "vocab_size": 257, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }),
)
TEXTS = [torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]
CUTS = [(0, *cuts, NUM) for count in range(NUM) for cuts in itertools.combinations(range(1, NUM), count)]
Way = list[tuple[tuple[int, int], tuple[int, int]]]
"""of each peer: the stage that it holds, the fragments of it that a microbatch uses"""
OVERLAPPING: list[Way] = [
    [((0, 3), (0, 1)), ((1, 4), (1, 4))], [((0, 3), (0, 3)), ((1, 4), (3, 4))],
    [((0, 2), (0, 1)), ((1, 3), (1, 2)), ((0, 4), (2, 3)), ((2, 4), (3, 4))],
]


def compute_of(held: Held) -> StageCompute:
    return StageCompute(held.stage, {f.index: f for f in held.fragments}, dict(held.stage.held()))


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, torch.Tensor], list[float]]:
    """(gradient times tokens, summed; losses), by plain torch and transformers."""
    model, losses = hold(RUN).model, []
    for tokens in TEXTS:
        loss = model(input_ids=tokens, labels=tokens).loss
        (loss * tokens.numel()).backward()
        losses.append(float(loss.detach()))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, losses


def down_and_back(way: Way, stages: list[StageCompute], key: int, tokens: torch.Tensor) -> float:
    """One microbatch, with fp32 on the wire."""
    values, shape = tokens, (*tokens.shape, 32)
    for stage, (_, (start, end)) in zip(stages[:-1], way, strict=False):
        left = stage.forward(key, values, start=start, end=end, tokens=tokens.numel())
        values = wire.decode_values(wire.encode_values(left, 32), shape, 32)
    loss, gradient = stages[-1].loss(key, values, tokens, start=way[-1][1][0], end=NUM)
    for stage in reversed(stages[:-1]):
        assert gradient is not None
        gradient = stage.backward(key, wire.decode_values(wire.encode_values(gradient, 32), shape, 32))
    return loss


@pytest.mark.parametrize("way", [
    *([(stage, stage) for stage in itertools.pairwise(cut)] for cut in CUTS), *OVERLAPPING,
])
def test_every_cut_has_the_gradients_of_one_process(
    way: Way, whole: tuple[dict[str, torch.Tensor], list[float]]
) -> None:
    stages = [compute_of(hold(RUN, part=stage)) for stage, _ in way]
    losses = [down_and_back(way, stages, key, tokens) for key, tokens in enumerate(TEXTS)]
    assert losses == pytest.approx(whole[1], abs=1e-6)
    found: dict[str, torch.Tensor] = {}
    for stage in stages:
        for key in range(len(TEXTS)):
            stage.commit(key)
        for fragment in stage.fragments:
            gradients, tokens = stage.take(fragment)
            for name, values in gradients.items():
                found[name] = found.get(name, torch.zeros_like(values)) + values * tokens
    assert found.keys() == whole[0].keys()
    for name, wanted in whole[0].items():
        assert float((found[name] - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-9, name
