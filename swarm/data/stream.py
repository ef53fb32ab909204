"""The packed token stream: all documents end to end, cut into windows, drawn in an order of each reader's own.

Tokens are made once and kept in two bytes each where the vocabulary allows. The order of the windows follows from
(seed, reader, pass) alone: a peer that restarts goes on exactly where its state says, and two peers of a swarm read
the same text in unrelated orders, so nobody has to be told which part of the data is whose.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from swarm.data.batch import Batch
from swarm.data.tokenizer import is_byte_tokenizer
from swarm.errors import ConfigError, StateError

DOCUMENTS_AT_ONCE = 1_000


def tokenise(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """All of `documents` as one tensor of token ids [tokens], the end-of-text token after each; uint16 or int32."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    eos = np.array([tokenizer.eos_token_id], dtype=dtype)
    parts: list[np.ndarray[Any, Any]] = []
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        texts = documents[start : start + DOCUMENTS_AT_ONCE]["text"]
        if is_byte_tokenizer(tokenizer):
            ids = [
                np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts
            ]  # 100 times faster than asking it
        else:
            ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document in ids:
            parts += [np.asarray(document, dtype=dtype), eos]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int32)


class PackedStream:
    """Endless batches of training sequences. One pass shows each window once; the next pass cuts and orders them anew.

    Windows of one pass are consecutive, `sequence_length` long and do not overlap; the first starts at an offset drawn
    for that pass, so that over the passes a token is seen at different places of its window. Less than one sequence's
    worth of tokens at either end is left out of a pass.

    `tokens`: [tokens], any integer type. `reader`: the peer's name; other readers see other orders.
    Raises ConfigError where the text is shorter than one sequence.
    """

    may_wait = False

    def __init__(self, tokens: torch.Tensor, *, sequence_length: int, seed: int, reader: str) -> None:
        _check_length(tokens, sequence_length)
        self._tokens, self._length = tokens, sequence_length
        self._seed, self._reader = seed, reader
        self._start_pass(0)

    def next_batch(self, num_sequences: int) -> Batch:
        """The next so many windows, each one causal segment; goes on into the next pass where this one ends."""
        starts: list[int] = []
        while len(starts) < num_sequences:
            if self._position == len(self._starts):
                self._start_pass(self._pass + 1)
            taken = self._starts[self._position : self._position + num_sequences - len(starts)].tolist()
            self._position += len(taken)
            starts += taken
        return _windows(self._tokens, starts, self._length)

    def state(self) -> dict[str, int]:
        """JSON-able: `pass` (from 0) and `position` (windows of it already handed out)."""
        return {"pass": self._pass, "position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state()` was taken. Raises StateError, and changes nothing, where it does not fit."""
        number, position = state.get("pass"), state.get("position")
        if type(number) is not int or type(position) is not int or number < 0 or position < 0:
            raise StateError(
                "the place in the data is not valid", why=f"got {state!r}", do="delete the checkpoint to start afresh"
            )
        before = self.state()
        self._start_pass(number)
        if position > len(self._starts):
            windows = len(self._starts)
            self._start_pass(before["pass"])
            self._position = before["position"]
            raise StateError(
                "the place in the data does not exist",
                why=f"window {position} of {windows}: the text is shorter than when the checkpoint was written",
                do="bring the files back, or delete the checkpoint to start afresh",
            )
        self._position = position

    def close(self) -> None:
        """Nobody ever waits for it."""

    def _start_pass(self, number: int) -> None:
        digest = hashlib.sha256(f"{self._seed}/{self._reader}/{number}".encode()).digest()
        # RandomState and not default_rng: numpy promises never to change its draws, so checkpoints outlive upgrades
        random = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
        spare = len(self._tokens) - self._length
        offset = int(random.randint(min(self._length, spare + 1)))
        self._starts = offset + self._length * random.permutation((len(self._tokens) - offset) // self._length)
        self._pass, self._position = number, 0


def held_out_batches(tokens: torch.Tensor, *, sequence_length: int, num_sequences_max: int) -> Batch:
    """At most `num_sequences_max` windows, spread evenly over `tokens`.

    The same ones on each machine that has the same text.
    Raises ConfigError where the held-out text is shorter than one sequence.
    """
    _check_length(tokens, sequence_length)
    windows = len(tokens) // sequence_length
    count = min(windows, num_sequences_max)
    return _windows(tokens, [index * windows // count * sequence_length for index in range(count)], sequence_length)


def _windows(tokens: torch.Tensor, starts: list[int], length: int) -> Batch:
    return Batch(torch.stack([tokens[start : start + length].long() for start in starts]))


def _check_length(tokens: torch.Tensor, sequence_length: int) -> None:
    if len(tokens) < sequence_length:
        raise ConfigError(
            "the text is shorter than one sequence",
            why=f"{len(tokens)} tokens, train.sequence_length is {sequence_length}",
            do="use more text, hold out a larger part of it (data.held_out_percent), or set a shorter sequence_length",
        )
