"""Reading parts of checkpoints: only the bytes that are needed, under whatever names, and every fault has its words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.errors import ConfigError
from swarm.model import weights
from swarm.model.architecture import architecture
from swarm.model.build import build_model
from swarm.model.partial import build_stage
from swarm.model.skeleton import skeleton_of, tensors
from swarm.model.weights import INDEX, ONE, Checkpoint, read
from tests.unit.model.parts_support import CUTS, assert_part_of, family, run_with, trained


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the one file of a checkpoint."""
    values = load_file(folder / ONE)
    edit(values)
    save_file(values, folder / ONE, metadata={"format": "pt"})


class Counting:
    """safe_open, and what was fetched through it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: set[str] = set()
        self.keys: list[str] = []
        self.num_bytes = 0
        monkeypatch.setattr(weights, "safe_open", self.open)

    def open(self, path: Path, **options: Any) -> Any:
        counting, file = self, safe_open(path, **options)
        self.files.add(path.name)

        class File:
            def __enter__(self) -> File:
                return self

            def __exit__(self, *_: Any) -> None:
                return None

            def keys(self) -> list[str]:
                return list(file.keys())

            def get_tensor(self, key: str) -> torch.Tensor:
                tensor: torch.Tensor = file.get_tensor(key)
                counting.keys.append(key)
                counting.num_bytes += tensor.numel() * tensor.element_size()
                return tensor

        return File()


@pytest.mark.parametrize("name", ["gptj", "gpt2", "gpt_neox", "opt", "mixtral"])
@pytest.mark.parametrize("shards", [False, True])
def test_each_byte_of_a_checkpoint_is_read_by_the_stage_that_needs_it(
    name: str, shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(name, tie_word_embeddings=False).save_pretrained(tmp_path, max_shard_size="10KB" if shards else "1GB")
    stored = {key: value for file in tmp_path.glob("*.safetensors") for key, value in load_file(file).items()}
    run = run_with(source=tmp_path)
    keys: list[str] = []
    for blocks in CUTS[:3]:
        counting = Counting(monkeypatch)
        stage = build_stage(run, blocks)
        keys += counting.keys
        held = sum(4 * p.numel() for _, p in stage.held())
        assert counting.num_bytes == held
        assert counting.num_bytes == sum(4 * stored[key].numel() for key in counting.keys)
    assert sorted(keys) == sorted(stored), "each tensor once, in one of the stages"


def test_files_that_hold_nothing_needed_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained("llama").save_pretrained(tmp_path, max_shard_size="10KB")
    run = run_with(source=tmp_path)
    whole = build_model(run)
    counting = Counting(monkeypatch)
    build_stage(run, (1, 2))
    gone = [file for file in tmp_path.glob("*.safetensors") if file.name not in counting.files]
    assert gone and counting.files
    for file in gone:
        file.unlink()
    assert_part_of(build_stage(run, (1, 2)), whole)
    with pytest.raises(ConfigError, match="is in its index and not there"):
        build_stage(run, (0, 1))


def test_a_tied_head_is_read_from_the_embedding_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / ONE)
    run = run_with(source=tmp_path)
    whole = build_model(run)
    counting = Counting(monkeypatch)
    stage = build_stage(run, (3, 4))
    assert "model.embed_tokens.weight" in counting.keys
    assert "model.embed_tokens.weight" not in dict(stage.held())

    def only_a_head(values: dict[str, torch.Tensor]) -> None:
        values["lm_head.weight"] = values.pop("model.embed_tokens.weight")

    change(tmp_path, only_a_head)
    for blocks in CUTS:
        assert_part_of(build_stage(run, blocks), whole)


def test_a_head_beside_the_embedding_counts_although_the_config_ties_them(tmp_path: Path) -> None:
    trained("llama", tie_word_embeddings=True).save_pretrained(tmp_path)

    def another_head(values: dict[str, torch.Tensor]) -> None:
        values["lm_head.weight"] = values["model.embed_tokens.weight"] + 1

    change(tmp_path, another_head)
    run = run_with(source=tmp_path)
    whole = build_model(run)
    assert not torch.equal(whole.lm_head.weight, whole.get_input_embeddings().weight)
    for blocks in CUTS:
        assert_part_of(build_stage(run, blocks), whole)


def test_names_that_differ_from_the_models_are_understood(tmp_path: Path) -> None:
    """GPT-NeoX's head is `embed_out` in files, and a file of the bare model has no prefix."""
    trained("gpt_neox").save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / ONE)
    run = run_with(source=tmp_path)
    whole = build_model(run)
    assert_part_of(build_stage(run, (3, 4)), whole)

    def bare(values: dict[str, torch.Tensor]) -> None:
        for key in list(values):
            values[key.removeprefix("gpt_neox.")] = values.pop(key)

    change(tmp_path, bare)
    for blocks in CUTS:
        assert_part_of(build_stage(run, blocks), whole)


def test_norms_of_old_files_are_understood(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
              "vocab_size": 260, "is_decoder": True}  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **config)).save_pretrained(tmp_path)
    run = run_with(source=tmp_path)
    whole = build_model(run)

    def older(values: dict[str, torch.Tensor]) -> None:
        for key in list(values):
            new = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            values[new] = values.pop(key)

    change(tmp_path, older)
    for blocks in CUTS:
        assert_part_of(build_stage(run, blocks), whole)


def test_what_is_stored_in_pieces_is_put_together_from_those_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("mixtral").save_pretrained(tmp_path)
    run = run_with(source=tmp_path)
    counting = Counting(monkeypatch)
    stage = build_stage(run, (2, 3))
    experts = [key for key in counting.keys if "experts.1" in key]
    assert len(experts) == 3 and all(".layers.2." in key for key in counting.keys)
    assert dict(stage.held())["model.layers.2.mlp.experts.gate_up_proj"].shape == (3, 64, 16)
    assert_part_of(stage, build_model(run))


def test_a_conversion_that_fails_says_that_the_family_cannot_be_read_in_parts(tmp_path: Path) -> None:
    trained("mixtral").save_pretrained(tmp_path)

    def ragged(values: dict[str, torch.Tensor]) -> None:
        key = next(key for key in values if ".layers.1." in key and "experts.2.w1" in key)
        values[key] = values[key][:-1].clone()

    change(tmp_path, ragged)
    run = run_with(source=tmp_path)
    build_stage(run, (2, 3))
    with pytest.raises(ConfigError, match="cannot be read in parts") as caught:
        build_stage(run, (1, 2))
    assert "mixtral" in caught.value.what and "whole" in caught.value.do


def test_missing_and_misshapen_tensors_are_refused_where_they_are_needed(tmp_path: Path) -> None:
    trained("gptj").save_pretrained(tmp_path)

    def damage(values: dict[str, torch.Tensor]) -> None:
        del values["transformer.h.1.mlp.fc_in.weight"]
        values["transformer.h.2.ln_1.bias"] = torch.zeros(17)

    change(tmp_path, damage)
    run = run_with(source=tmp_path)
    build_stage(run, (0, 1))
    build_stage(run, (3, 4))
    for blocks, count, name in (
        ((1, 2), 1, "transformer.h.1.mlp.fc_in.weight"), ((2, 4), 1, "transformer.h.2.ln_1.bias"), ((0, 4), 2, "h.1."),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="do not fit") as caught:
            build_stage(run, blocks)
        assert name in caught.value.why and caught.value.why.startswith(f"{count} tensors")
        assert caught.value.do


def test_an_untied_checkpoint_without_a_head_is_refused_by_the_last_stage_only(tmp_path: Path) -> None:
    trained("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    change(tmp_path, lambda values: values.__delitem__("lm_head.weight"))
    run = run_with(source=tmp_path)
    build_stage(run, (0, 3))
    with pytest.raises(ConfigError, match=r"do not fit[\s\S]*lm_head"):
        build_stage(run, (3, 4))


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_broken_file_is_a_stated_error(damage: str, tmp_path: Path) -> None:
    trained("gptj").save_pretrained(tmp_path)
    file = tmp_path / ONE
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "garbage": b"x" * 500, "empty": b""}[damage])
    with pytest.raises(ConfigError, match="cannot load the weights") as caught:
        build_stage(run_with(source=tmp_path), (2, 4))
    assert caught.value.why and caught.value.do


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../../secret"}}']
)
def test_a_broken_index_is_a_stated_error(text: str, tmp_path: Path) -> None:
    trained("gptj").save_pretrained(tmp_path)
    (tmp_path / ONE).unlink()
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ConfigError, match="no index of weights"):
        build_stage(run_with(source=tmp_path), (1, 2))


def test_a_folder_without_safetensors_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(family("gptj")))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match="cannot be read in parts") as caught:
        build_stage(run_with(source=tmp_path), (1, 2))
    assert ONE in caught.value.why and "save_pretrained" in caught.value.do


def test_reading_gives_values_by_name_and_leaves_out_what_is_in_no_file(tmp_path: Path) -> None:
    model = trained("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    whole, tied = skeleton_of(architecture(run_with(source=tmp_path)))
    names = ["model.norm.weight", "model.rotary_emb.inv_freq", "lm_head.weight"]
    found = read(Checkpoint(str(tmp_path)), whole, names, tied=tied)
    assert sorted(found) == ["lm_head.weight", "model.norm.weight"]
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    assert all(tensor.is_meta for _, tensor in tensors(whole)), "the skeleton is as it was"


def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's with config and index of one model, and no network. Returns the folder for its files."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    original = tmp_path / "original"
    trained("gpt_neox").save_pretrained(original, max_shard_size="10KB")
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "cache" / "models--somebody--something"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    for name in ("config.json", INDEX):
        shutil.copy(original / name, snapshot / name)
    return snapshot


def test_of_a_hub_model_only_the_files_with_something_needed_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub(tmp_path, monkeypatch)
    original = tmp_path / "original"
    counting = Counting(monkeypatch)
    build_stage(run_with(source=original), (1, 2))
    assert 0 < len(counting.files) < len(list(original.glob("*.safetensors")))
    for name in counting.files:
        shutil.copy(original / name, snapshot / name)
    whole = build_model(run_with(source=original))
    assert_part_of(build_stage(run_with(source="somebody/something"), (1, 2)), whole)
    with pytest.raises(ConfigError, match="cannot load the model 'somebody/something'") as caught:
        build_stage(run_with(source="somebody/something"), (3, 4))
    assert "huggingface.co" in caught.value.do


def test_a_hub_model_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="cannot load the model 'nobody/nothing'"):
        build_stage(run_with(source="nobody/nothing"), (1, 2))
    (snapshot / INDEX).unlink()
    with pytest.raises(ConfigError, match="cannot load the model 'somebody/something'") as caught:
        build_stage(run_with(source="somebody/something"), (1, 2))
    assert "neither" not in str(caught.value), "nobody knows what the hub has"
