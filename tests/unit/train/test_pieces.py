"""Fragments of a peer, built apart or at once, and the stages made of them: the same bits, the same memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.model.build import build_model, resolve
from swarm.model.fragments import cut
from swarm.train import pieces
from swarm.train.run_source import hold
from swarm.train.settings import Settings

CPU = torch.device("cpu")
GPTJ: dict[str, Any] = {
    "model_type": "gptj", "n_layer": 4, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 64,
    "vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256,
}
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return resolve(RunConfig(
        name="test", model=ModelConfig(config=GPTJ), data=DataConfig(stdlib=True), fragments=4,
    ))


def test_pieces_built_one_by_one_make_the_stage_that_is_built_at_once(run: RunConfig) -> None:
    whole = build_model(run)
    built = [pieces.build(run, index, device=CPU, settings=Settings())[0] for index in range(4)]
    values: torch.Tensor = IDS
    for part in ((0, 1), (1, 3), (3, 4)):
        stage = pieces.stage_of(run, built[slice(*part)])
        values = stage.eval()(values).detach()
    with torch.no_grad():
        assert torch.equal(values, whole.eval()(input_ids=IDS).logits)


def test_what_was_built_at_once_comes_apart_and_stages_share_its_memory(run: RunConfig) -> None:
    held = hold(run, part=(1, 4))
    apart = pieces.split(held)
    assert [piece.spec.index for piece in apart] == [1, 2, 3]
    names = [name for piece in apart for name in piece.parameters]
    assert sorted(names) == sorted(name for name, _ in held.stage.held()), "each parameter in one piece"
    smaller = pieces.stage_of(run, apart[1:])
    for name, parameter in smaller.held():
        assert parameter is dict(held.stage.held())[name]
    assert {name for name, _ in smaller.held()} == {name for piece in apart[1:] for name in piece.parameters}


def test_a_piece_keeps_nothing_of_its_neighbours(run: RunConfig) -> None:
    """What is let go of leaves memory: no buffer of another block is held on to."""
    middle = pieces.split(hold(run, part=(0, 3)))[1]
    blocks = {int(name.split(".")[2]) for name in middle.tensors if name.startswith("transformer.h.")}
    assert blocks == set(range(*middle.spec.blocks))
    assert all(name.startswith("transformer.h.") for name in middle.parameters)


def test_a_start_is_known_for_what_it_is(run: RunConfig) -> None:
    _, start = pieces.build(run, 2, device=CPU, settings=Settings())
    spec = cut(build_model(run), 4)[2]
    assert start.is_named and {slot.name for slot in start.layout.slots} == {tensor.name for tensor in spec.tensors}
    assert start.state.version == 0 and start.state.fragment == 2
    other = RunConfig(**{**vars(run), "initial_digests": ["0" * 64] * 4})
    assert not pieces.build(other, 2, device=CPU, settings=Settings())[1].is_named
