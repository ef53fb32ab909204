"""An export must work with plain transformers, bit for bit, and never destroy anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.data.tokenizer import byte_tokenizer
from swarm.errors import ConfigError, HomeError
from swarm.model.build import build_model
from swarm.model.export import MARKER, export

FAMILIES: dict[str, dict[str, Any]] = {
    "gptj": {"n_layer": 2, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 64, "vocab_size": 257},
    "gpt_neox": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 264,
    },
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 257,
        "tie_word_embeddings": True,
    },
}


def trained(name: str, **changes: Any) -> Any:
    """A model whose every weight has moved, the head away from the embedding too."""
    config = {"model_type": name, **FAMILIES[name], **changes}
    model = build_model(
        RunConfig(name="test", model=ModelConfig(config=config), data=DataConfig(stdlib=True), fragments=1)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_transformers_reads_it_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = trained(name)
    folder = tmp_path / "out" / "model"
    export(model, byte_tokenizer(), folder)
    assert model.training and model.config.use_cache is False, "the live model was changed"

    again = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "naïve <eos> 漢字\n\t x ."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == list(text.encode()) and tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert again.config.use_cache is True
    assert again.generation_config.eos_token_id == again.config.eos_token_id == 256
    output = again.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=256)
    assert output.shape[0] == 1 and ids.shape[1] < output.shape[1] <= ids.shape[1] + 3
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names


def test_it_works_without_any_code_of_ours(tmp_path: Path) -> None:
    export(trained("gptj"), byte_tokenizer(), tmp_path / "model")
    program = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "t = T.from_pretrained(sys.argv[1]); m = M.from_pretrained(sys.argv[1])\n"
        "x = t('héllo', return_tensors='pt'); y = m.generate(**x, max_new_tokens=4, pad_token_id=256)\n"
        "assert t.decode(y[0][:6]) == 'héllo'; assert 'swarm' not in sys.modules; print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_training_can_go_on_from_an_export(tmp_path: Path) -> None:
    model = trained("llama")
    export(model, byte_tokenizer(), tmp_path / "model")
    run = RunConfig(
        name="more",
        model=ModelConfig(source=str(tmp_path / "model")),
        data=DataConfig(stdlib=True),
        fragments=1,
        tokenizer=str(tmp_path / "model"),
    )
    again = build_model(run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_end_of_text_tokens_that_somebody_chose_are_kept(tmp_path: Path) -> None:
    model = trained("gptj", eos_token_id=[10, 256])
    export(model, byte_tokenizer(), tmp_path / "model")
    assert AutoConfig.from_pretrained(tmp_path / "model").eos_token_id == [10, 256]


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export(trained("gptj"), byte_tokenizer(), folder)
    export(trained("llama"), byte_tokenizer(), folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "something was left behind"


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    export(trained("gptj"), byte_tokenizer(), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    """Also not one that looks like an export: a model that somebody downloaded holds the same files."""
    for name in ("thesis.txt", "config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("precious")
        with pytest.raises(ConfigError, match="not overwritten") as caught:
            export(trained("gptj"), byte_tokenizer(), folder)
        assert name in caught.value.why
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "precious"


def test_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with pytest.raises(ConfigError, match="not overwritten"):
        export(trained("gptj"), byte_tokenizer(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "precious"


def test_files_added_to_an_export_are_not_lost(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export(trained("gptj"), byte_tokenizer(), folder)
    (folder / "README.md").write_text("my notes")
    with pytest.raises(ConfigError, match="added after") as caught:
        export(trained("gptj"), byte_tokenizer(), folder)
    assert "README.md" in caught.value.why
    assert (folder / "README.md").read_text() == "my notes" and (folder / MARKER).exists()


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HomeError, match="cannot write the model"):
        export(trained("gptj"), byte_tokenizer(), tmp_path / "file" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_failure_half_way_keeps_the_earlier_export(tmp_path: Path) -> None:
    """A tokenizer file that cannot be written stands for a full disk: the old export must stay."""
    folder = tmp_path / "model"
    export(trained("gptj"), byte_tokenizer(), folder)
    before = (folder / "model.safetensors").read_bytes()

    class Full:
        eos_token_id, bos_token_id = 256, None

        def save_pretrained(self, folder: Path) -> None:
            with open("/dev/full", "w") as file:
                file.write("x" * 100_000)

    with pytest.raises(HomeError, match="cannot write the model") as caught:
        export(trained("gptj"), Full(), folder)  # type: ignore[arg-type]
    assert "space" in caught.value.why.lower()
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
