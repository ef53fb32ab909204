"""Skeletons, and drawing by name: shapes without memory, and values that depend on the seed and the name alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from swarm.errors import ConfigError
from swarm.model.build import build_model
from swarm.model.draw import draw, module_seed
from swarm.model.fragments import cut
from swarm.model.skeleton import allocate, never_set, put, skeleton, skeleton_of, tensors
from tests.unit.model.parts_support import FAMILIES, family, run_with


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_skeleton_is_cut_like_the_real_model(name: str, tied: bool) -> None:
    run = run_with(family(name, tie_word_embeddings=tied))
    outline, whole = skeleton(run), build_model(run)
    for num_fragments in (1, 2, 3, 4):
        assert cut(outline, num_fragments) == cut(whole, num_fragments)
    assert [key for key, _ in outline.named_parameters()] == [key for key, _ in whole.named_parameters()]
    assert all(tensor.is_meta for _, tensor in tensors(outline))
    assert all(a.dtype == b.dtype for (_, a), (_, b) in zip(tensors(outline), tensors(whole), strict=True))
    assert outline.training and outline.config.use_cache is False and outline.config.tie_word_embeddings is False


def test_a_skeleton_of_any_size_takes_no_memory() -> None:
    config = family("llama", hidden_size=16384, intermediate_size=65536, num_hidden_layers=96, num_attention_heads=128)
    outline = skeleton(run_with(config))
    assert sum(p.numel() for p in outline.parameters()) > 300_000_000_000
    assert len(cut(outline, 96)) == 96


def test_it_says_which_weights_start_as_equals() -> None:
    def tied(name: str, tie: bool) -> tuple[str, str] | None:
        model = build_model(run_with(family(name, tie_word_embeddings=tie)))
        config = model.config
        config.tie_word_embeddings = tie
        return skeleton_of(config).tied

    assert tied("llama", True) == ("lm_head.weight", "model.embed_tokens.weight")
    assert tied("gpt2", True) == ("lm_head.weight", "transformer.wte.weight")
    assert tied("llama", False) is None and tied("gptj", False) is None


@pytest.mark.parametrize("config", [{"model_type": "no-such"}, {"model_type": "t5"}, family("gptj", n_embd=15)])
def test_what_cannot_be_is_refused_as_by_the_real_one(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        skeleton(run_with(config))
    with pytest.raises(ConfigError) as real:
        build_model(run_with(config))
    assert str(caught.value) == str(real.value)


class Shared(nn.Module):
    """Two names of one tensor, a frozen one, a buffer, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.two.bias.requires_grad_(False)
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.register_buffer("count", torch.ones(1, dtype=torch.long))


def shared() -> Shared:
    with torch.device("meta"):
        return Shared()


def test_what_gets_memory_cannot_pass_for_weights_until_it_is_set() -> None:
    model = shared()
    assert allocate(model, ["one.bias", "nothing"]) == ["one.bias"]
    assert model.one.weight.is_meta and torch.isnan(model.one.bias).all()
    names = allocate(model)
    assert sorted(names) == ["count", "one.weight", "table", "two.bias", "two.weight"]
    assert model.two.weight is model.one.weight, "one tensor stays one"
    assert not model.two.bias.requires_grad and model.one.weight.requires_grad
    assert model.count.dtype == torch.long and allocate(model) == []
    with torch.no_grad():
        model.one.weight.zero_()
        model.table[0] = 1.0  # only half of it
    assert never_set(model, names) == ["two.bias", "table"]
    assert never_set(model, ["one.bias"]) == ["one.bias"], "where somebody asks for it"


def test_values_are_put_where_they_belong_once_and_for_all_names() -> None:
    model = shared()
    put(model, {"one.weight": torch.eye(3), "table": torch.tensor([1.0, 2.0]), "two.bias": torch.ones(3)})
    assert model.two.weight is model.one.weight and torch.equal(model.two.weight, torch.eye(3))
    assert isinstance(model.one.weight, nn.Parameter) and model.one.weight.requires_grad
    assert not model.two.bias.requires_grad and model.table.tolist() == [1.0, 2.0]
    assert model.one.bias.is_meta
    with pytest.raises(KeyError):
        put(model, {"three.weight": torch.eye(3)})


# --- drawing


def drawn(name: str, seed: int) -> dict[str, torch.Tensor]:
    model = skeleton(run_with(family(name)))
    names = allocate(model)
    draw(model, seed)
    assert never_set(model, names) == []
    return dict(tensors(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_drawn_weights_are_distributed_as_the_librarys(name: str) -> None:
    """Each tensor has the mean and spread that transformers' own start has; constants and tables are the same."""
    values = drawn(name, 1)
    torch.manual_seed(0)
    theirs = build_model(run_with(family(name))).__class__(skeleton(run_with(family(name))).config)
    for key, tensor in tensors(theirs):
        ours, wanted = values[key].detach().double(), tensor.detach().double()
        if wanted.numel() == 1 or float(wanted.std()) == 0 or not tensor.is_floating_point() or "inv_freq" in key:
            assert torch.equal(ours, wanted), key
        elif isinstance(tensor, nn.Parameter):
            error = 6 / math.sqrt(wanted.numel())
            assert abs(float(ours.std() / wanted.std()) - 1) < error, key
            assert abs(float(ours.mean())) < error * float(wanted.std()), key


def test_every_module_and_every_seed_has_values_of_its_own() -> None:
    one, two = drawn("gptj", 1), drawn("gptj", 2)
    again = drawn("gptj", 1)
    matrices = [key for key, tensor in one.items() if tensor.ndim == 2 and ".h." in key and key.endswith("weight")]
    assert len(matrices) == 24
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not any(torch.equal(one[key], two[key]) for key in matrices)
    firsts = {float(one[key].detach().flatten()[0]) for key in matrices}
    assert len(firsts) == len(matrices), "no two modules start alike"


def test_what_was_put_is_not_drawn_over_and_what_has_no_memory_stays_so() -> None:
    model = skeleton(run_with(family("gpt2")))
    mine = torch.full((16, 48), 7.0)
    put(model, {"transformer.h.1.attn.c_attn.weight": mine})
    allocate(model, ["transformer.h.1.attn.c_attn.bias", "transformer.h.2.mlp.c_proj.weight"])
    draw(model, 1)
    values = dict(tensors(model))
    assert torch.equal(values["transformer.h.1.attn.c_attn.weight"], mine)
    assert not values["transformer.h.1.attn.c_attn.bias"].any()
    whole = drawn("gpt2", 1)["transformer.h.2.mlp.c_proj.weight"]
    assert torch.equal(values["transformer.h.2.mlp.c_proj.weight"], whole), "also what the block's own rule sets"
    assert sum(not tensor.is_meta for tensor in values.values()) == 3


def test_seeds_depend_on_run_and_name_and_never_change() -> None:
    """Peers of other versions must draw the same start."""
    assert module_seed(0, "") == 1151662994310453691
    assert module_seed(7, "transformer.h.1.mlp") == 1046287570372266393
    seeds = {module_seed(seed, name) for seed in (0, 1, 11) for name in ("", "1/a", "a", "h.1", "h.11")}
    assert len(seeds) == 15 and all(0 <= seed < 2**63 for seed in seeds)
