"""Rows of one source under one objective: blocks of samples, put, tokenised, made into examples, packed on their own.

`block(mark)` is a pure function of the mark (shelf.py), so a place in the data is a mark and how many rows of its block
have been taken: nothing of what is shuffled or half packed needs to be kept.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from swarm.config import RunConfig, SourceConfig
from swarm.data.example import Ids, Objective
from swarm.data.marks import Marks
from swarm.data.objectives import make_objective
from swarm.data.packing import Packer, Row
from swarm.data.sample import Sample
from swarm.data.shards import Shard, find_shards
from swarm.data.shelf import Kept, Layout, Mark, Shelf, Streamed, dice_of
from swarm.data.sources import is_held_out, split
from swarm.data.templates import Pack, put
from swarm.data.tokenizer import is_byte_tokenizer
from swarm.errors import ConfigError

BLOCK_TOKENS = 2**18
"""of a block, about: less than a second's work, and enough text in random order that a batch is of many documents"""
OPEN_TASKS, TASK_ROWS = 16, 512
"""of a streamed set of tasks: files at a time, and rows of each in a pass"""
CHARS_A_TOKEN = 3
"""of other tokenizers than "bytes", at least"""


class Stock:
    """What there is of one source, for all phases: its shards, and its samples where they are kept. Any thread."""

    def __init__(self, name: str, source: SourceConfig, *, cache: Path | None = None) -> None:
        self.name, self.source = name, source
        self._cache = cache
        self._lock = threading.Lock()
        self._shards: list[Shard] | None = None
        self._sides: tuple[list[Sample], list[Sample]] | None = None

    def shards(self) -> list[Shard]:
        """Raises ConfigError, NetworkError; asked again, it looks again."""
        with self._lock:
            return self._found()

    def look(self) -> None:
        """Whether it is as the run says, by the first sample. Raises as `shards`, and ConfigError for other columns."""
        for shard in self.shards()[:1]:
            next(shard.samples(), None)

    def sides(self) -> tuple[list[Sample], list[Sample]]:
        """(train, held out) of a source that is kept. Raises as `shards`, and ConfigError where a side is missing."""
        with self._lock:
            if self._sides is None:
                self._sides = self._read()
            return self._sides

    def shelf(self, key: str, layout: Layout) -> Shelf:
        if self.source.streaming:
            return Streamed(self.shards(), key=key, layout=layout)
        return Kept(self.sides()[0], key=key, layout=layout)

    def _found(self) -> list[Shard]:
        if self._shards is None:
            self._shards = find_shards(self.source, cache=self._cache)
        return self._shards

    def _read(self) -> tuple[list[Sample], list[Sample]]:
        samples = [sample for shard in self._found() for sample in shard.samples() if sample.text]
        percent = self.source.held_out_percent
        train: list[Sample] = []
        held: list[Sample] = []
        for sample in samples:
            (held if is_held_out(sample.name, held_out_percent=percent) else train).append(sample)
        if samples and not (train and held) and not any(sample.prompt for sample in samples):  # a file or two of text
            sides = split([(sample.name, sample.text) for sample in samples], held_out_percent=percent)
            train, held = ([Sample(*document) for document in side] for side in sides)
        if not train:
            raise ConfigError(
                f"the source {self.name!r} holds nothing to train on",
                why=f"of {len(samples)} documents {len(held)} are held out" if samples else "every document is empty",
                do=f"check sources.{self.name}, or hold less of it out (held_out_percent)",
            )
        return train, held


class Supply:
    def __init__(
        self, stock: Stock, objective: str, run: RunConfig, tokenizer: PreTrainedTokenizerBase, marks: Marks, *,
        key: str,
    ) -> None:
        """`key`: what its order follows from; others read in unrelated orders. Raises ConfigError for an objective that
        the run's rows or vocabulary cannot have."""
        length = run.train.sequence_length
        self.name = stock.name
        self._stock, self._tokenizer, self._key, self._length, self._pad = stock, tokenizer, key, length, marks.end
        self._objective: Objective = make_objective(objective, sequence_length=length, marks=marks)
        self._layout = layout_of(run, stock.source, tokenizer)
        self._shelf: Shelf | None = None

    def block(self, mark: Mark) -> tuple[list[Row], Mark]:
        """The rows there, and the mark after them. Raises ConfigError, NetworkError, OSError where they cannot be had;
        asked again, it tries again."""
        if self._shelf is None:
            self._shelf = self._stock.shelf(self._key, self._layout)
        found, after = self._shelf.read(mark)
        dice = dice_of(self._key, "rows", *mark)
        rows = pack_rows(
            found, self._objective, self._tokenizer, dice, length=self._length, pad=self._pad
        )
        return [rows[index] for index in dice.permutation(len(rows))], after


def layout_of(run: RunConfig, source: SourceConfig, tokenizer: PreTrainedTokenizerBase) -> Layout:
    chars = 1 if is_byte_tokenizer(tokenizer) else CHARS_A_TOKEN
    layout = Layout(
        block_chars=BLOCK_TOKENS * chars, room_chars=run.train.sequence_length * chars, shots=source.shots,
        held_out_percent=source.held_out_percent,
    )
    if source.format == "text":
        return layout
    return dataclasses.replace(layout, open_shards=OPEN_TASKS, window_rows=TASK_ROWS)


def pack_rows(
    found: Sequence[Pack], objective: Objective, tokenizer: PreTrainedTokenizerBase, dice: np.random.RandomState, *,
    length: int, pad: int,
) -> list[Row]:
    texts = [put(pack, dice) for pack in found]
    prompts = encode([prompt for prompt, _ in texts], tokenizer)
    answers = encode([answer for _, answer in texts], tokenizer)
    packer = Packer(length, pad)
    rows: list[Row] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        for example in objective.examples(np.concatenate([prompt, answer]), dice, prompt=len(prompt)):
            rows += packer.add(example)
    return rows + packer.rest()


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Token ids of each, int32, without end-of-text."""
    if is_byte_tokenizer(tokenizer):  # 100 times faster than asking it
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) for text in texts]
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.asarray(document, dtype=np.int32) for document in ids]
