"""Cutting: every parameter in exactly one fragment, in the same order everywhere, and parts as equal as can be."""

from __future__ import annotations

import random
import time
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.errors import ConfigError
from swarm.model.fragments import balance, cut, embedding_rows, find_blocks

SMALL = {"num_hidden_layers": 5, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 99}
FAMILIES: dict[str, dict[str, Any]] = {
    "gptj": {"n_layer": 5, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 32, "vocab_size": 99},
    "gpt_neox": {**SMALL, "intermediate_size": 32},
    "llama": {**SMALL, "intermediate_size": 32},
    "gpt2": {"n_layer": 5, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 99},
    "opt": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 8, "max_position_embeddings": 32},
    "bloom": {"n_layer": 5, "hidden_size": 16, "n_head": 2, "vocab_size": 99},
    "qwen3": {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8},
    "mixtral": {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 2},
    "phi": {**SMALL, "intermediate_size": 32},
    "gemma2": {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8},
}


def tiny(name: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(name, **{**FAMILIES[name], "tie_word_embeddings": False, **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("num_fragments", [1, 2, 3, 5])
def test_each_parameter_is_in_exactly_one_fragment(name: str, num_fragments: int) -> None:
    model = tiny(name)
    fragments = cut(model, num_fragments)
    names = [tensor.name for fragment in fragments for tensor in fragment.tensors]
    parameters = dict(model.named_parameters())
    assert sorted(names) == sorted(parameters)
    assert [fragment.index for fragment in fragments] == list(range(num_fragments))
    assert fragments[0].blocks[0] == 0 and fragments[-1].blocks[1] == 5
    assert all(a.blocks[1] == b.blocks[0] for a, b in pairwise(fragments))
    for fragment in fragments:
        assert list(fragment.tensors) == sorted(fragment.tensors, key=lambda tensor: tensor.name)
        assert all(tensor.shape == tuple(parameters[tensor.name].shape) for tensor in fragment.tensors)


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_hold_embedding_norm_and_head(name: str) -> None:
    model = tiny(name)
    prefix, count = find_blocks(model)
    assert count == 5
    fragments = cut(model, 5)
    for index, fragment in enumerate(fragments):
        others = [tensor.name for tensor in fragment.tensors if not tensor.name.startswith(f"{prefix}.{index}.")]
        if index == 0:
            assert others and all(
                "emb" in other or "wte" in other or "wpe" in other or "project_in" in other for other in others
            )
        elif index == 4:
            assert any(other == "lm_head.weight" for other in others)
            assert any("norm" in other or "ln_f" in other for other in others)
        else:
            assert not others


@pytest.mark.parametrize("name", FAMILIES)
def test_fine_tensors_are_norms_biases_and_embeddings(name: str) -> None:
    for fragment in cut(tiny(name), 3):
        for tensor in fragment.tensors:
            embedding = (
                "embed_" in tensor.name
                or "wte" in tensor.name
                or "wpe" in tensor.name
                or "word_embeddings." in tensor.name
            )
            assert tensor.fine is (len(tensor.shape) < 2 or embedding), tensor.name
            if tensor.name == "lm_head.weight":
                assert not tensor.fine


def test_cut_is_the_same_on_meta_and_on_the_cpu() -> None:
    config = AutoConfig.for_model("gptj", **FAMILIES["gptj"])
    assert cut(AutoModelForCausalLM.from_config(config), 3) == cut(tiny("gptj"), 3)


def test_frozen_parameters_are_left_out() -> None:
    model = tiny("llama")
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    names = {tensor.name for fragment in cut(model, 2) for tensor in fragment.tensors}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == len(dict(model.named_parameters())) - 1


def test_big_embedding_shrinks_its_fragments_blocks() -> None:
    """The embedding counts: the fragment that holds it gets fewer blocks."""
    fragments = cut(tiny("llama", num_hidden_layers=9, vocab_size=700), 3)
    blocks = [end - start for start, end in (fragment.blocks for fragment in fragments)]
    assert blocks[1] > blocks[0] and blocks[1] > blocks[2]


def test_more_fragments_than_blocks() -> None:
    with pytest.raises(ConfigError, match="6 fragments") as caught:
        cut(tiny("gptj"), 6)
    assert "5 blocks" in caught.value.why and "5 or fewer" in caught.value.do


def test_model_without_blocks() -> None:
    model = tiny("gptj")
    model.config.num_hidden_layers = 7
    with pytest.raises(ConfigError, match="cannot find the blocks"):
        cut(model, 2)


def test_embedding_rows() -> None:
    assert embedding_rows(tiny("opt")) == 99


def brute_force(sizes: list[int], num_parts: int) -> tuple[int, int]:
    """The smallest (largest part, sum of squares) there is."""
    results = []
    for cuts in combinations(range(1, len(sizes)), num_parts - 1):
        edges = [0, *cuts, len(sizes)]
        parts = [sum(sizes[a:b]) for a, b in pairwise(edges)]
        results.append((max(parts), sum(part**2 for part in parts)))
    return min(results)


def test_balance_against_every_possible_cut() -> None:
    draw = random.Random(0)
    for _ in range(400):
        count = draw.randint(1, 9)
        sizes = [draw.choice([0, 1, draw.randint(0, 30), draw.randint(0, 10**6)]) for _ in range(count)]
        num_parts = draw.randint(1, count)
        parts = balance(sizes, num_parts)
        assert len(parts) == num_parts
        assert parts[0][0] == 0 and parts[-1][1] == count
        assert all(start < end for start, end in parts)
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        sums = [sum(sizes[start:end]) for start, end in parts]
        assert (max(sums), sum(part**2 for part in sums)) == brute_force(sizes, num_parts), (sizes, num_parts)


def test_balance_of_equal_blocks_is_even() -> None:
    lengths = sorted(end - start for start, end in balance([7] * 10, 4))
    assert lengths == [2, 2, 3, 3]
    assert balance([5], 1) == [(0, 1)]


def test_balance_of_a_large_model_is_quick() -> None:
    draw = random.Random(1)
    sizes = [draw.randint(10**8, 10**9) for _ in range(256)]
    start = time.process_time()
    for num_parts in (1, 2, 16, 100, 256):
        balance(sizes, num_parts)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("sizes", "num_parts"), [([1, 2], 3), ([1, 2], 0), ([], 1), ([1, -1], 1)])
def test_balance_refuses_nonsense(sizes: list[int], num_parts: int) -> None:
    with pytest.raises(ValueError):
        balance(sizes, num_parts)
