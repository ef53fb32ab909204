"""Chained stages against the whole model: equal to the last bit, logits and gradients, however it is cut."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

from swarm.errors import ConfigError
from swarm.model.skeleton import untie
from swarm.model.fragments import cut, find_blocks
from swarm.model.stage import Stage

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
import families

DOCUMENT = families.DOCUMENT.read_text(encoding="utf-8")


def listed(title: str) -> list[str]:
    """Families in a paragraph of the document, as far as the installed transformers has them."""
    found = re.search(rf"\*\*{title} \((\d+)\):\*\* (.*)", DOCUMENT)
    assert found is not None
    names = found[2].split(", ")
    assert len(names) == int(found[1])
    return [name for name in names if name in families.names()]


FULL, CAUSAL = listed("Causal and with a bidirectional prefix"), listed("Causal only")


@pytest.mark.parametrize("name", FULL + CAUSAL)
def test_a_chain_of_stages_is_the_whole_model(name: str) -> None:
    families.compare(name, families.EDGES)


@pytest.mark.parametrize("name", FULL)
def test_a_chain_is_the_whole_model_with_a_bidirectional_prefix(name: str) -> None:
    families.compare(name, families.EDGES, prefix=families.PREFIX)


CUTS = [(0, *inner, 4) for count in range(4) for inner in itertools.combinations((1, 2, 3), count)]


@pytest.mark.parametrize("edges", CUTS)
@pytest.mark.parametrize("name", ["gptj", "llama", "gpt_neox"])
def test_any_cut_will_do(name: str, edges: tuple[int, ...]) -> None:
    families.compare(name, edges)


@pytest.mark.parametrize("name", ["gptj", "llama", "gpt2", "opt", "qwen3"])
def test_stages_hold_the_parameters_of_their_fragments(name: str) -> None:
    whole = families.make(name)
    untie(whole)
    for fragment in cut(whole, 3):
        model = families.make(name)
        untie(model)
        stage = Stage(model, *fragment.blocks)
        assert sorted(key for key, _ in stage.held()) == [tensor.name for tensor in fragment.tensors]


@pytest.mark.parametrize("span", [(0, 0), (2, 1), (-1, 2), (3, 5)])
def test_there_must_be_such_blocks(span: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="no blocks"):
        Stage(families.make("llama"), *span)


def test_a_stage_can_be_cut_before_there_are_any_weights() -> None:
    """A stage of a model that fits nowhere is built where there is room for the stage."""
    whole = sum(parameter.numel() for parameter in families.make("gptj").parameters())
    stage = Stage(families.make("gptj", device="meta"), 1, 3)
    held = dict(stage.held())
    assert held and all(parameter.is_meta for parameter in held.values())
    assert sum(parameter.numel() for parameter in held.values()) < whole / 2
    assert find_blocks(stage.model)[1] == 4 and all(".1." in key or ".2." in key for key in held), "their own numbers"


def test_the_families_that_the_project_is_for_are_among_them() -> None:
    assert {"gptj", "llama", "gpt_neox", "qwen3", "mistral", "gemma2"} <= set(FULL)


def test_dropout_around_the_blocks_happens_once() -> None:
    """In training: that of the embedding in the first stage only."""
    torch.manual_seed(0)
    stages = [Stage(families.make("gptj", embd_pdrop=0.9), start, end) for start, end in ((0, 1), (1, 3), (3, 4))]
    values = torch.randn(1, 5, 32)
    for stage in stages[1:]:
        stage.train()
        assert torch.equal(stage(values), stage(values)), "nothing is dropped in a stage that is not the first"
    stages[0].train()
    ids = torch.tensor([[3, 4, 5, 6]])
    assert not torch.equal(stages[0](ids), stages[0](ids))
