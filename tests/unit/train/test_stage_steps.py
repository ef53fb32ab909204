"""What a stage's fragment steps with: the mean over all targets; and in `sync` runs sums that add up over peers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from swarm.config import AveragingConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from swarm.data.batch import Batch
from swarm.pipeline.compute import StageCompute
from swarm.train.run_source import hold
from swarm.train.stage_steps import StageSteps, density, weigh

RUN = RunConfig(
    name="test", fragments=2, data=DataConfig(stdlib=True), train=TrainConfig(sequence_length=12, batch_sequences=2),
    averaging=AveragingConfig(mode="sync", bits=32),
    model=ModelConfig(config={
        "model_type": "gptj", "n_layer": 2, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 32,
        "vocab_size": 257, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }),
)
TOKENS = torch.randint(0, 257, (4, 12), generator=torch.Generator().manual_seed(2))
BATCH = Batch(TOKENS, (((0, 12),), ((9, 12),), ((0, 5), (7, 7)), ((11, 12),)))
"""11, 3, 4 and 1 targets"""


def test_plain_rows_are_as_dense_as_can_be() -> None:
    assert density(Batch(TOKENS).num_targets, tokens=TOKENS.numel(), length=12) == 1
    assert density(BATCH.num_targets, tokens=48, length=12) == pytest.approx(19 / 44)
    gradients = {"a": torch.ones(2)}
    weigh(gradients, 1.0)
    assert gradients["a"].tolist() == [1, 1]
    weigh(gradients, 0.5)
    assert gradients["a"].tolist() == [0.5, 0.5]


class Books:
    """An averager, as far as steps need it: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, dict[str, torch.Tensor]]] = []

    def trained_fragment(self, fragment: int, tokens: int, gradients: dict[str, torch.Tensor] | None = None) -> None:
        self.told.append((fragment, tokens, gradients or {}))

    def estimated_tokens(self) -> int:
        return 0


class Inner:
    """Optimizers, as far as steps need them."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, torch.Tensor]]] = []

    def step_fragment(self, fragment: int, gradients: dict[str, torch.Tensor], rate: float) -> bool:
        self.steps.append((fragment, gradients))
        return True


def stage(run: RunConfig) -> tuple[StageCompute, StageSteps, Books, Inner]:
    held = hold(run)
    compute = StageCompute(held.stage, {f.index: f for f in held.fragments}, dict(held.stage.held()))
    books, inner = Books(), Inner()
    own: Any = (run, inner, compute, books)
    return compute, StageSteps(*own), books, inner


def learn(compute: StageCompute, key: int, batch: Batch) -> None:
    compute.loss(key, batch.tokens, batch.tokens, start=0, end=2, segments=batch.segments)
    compute.commit(key)


def whole_gradient() -> dict[str, torch.Tensor]:
    compute, _, _, _ = stage(RUN)
    learn(compute, 0, BATCH)
    return {name: values for fragment in (0, 1) for name, values in compute.take(fragment)[0].items()}


def test_a_step_has_the_gradient_of_all_its_targets() -> None:
    """Two microbatches of 14 and 5 targets, and the quota counts tokens: one step, of the mean over 19."""
    train = TrainConfig(sequence_length=12, batch_sequences=4)
    compute, steps, books, inner = stage(dataclasses.replace(RUN, averaging=AveragingConfig(), train=train))
    wanted = whole_gradient()
    for key, part in enumerate(BATCH.split(2)):
        assert not inner.steps, "half of the quota"
        learn(compute, key, part)
        steps.take_due()
    assert [(fragment, tokens) for fragment, tokens, _ in books.told] == [(0, 48), (1, 48)]
    found = {name: values for _, gradients in inner.steps for name, values in gradients.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-7) for name in wanted)


def test_what_sync_peers_give_adds_up_to_all_their_targets() -> None:
    """Each has done two of four rows; averaging weighs by tokens, as its books count."""
    wanted, share = whole_gradient(), 19 / 44
    sums: dict[str, torch.Tensor] = {}
    for part in BATCH.split(2):
        compute, steps, books, _ = stage(RUN)
        learn(compute, 0, part)
        steps.take_due()
        for _, tokens, gradients in books.told:
            assert tokens == 24
            for name, values in gradients.items():
                sums[name] = sums.get(name, torch.zeros_like(values)) + values * tokens / 48
    assert all(torch.allclose(sums[name], wanted[name] * share, rtol=1e-4, atol=1e-7) for name in wanted)
