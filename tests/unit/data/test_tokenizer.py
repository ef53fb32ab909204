"""The byte tokenizer is exact on every text; other tokenizers load with errors that help."""

from __future__ import annotations

import json
import random
from pathlib import Path

import huggingface_hub.constants
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.data.tokenizer import (
    EOS_ID,
    byte_tokenizer,
    is_byte_tokenizer,
    load_tokenizer,
    text_bytes,
)
from swarm.errors import ConfigError

AWKWARD = [
    "",
    " ",
    "\n",
    "\r\n",
    "\t \t",
    "\x00\x01\x1f\x7f",
    "  two  spaces ",
    " do n't , stop . now ! it 's",
    "\ufeffbom",
    "e\u0301 é",
    "\u200b\u200d\u2028\u00a0",
    "漢字かな",
    "🎉👩‍👩‍👧",
    "\U0010ffff",
    "<eos>",
    "a<eos>b<eos>",
    "Ġ Ċ ġ",
    "def f():\n    return 1\n",
    "##x ▁y </w>",
    "\u0627\u0644\u0639",
    "\ufffd",
]


def run_with(tokenizer: str) -> RunConfig:
    model = ModelConfig(config={"model_type": "gptj"})
    return RunConfig(name="test", model=model, data=DataConfig(stdlib=True), tokenizer=tokenizer)


def random_text(draw: random.Random) -> str:
    """Characters of all lengths in UTF-8, half surrogates left out: they are no text."""
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 60)))


@pytest.fixture(params=["made", "exported"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedTokenizerFast:
    made = load_tokenizer(run_with("bytes"))
    if request.param == "made":
        return made
    made.save_pretrained(tmp_path)
    # beside a model, AutoTokenizer also looks at the model's type
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gptj"}))
    return AutoTokenizer.from_pretrained(tmp_path)


def test_tokens_are_bytes_and_come_back(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(0)
    for text in [*AWKWARD, *(random_text(draw) for _ in range(300))]:
        ids = tokenizer.encode(text)
        assert ids == list(text.encode("utf-8"))
        assert tokenizer.decode(ids) == text
        assert tokenizer(text)["input_ids"] == ids


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 257 and tokenizer.eos_token_id == EOS_ID == 256
    assert is_byte_tokenizer(tokenizer)
    assert tokenizer.decode([72, 105, 256]) == "Hi<eos>"
    assert tokenizer.decode([72, 105, 256], skip_special_tokens=True) == "Hi"


def test_bytes_that_are_no_text_still_decode(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model in its first minutes writes anything; a sample must show something and not raise."""
    assert tokenizer.decode([0xC3, 0x28, 0xFF, 65]).endswith("A")
    for token in range(256):
        assert isinstance(tokenizer.decode([token]), str)


def small_tokenizer(eos: str | None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token=eos)


def test_tokenizer_of_a_folder(tmp_path: Path) -> None:
    small_tokenizer("</s>").save_pretrained(tmp_path)
    loaded = load_tokenizer(run_with(str(tmp_path)))
    assert loaded("hello world")["input_ids"] == [2, 3]
    assert loaded.eos_token_id == 1
    assert not is_byte_tokenizer(loaded)


def test_text_is_measured_in_bytes() -> None:
    assert text_bytes(small_tokenizer("</s>"), [2, 3, 1]) == len("hello world"), "the end of a text is none of it"
    own = byte_tokenizer()
    assert text_bytes(own, [*"caf\u00e9".encode(), EOS_ID]) == 6, "and here a token is a byte, whatever it is"
    assert text_bytes(own, []) == 0


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    small_tokenizer("</s>").save_pretrained(tmp_path / "tok")
    assert load_tokenizer(run_with("~/tok")).eos_token_id == 1


def test_tokenizer_without_end_of_text(tmp_path: Path) -> None:
    small_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(run_with(str(tmp_path)))


def test_folder_that_is_none(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "./none", "~/no/such"):
        with pytest.raises(ConfigError, match="no tokenizer folder"):
            load_tokenizer(run_with(path))


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the tokenizer") as caught:
        load_tokenizer(run_with(str(tmp_path)))
    assert caught.value.why and "bytes" in caught.value.do


def test_broken_tokenizer_file(tmp_path: Path) -> None:
    small_tokenizer("</s>").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        load_tokenizer(run_with(str(tmp_path)))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # fail at once instead of retrying
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot load the tokenizer 'nobody/nothing'"):
        load_tokenizer(run_with("nobody/nothing"))


def test_each_call_makes_its_own() -> None:
    """Callers may add to a tokenizer; that must not reach others."""
    assert byte_tokenizer() is not byte_tokenizer()
