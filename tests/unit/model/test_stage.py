"""Chained stages against the whole model: equal to the last bit, logits and gradients, however it is cut."""

from __future__ import annotations

import copy
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

from swarm.errors import ConfigError
from swarm.model.fragments import cut, find_blocks
from swarm.model.prefix import attention, model_inputs
from swarm.model.skeleton import untie
from swarm.model.stage import Stage

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
import families

Span = tuple[int, int]
IDS = torch.arange(3, 21).reshape(2, 9)
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


@pytest.mark.parametrize("name", ["gptj", "llama", "gpt2", "gpt_neox", "mpt", "gemma2"])
def test_a_chain_is_the_whole_model_with_packed_rows(name: str) -> None:
    """Masks and positions of segments, where positions are learnt, turned, or only distances (and then not told)."""
    whole = families.make(name)
    ids = torch.randint(3, 64, (2, families.LENGTH), generator=torch.Generator().manual_seed(1))
    how = attention(families.PACKED, dtype=torch.float32)
    stages = [Stage(copy.deepcopy(whole), start, end) for start, end in itertools.pairwise(families.EDGES)]
    with torch.no_grad():
        values = ids
        for stage in stages:
            values = stage(values, **how)
        wanted = whole(input_ids=ids, **model_inputs(whole, families.PACKED), use_cache=False).logits
        assert torch.equal(values, wanted) and not torch.equal(values, whole(input_ids=ids, use_cache=False).logits)


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


OVERLAPS = [
    [((0, 3), (0, 2)), ((1, 4), (2, 4))],
    [((0, 4), (0, 1)), ((0, 2), (1, 2)), ((1, 4), (2, 3)), ((3, 4), (3, 4))],
    [((0, 2), (0, 2)), ((1, 3), (2, 3)), ((0, 4), (3, 4))],
]
"""(blocks held, blocks done) one after the other: peers hold what they have room for, and microbatches change over
wherever it is quickest"""


@pytest.mark.parametrize("steps", OVERLAPS)
@pytest.mark.parametrize("name", ["gptj", "gpt2", "opt", "bert", "qwen3_moe", "gemma2"])
def test_overlapping_stages_are_entered_and_left_anywhere(name: str, steps: list[tuple[Span, Span]]) -> None:
    whole = families.make(name)
    untie(whole)
    stages = [Stage(copy.deepcopy(whole), *held) for held, _ in steps]
    logits = whole(input_ids=IDS, use_cache=False).logits
    families.loss_of(logits, IDS).backward()
    found = families.chain([(stage, span) for stage, (_, span) in zip(stages, steps, strict=True)], IDS)
    assert torch.equal(found, logits)
    for key, parameter in whole.named_parameters():
        there = [dict(stage.held())[key].grad for stage in stages if key in dict(stage.held())]
        once = [gradient for gradient in there if gradient is not None and gradient.any()]
        if parameter.grad is None or not parameter.grad.any():
            assert not once, key
        else:
            assert len(once) == 1 and torch.equal(once[0], parameter.grad), key


def test_a_call_leaves_the_stage_as_it_was() -> None:
    stage = Stage(families.make("gpt2"), 0, 4)
    before = [(name, id(module)) for name, module in stage.named_modules()]
    names = [name for name, _ in stage.held()]
    whole = stage(IDS)
    hidden = stage(IDS, end=2)
    assert hidden.shape == (2, 9, 32)
    assert torch.equal(stage(hidden, start=2), whole) and torch.equal(stage(IDS), whole)
    with pytest.raises(RuntimeError):
        stage(torch.zeros(2, 9, 31), start=1, end=3)  # another width: fails somewhere inside
    assert [(name, id(module)) for name, module in stage.named_modules()] == before
    assert [name for name, _ in stage.held()] == names


@pytest.mark.parametrize("span", [(0, 2), (1, 4), (2, 2), (3, 2)])
def test_only_blocks_that_are_held_can_be_asked_for(span: Span) -> None:
    stage = Stage(families.make("llama"), 1, 3)
    with pytest.raises(ValueError, match="not all held"):
        stage(torch.zeros(1, 3, 32), start=span[0], end=span[1])


@pytest.mark.parametrize("name", ["gptj", "gpt2", "opt", "bert"])
def test_other_weights_can_be_put_in_for_a_call(name: str) -> None:
    """The backward of a microbatch uses the weights of its forward: they are given to the call, not written over."""
    held, other = families.make(name), families.make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel(), dtype=torch.float32)).view_as(parameter))
    for model in (held, other):
        untie(model)
    for span in ((0, 4), (0, 2), (1, 3), (2, 4)):
        stage, wanted = Stage(copy.deepcopy(held), 0, 4), Stage(copy.deepcopy(other), *span)
        weights = {f"model.{key}": p.detach().clone().requires_grad_() for key, p in other.named_parameters()}
        values = IDS if span[0] == 0 else torch.sin(torch.arange(2 * 9 * 32, dtype=torch.float32)).view(2, 9, 32)
        mine = {key: p.detach().clone() for key, p in stage.held()}
        found = torch.func.functional_call(stage, weights, (values,), {"start": span[0], "end": span[1]})
        expected = wanted(values)
        assert torch.equal(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        for key, parameter in wanted.held():
            gradient = weights[f"model.{key}"].grad
            assert gradient is None if parameter.grad is None else torch.equal(gradient, parameter.grad), key
        assert all(torch.equal(p, mine[key]) and p.grad is None for key, p in stage.held()), "the stage's own"
