"""A stage that is built by itself is the part of the whole model, to the last bit, wherever its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.errors import ConfigError
from swarm.model.build import build_model, resolve
from swarm.model.fragments import cut
from swarm.model.partial import build_stage, join_stages
from swarm.model.skeleton import skeleton, tensors
from tests.unit.model.parts_support import BLOCKS, CUTS, FAMILIES, assert_part_of, family, run_with, trained

IDS = torch.arange(40).reshape(2, 20)


def together(stages: list[Any]) -> torch.Tensor:
    values = IDS
    for stage in stages:
        values = stage(values).detach()
    return values


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_random_part_is_that_of_the_whole(name: str, tied: bool) -> None:
    run = run_with(family(name, tie_word_embeddings=tied), seed=5)
    whole = build_model(run)
    held: list[str] = []
    for blocks in CUTS:
        stage = build_stage(run, blocks)
        assert_part_of(stage, whole)
        held += [key for key, _ in stage.held()] if blocks != (0, BLOCKS) else []
    assert sorted(held) == sorted(key for key, _ in whole.named_parameters()), "every parameter in one stage"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_part_of_a_folder_is_that_of_the_whole(name: str, tied: bool, tmp_path: Path) -> None:
    trained(name, tie_word_embeddings=tied).save_pretrained(tmp_path)
    run = run_with(source=tmp_path)
    whole = build_model(run)
    for blocks in CUTS:
        assert_part_of(build_stage(run, blocks), whole)
    published = resolve(run)  # as others see it: no folder, and untied
    assert_part_of(build_stage(published, (2, 4), weights_from=str(tmp_path)), whole)


@pytest.mark.parametrize("name", ["gptj", "gpt_neox", "opt", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_half_precision_files_become_fp32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    trained(name).to(dtype).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    run = run_with(source=tmp_path)
    whole = build_model(run)
    for blocks in CUTS:
        stage = build_stage(run, blocks)
        assert {p.dtype for _, p in stage.held()} == {torch.float32}
        assert_part_of(stage, whole)


@pytest.mark.parametrize("name", ["gptj", "gpt2", "llama", "opt"])
def test_parts_in_a_row_compute_what_the_whole_does(name: str) -> None:
    run = run_with(family(name, tie_word_embeddings=True))
    whole = build_model(run).eval()
    stages = [build_stage(run, blocks).eval() for blocks in CUTS[:3]]
    with torch.no_grad():
        assert torch.equal(together(stages), whole(input_ids=IDS, use_cache=False).logits)


def test_a_stage_is_ready_to_train() -> None:
    stage = build_stage(run_with(family("gptj", torch_dtype="bfloat16")), (1, 3))
    assert stage.training and stage.model.training and stage.model.config.use_cache is False
    entered = torch.randn(2, 5, 16, requires_grad=True)
    stage(entered).square().sum().backward()
    assert entered.grad is not None
    assert all(p.requires_grad and p.grad is not None and torch.isfinite(p.grad).all() for _, p in stage.held())


def test_the_head_of_a_tied_model_is_its_own_tensor() -> None:
    stage = build_stage(run_with(family("llama", tie_word_embeddings=True)), (0, BLOCKS))
    values = dict(tensors(stage.model))
    head, embedding = values["lm_head.weight"], values["model.embed_tokens.weight"]
    assert torch.equal(head, embedding) and head.data_ptr() != embedding.data_ptr()
    assert stage.model.config.tie_word_embeddings is False


def test_torchs_random_state_is_left_alone() -> None:
    run = run_with(family("gptj"))
    state = torch.get_rng_state()
    one = build_stage(run, (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    two = build_stage(run, (1, 2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one.held(), two.held(), strict=True))


def test_nothing_is_made_that_the_stage_does_not_hold() -> None:
    """A model of 16 GB in fp32: 64 blocks of it could not be made here; one can, and its fragment is known."""
    config = family("llama", num_hidden_layers=64, hidden_size=2048, intermediate_size=8192, vocab_size=260)
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    run = run_with(config, fragments=64)
    outline = skeleton(run)
    assert sum(p.numel() for p in outline.parameters()) > 4_000_000_000
    made: list[int] = []
    real_full_like = torch.full_like

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(tensor.numel())
        return real_full_like(tensor, *args, **kwargs)

    fragment = cut(outline, 64)[30]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "full_like", counted)
        stage = build_stage(run, fragment.blocks)
    wanted = {tensor.name: tensor.shape for tensor in fragment.tensors}
    assert {key: tuple(p.shape) for key, p in stage.held()} == wanted
    assert sum(made) == sum(tensor.numel() for _, tensor in tensors(stage.model))


@pytest.mark.parametrize("blocks", [(0, 0), (3, 2), (-1, 2), (2, 5)])
@pytest.mark.parametrize("from_file", [True, False])
def test_there_must_be_such_blocks(blocks: tuple[int, int], from_file: bool, tmp_path: Path) -> None:
    trained("llama").save_pretrained(tmp_path)
    run = run_with(source=tmp_path) if from_file else run_with(family("llama"))
    with pytest.raises(ConfigError, match="no blocks"):
        build_stage(run, blocks)


def test_the_vocabulary_must_fit_the_tokenizer_at_every_stage() -> None:
    run = run_with(family("gptj", vocab_size=256, bos_token_id=0, eos_token_id=0))
    for blocks in CUTS:
        with pytest.raises(ConfigError, match="smaller than the tokenizer"):
            build_stage(run, blocks)
    with pytest.raises(ConfigError, match="smaller than the tokenizer"):
        build_stage(run_with(family("gptj")), (1, 2), tokenizer_size=261)


@pytest.mark.parametrize("blocks", [(0, 1), (1, 2), (1, 3), (2, 4)])
def test_a_part_of_a_bidirectional_model_is_refused_unless_it_is_a_decoder(blocks: tuple[int, int]) -> None:
    bert = {"model_type": "bert", "num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2,
            "intermediate_size": 32, "vocab_size": 260}  # fmt: skip
    with pytest.raises(ConfigError, match="not a causal language model"):
        build_stage(run_with(bert), blocks)
    stage = build_stage(run_with({**bert, "is_decoder": True}), blocks)
    assert_part_of(stage, build_model(run_with({**bert, "is_decoder": True})))


def test_a_family_that_cannot_be_drawn_in_parts_is_refused_and_still_there_as_a_whole() -> None:
    config = {"model_type": "openai-gpt", "n_layer": 4, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 260}
    whole = build_model(run_with(config))
    assert not any(torch.isnan(p).any() for p in whole.parameters())
    again = build_model(run_with(config))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(ConfigError, match="cannot be made by itself") as caught:
        build_stage(run_with(config), (1, 2))
    assert "openai-gpt" in caught.value.what and "hold the whole model" in caught.value.do


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    trained("llama").save_pretrained(tmp_path)
    for config in (family("gptj"), family("llama", num_hidden_layers=3)):
        with pytest.raises(ConfigError, match="of another model"):
            build_stage(run_with(config), (1, 2), weights_from=str(tmp_path))


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_of_one_peer_join_and_part_without_a_copy(name: str) -> None:
    """Two that were built apart are one, in the same memory; what is trained in one is trained in the other."""
    run = run_with(family(name, tie_word_embeddings=True))
    parts = [build_stage(run, (block, block + 1)) for block in range(4)]
    values = {key: tensor for part in parts for key, tensor in tensors(part.model)}
    for blocks in ((0, 4), (1, 3), (2, 4)):
        joined = join_stages(run, blocks, values)
        assert_part_of(joined, build_model(run))
        for key, tensor in tensors(joined.model):
            assert tensor is values[key]
    with torch.no_grad():
        next(iter(joined.held()))[1].add_(1.0)
    again = dict(join_stages(run, blocks, values).held())
    assert all(torch.equal(again[key], tensor) for key, tensor in joined.held())
    with pytest.raises(KeyError, match="is not here"):
        join_stages(run, (1, 3), dict(tensors(parts[1].model)))
