"""Rows of a source: what is in them, what is not, and that they follow from the mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from swarm.config import RunConfig
from swarm.data import supply as supply_file
from swarm.data.marks import Marks
from swarm.data.packing import Row
from swarm.data.shelf import Mark
from swarm.data.sources import is_held_out
from swarm.data.supply import Stock, Supply, encode, layout_of
from swarm.data.tokenizer import byte_tokenizer
from swarm.errors import ConfigError
from tests.unit.data.task_sets import p3_rows, run_over, write_jsonl

BYTES = byte_tokenizer()
MARKS = Marks.of(BYTES, 320)


def supply(run: RunConfig, objective: str = "prefix", *, key: str = "k", name: str = "one") -> Supply:
    return Supply(Stock(name, run.sources[name]), objective, run, BYTES, MARKS, key=key)


def texts_of(rows: list[Row]) -> list[str]:
    """Text of each segment that is no padding."""
    found = []
    for row in rows:
        first = 0
        for prefix, size in row.segments:
            part, first = row.tokens[first : first + size], first + size
            if prefix < size:
                found.append(bytes(part[part < 256].astype(np.uint8)).decode())
    return found


@pytest.fixture
def p3(tmp_path: Path) -> Any:
    return {"format": "p3", "files": [str(write_jsonl(tmp_path / "p3.jsonl", p3_rows(400)))], "shots": 0}


def test_tasks_become_rows_whose_prompts_are_prefixes(p3: Any) -> None:
    rows, after = supply(run_over({"one": p3})).block(Mark())
    assert after == Mark(1), "400 examples are less than a block"
    assert all(len(row.tokens) == 64 and sum(size for _, size in row.segments) == 64 for row in rows)
    texts = texts_of(rows)
    asked = {int(text.split()[1]) for text in texts}
    assert asked == {i for i in range(400) if not is_held_out(f"p3.jsonl#{i}", held_out_percent=1.0)}
    for row in rows:
        first = 0
        for prefix, size in row.segments:
            if prefix < size:
                answer = row.tokens[first + prefix : first + size]
                assert answer[-1] == 256 and bytes(answer[:-1].astype(np.uint8)) in (b" yes", b" no")
            first += size


def test_a_block_follows_from_its_mark_and_key(p3: Any) -> None:
    def tokens(key: str, number: int) -> list[list[int]]:
        return [row.tokens.tolist() for row in supply(run_over({"one": p3}), key=key).block(Mark(number))[0]]

    assert tokens("k", 0) == tokens("k", 0) != tokens("k", 1)
    assert tokens("k", 0) != tokens("other", 0)


@pytest.mark.parametrize("objective", ["causal", "prefix", "ul2", "ul2r"])
def test_every_objective_takes_text(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply_file, "BLOCK_TOKENS", 50_000)
    rows, _ = supply(run_over({"one": {"stdlib": True}}), objective).block(Mark())
    assert len(rows) * 64 >= supply_file.BLOCK_TOKENS * 0.9
    assert sum(size for row in rows for prefix, size in row.segments if prefix == size) < 0.12 * len(rows) * 64


def test_neighbouring_rows_are_of_different_documents(tmp_path: Path) -> None:
    rows = [{"text": f"{i % 10}" * 1000} for i in range(40)]
    run = run_over({"one": {"files": [str(write_jsonl(tmp_path / "a.jsonl", rows))]}})
    found = [row.tokens[5] for row in supply(run, "causal").block(Mark())[0]]
    changes = sum(a != b for a, b in zip(found, found[1:], strict=False))
    assert changes > 0.7 * len(found)


def test_a_file_or_two_of_text_are_cut_and_their_ends_held_out(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("x" * 1000)
    stock = Stock("book", run_over({"book": {"files": [str(tmp_path / "book.txt")]}}).sources["book"])
    train, held = stock.sides()
    assert [len(sample.text) for sample in (*train, *held)] == [990, 10]


def test_a_source_without_anything_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"law": ""}))
    with pytest.raises(ConfigError, match="'cot' holds nothing") as caught:
        Stock("cot", run_over({"cot": {"format": "cot", "files": [str(tmp_path / "c.json")]}}).sources["cot"]).sides()
    assert "sources.cot" in caught.value.do


def test_streams_give_what_is_kept(p3: Any) -> None:
    both = run_over({"one": p3, "two": {**p3, "streaming": True}})
    kept, streamed = (texts_of(supply(both, name=name).block(Mark())[0]) for name in ("one", "two"))
    numbers = [sorted(int(text.split()[1]) for text in texts) for texts in (kept, streamed)]
    assert numbers[0] == numbers[1]


def test_an_objective_that_the_vocabulary_has_no_room_for(p3: Any) -> None:
    run = run_over({"one": p3})
    with pytest.raises(ConfigError, match="no room"):
        Supply(Stock("one", run.sources["one"]), "ul2", run, BYTES, Marks.of(BYTES, 257), key="k")


def test_encoding_equals_the_tokenizer_s() -> None:
    texts = ["", "a b\n", "na\u00efve \u6f22"]
    assert [ids.tolist() for ids in encode(texts, BYTES)] == [BYTES.encode(text) for text in texts]
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    found = encode(["a b a", "", "x"], words)
    assert [ids.tolist() for ids in found] == [[2, 3, 2], [], [0]] and all(ids.dtype == np.int32 for ids in found)
    assert encode([], words) == []
    run = run_over({"one": {"stdlib": True}})
    room = {tokenizer: layout_of(run, run.sources["one"], tokenizer).room_chars for tokenizer in (words, BYTES)}
    assert room == {words: 3 * 64, BYTES: 64}
