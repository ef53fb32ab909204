"""What goes out is what the swarm has: bits, card, tokenizer; and what comes in from plain transformers, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from swarm.asking import release
from swarm.asking.states import Weights
from swarm.config import canonical_json
from swarm.data.marks import Marks
from swarm.data.tokenizer import byte_tokenizer
from swarm.model.card import FILE
from swarm.model.export import RUN_FILE, with_names
from tests.unit.asking.support import GPTJ, make_run, make_weights

auto: Any = AutoModelForCausalLM


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("run"))


def test_the_folder_holds_all_that_a_stranger_needs(weights: Weights, tmp_path: Path) -> None:
    release.write(weights, tmp_path / "model")
    card = (tmp_path / "model" / FILE).read_text()
    assert (tmp_path / "model" / RUN_FILE).read_bytes() == canonical_json(weights.run)
    assert all(state.digest in card for state in weights.states) and "`Ada`, `Grace`" in card
    assert "16,300 parameters" in card and "1,234 tokens" in card and "is_causal" not in card
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["pad_token_id"] == generation["eos_token_id"] == 256, "generate() has nothing to warn of"


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
def test_plain_transformers_gets_the_very_bits(weights: Weights, tmp_path: Path, max_shard_bytes: int) -> None:
    folder = tmp_path / "model"
    release.write(weights, folder, max_shard_bytes=max_shard_bytes)
    shards = sorted(path.name for path in folder.glob("model*.safetensors"))
    assert (len(shards) > 2) == (folder / "model.safetensors.index.json").exists() == (max_shard_bytes < 10**6)
    assert all((folder / name).stat().st_size < max_shard_bytes + 4_000 for name in shards if "of" in name)
    parameters = dict(auto.from_pretrained(folder).named_parameters())
    for state in weights.states:
        for name, values in weights.held.layouts[state.fragment].views(state.weights):
            assert torch.equal(parameters.pop(name).flatten(), values.flatten())
    assert not parameters, "and nothing else"
    index = json.loads((folder / "model.safetensors.index.json").read_text()) if len(shards) > 1 else {"weight_map": {}}
    assert set(index["weight_map"].values()) == (set(shards) if len(shards) > 1 else set())


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_plain_transformers_is_picked_up_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    """Sharded, as large models are; and what a run that was started from it exports is that model again."""
    torch.manual_seed(3)
    model = auto.from_config(AutoConfig.for_model(**{**GPTJ, "tie_word_embeddings": tied}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    run, held = make_run(tmp_path / "run", model={"config": None, "source": str(tmp_path / "theirs")})
    wanted = model.state_dict()
    for index, state in held.states.items():
        assert state.version == 0
        for name, values in held.layouts[index].views(state.weights):
            assert torch.equal(values.flatten(), wanted[name].flatten()), name
    release.write(Weights(run, held, list(held.states.values())), tmp_path / "ours")
    again = auto.from_pretrained(tmp_path / "ours").state_dict()
    assert {name for name in wanted if not name.endswith("masked_bias")} <= again.keys()
    assert all(torch.equal(values, wanted[name]) for name, values in again.items())
    ids = torch.tensor([[1, 2, 3, 250]])
    with torch.no_grad():
        assert torch.equal(auto.from_pretrained(tmp_path / "ours")(ids).logits, model.eval()(ids).logits)


def test_marks_get_names_in_the_tokenizer_that_goes_out(tmp_path: Path) -> None:
    plain = byte_tokenizer()
    marks = Marks.of(plain, 300)
    named = with_names(plain, marks.names)
    named.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(plain) == 257, "the run's own is left alone"
    assert len(again) == 300 and [again.convert_tokens_to_ids(name) for name in ("[S2S]", "[NLU]", "[NLG]")] == [
        257, 258, 259,
    ]
    assert all(again.convert_tokens_to_ids(name) == token for token, name in marks.names.items())
    assert Marks.of(again, 300) == marks, "whoever loads it finds the same marks"
    assert again.decode([72, 105, 257, 260], skip_special_tokens=True) == "Hi"
    assert again("[S2S]")["input_ids"] == list(b"[S2S]"), "written in a text it is no mark"


def test_tokens_that_have_a_name_keep_it() -> None:
    plain = byte_tokenizer()
    assert len(with_names(plain, {65: "x", 256: "y"})) == 257
    assert len(with_names(plain, {258: "far"})) == 257, "ids with holes between them cannot be"
    assert with_names(plain, {257: "[S2S]"}).convert_tokens_to_ids("[S2S]") == 257
