"""Adapters on a frozen base: the base's own values at the start, nothing else trained, and plain weights at the end."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.config import LoraConfig, ModelConfig, RunConfig
from swarm.errors import ConfigError
from swarm.model.build import build_model
from swarm.model.export import export
from swarm.model.fragments import cut, frozen_counts
from swarm.model.frozen import values_of
from swarm.model.lora import (
    Adapted,
    adapt,
    base_digest,
    compute_in,
    frozen_tensors,
    is_adapted,
    largest_matrix,
    merged,
)
from swarm.model.partial import build_stage
from swarm.model.skeleton import skeleton, tensors
from tests.unit.model.parts_support import BLOCKS, family, run_with, trained

IDS = torch.arange(24).reshape(2, 12)


def lora_run(name: str = "gptj", **lora: Any) -> RunConfig:
    run = run_with(family(name))
    return dataclasses.replace(run, model=ModelConfig(config=family(name), lora=LoraConfig(**{"rank": 4, **lora})))


def plain(run: RunConfig) -> Any:
    return build_model(dataclasses.replace(run, model=dataclasses.replace(run.model, lora=None)))


def adapted(run: RunConfig) -> Any:
    return build_stage(run, (0, BLOCKS)).model


@pytest.mark.parametrize("name", ["gptj", "llama", "gpt_neox", "opt"])
def test_at_the_start_the_model_is_its_base(name: str) -> None:
    run = lora_run(name, base="fp32")
    with torch.no_grad():
        assert torch.equal(adapted(run).eval()(input_ids=IDS).logits, plain(run).eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("base", ["nf4", "bf16"])
def test_at_the_start_it_is_its_rounded_base(base: str) -> None:
    run = lora_run(base=base)
    model, whole = adapted(run), plain(run)
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            whole.get_submodule(name).weight.data = values_of(module.matrix, torch.float32)
    for name, parameter in whole.named_parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float() if "attn" not in name and "fc_" not in name else (
            parameter.data if name.endswith("weight") else parameter.data.to(torch.bfloat16).float()
        )
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, whole(input_ids=IDS).logits)


def test_gradients_go_to_the_adapters_only() -> None:
    model = adapted(lora_run())
    model(input_ids=IDS, labels=IDS).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in learning)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == learning
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            assert float(parameter.grad.norm()) > 0, name
        if name.endswith("lora_a"):
            assert float(parameter.grad.norm()) == 0, "B is zero: A learns from the second step on"


def test_a_gradient_is_that_of_the_merged_weights() -> None:
    """Chain rule by hand: dL/dB = scale * dL/dW A^T."""
    run = lora_run(base="fp32", targets=["fc_in"])
    model, whole = adapted(run), plain(run)
    for each in (model, whole):
        each(input_ids=IDS, labels=IDS).loss.backward()
    layer = model.transformer.h[1].mlp.fc_in
    wanted = layer.scale * whole.transformer.h[1].mlp.fc_in.weight.grad @ layer.lora_a.detach().T
    torch.testing.assert_close(layer.lora_b.grad, wanted, rtol=1e-4, atol=1e-7)


def test_a_fragment_is_its_adapters() -> None:
    run = lora_run(targets=["q_proj", "v_proj"])
    fragments = cut(skeleton(run), 2)
    assert [f.blocks for f in fragments] == [f.blocks for f in cut(plain(run), 2)], "cut by the base, which takes room"
    names = [tensor.name for fragment in fragments for tensor in fragment.tensors]
    assert len(names) == BLOCKS * 2 * 2 and not any(tensor.fine for f in fragments for tensor in f.tensors)
    assert all("q_proj" in name or "v_proj" in name for name in names)
    assert frozen_counts(plain(run)) == {}
    model = plain(run)
    assert sum(frozen_counts(skeleton(run)).values()) == sum(p.numel() for p in model.parameters())


def test_layers_that_are_no_targets_are_frozen_in_as_few_bits() -> None:
    model = adapted(lora_run(targets=["q_proj"]))
    block = model.transformer.h[0]
    assert block.mlp.fc_in.lora_a is None and block.mlp.fc_in.base.dtype == torch.uint8
    assert block.attn.q_proj.lora_a.shape == (4, 16) and isinstance(model.lm_head, torch.nn.Linear)
    assert largest_matrix(model) == 16 * 64 and largest_matrix(plain(lora_run())) == 0


@pytest.mark.parametrize("part", [(0, 1), (1, 3), (3, 4)])
def test_a_part_is_that_of_the_whole(part: tuple[int, int]) -> None:
    run = lora_run()
    whole, found = dict(tensors(adapted(run))), dict(tensors(build_stage(run, part).model))
    assert any(name.endswith("lora_a") for name in found)
    for name, tensor in found.items():
        assert tensor.dtype == whole[name].dtype and torch.equal(tensor, whole[name]), name


def test_adapters_are_drawn_from_the_seed_and_the_name() -> None:
    one, same, other = (adapted(dataclasses.replace(lora_run(), seed=seed)) for seed in (0, 0, 1))
    a, b, c = (model.transformer.h[0].attn.q_proj.lora_a for model in (one, same, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a, one.transformer.h[1].attn.q_proj.lora_a)
    assert float(a.detach().abs().max()) <= 1 / 4
    assert float(one.transformer.h[0].attn.q_proj.lora_b.detach().norm()) == 0


def test_the_base_comes_from_a_folder(tmp_path: Path) -> None:
    stored = trained("gptj")
    stored.save_pretrained(tmp_path, max_shard_size="20KB")
    run = lora_run(base="fp32")
    model = build_stage(run, (0, BLOCKS), weights_from=str(tmp_path)).model
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, stored.float().train()(input_ids=IDS).logits)


def test_a_digest_names_the_base_and_not_the_adapters() -> None:
    run = lora_run()
    model = adapted(run)
    digest = base_digest(frozen_tensors(model))
    with torch.no_grad():
        model.transformer.h[0].attn.q_proj.lora_b.add_(1.0)
    assert len(digest) == 32 and base_digest(frozen_tensors(model)) == digest == base_digest(
        frozen_tensors(adapted(run))
    )
    with torch.no_grad():
        model.transformer.h[2].attn.q_proj.base[5] ^= 1
    changed = base_digest(frozen_tensors(model))
    with torch.no_grad():
        model.lm_head.bias[3] += 0.5
    assert len({digest, changed, base_digest(frozen_tensors(model))}) == 3
    for other in (lora_run(base="bf16"), dataclasses.replace(run, seed=1)):
        assert base_digest(frozen_tensors(adapted(other))) != digest
    assert base_digest(frozen_tensors(adapted(lora_run(rank=2, alpha=1.0)))) == digest


def test_bfloat16_beside_the_matrices_loses_nothing_of_what_was_agreed() -> None:
    model = adapted(lora_run())
    before = {name: tensor.clone() for name, tensor in frozen_tensors(model)}
    compute_in(model, torch.bfloat16)
    for name, tensor in frozen_tensors(model):
        assert torch.equal(tensor.to(before[name].dtype), before[name]), name
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.transformer.h[0].attn.q_proj.lora_a.dtype == torch.float32


def test_merged_weights_are_a_plain_model_that_computes_the_same(tmp_path: Path) -> None:
    model = adapted(lora_run())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.1)
        wanted = model.eval()(input_ids=IDS).logits
    found = merged(model)
    assert is_adapted(model) and not is_adapted(found) and not found.training
    assert {name for name, _ in found.named_parameters()} == {n for n, _ in plain(lora_run()).named_parameters()}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in found.parameters())
    torch.testing.assert_close(found(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    found.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, found(input_ids=IDS).logits)
    assert callable(export)


def test_a_model_without_adapters_is_merged_already() -> None:
    model = plain(lora_run())
    assert merged(model) is model


def test_a_copy_computes_the_same() -> None:
    model = adapted(lora_run())
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_targets_that_are_not_there_are_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="no linear layer query_proj") as caught:
        skeleton(lora_run(targets=["q_proj", "query_proj"]))
    assert "fc_in" in caught.value.why and "model.lora.targets" in caught.value.do
    with pytest.raises(ConfigError, match="no linear layer") as caught:
        skeleton(lora_run("gpt2"))
    assert "torch.nn.Linear" in caught.value.why


def test_a_block_without_anything_to_train_is_refused() -> None:
    run = lora_run(targets=["q_proj"])
    model = plain(run)
    model.transformer.h[1].attn.q_proj = torch.nn.Identity()
    assert run.model.lora is not None
    adapt(model, run.model.lora, 0)
    with pytest.raises(ConfigError, match="block 1 has nothing to train"):
        cut(model, 2)
