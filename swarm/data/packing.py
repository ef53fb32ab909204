"""Rows of one length from examples of any length, which never see each other in them (batch.py: segments).

Some rows are open at a time, and an example goes into the one that it leaves least room in. Where none has room, the
fullest row is closed: a causal example is cut to fill it, any other stays whole and the row is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from swarm.data.batch import Batch, Segment
from swarm.data.example import Example, Ids
from swarm.errors import StateError

OPEN_ROWS = 16


class Row(NamedTuple):
    tokens: Ids
    """int32 [sequence_length]"""
    segments: tuple[Segment, ...]


@dataclass
class _Open:
    room: int
    examples: list[Example] = field(default_factory=list)


class Packer:
    """Deterministic: the rows follow from the examples and their order."""

    def __init__(self, sequence_length: int, pad: int, *, open_rows: int = OPEN_ROWS) -> None:
        """`pad`: the id that fills what stays empty, such as end-of-text."""
        self._length, self._pad, self._open_rows = sequence_length, pad, open_rows
        self._open: list[_Open] = []
        self.padded = 0
        """tokens of padding in all rows so far"""

    def add(self, example: Example) -> list[Row]:
        """Rows that are full now: often none. Raises ValueError for an example that is longer than a row."""
        size = len(example.tokens)
        if not 0 < size <= self._length:
            raise ValueError(f"an example of {size} tokens in rows of {self._length}")
        best = min((row for row in self._open if row.room >= size), key=lambda row: row.room, default=None)
        done: list[Row] = []
        if best is None and len(self._open) == self._open_rows:
            fullest = min(self._open, key=lambda row: row.room)
            room = fullest.room
            if example.prefix == 0 and room > 1 and size - room > 1:  # a single token teaches nothing
                done += self._put(fullest, Example(example.tokens[:room], 0))
                return done + self.add(Example(example.tokens[room:], 0))
            done.append(self._close(fullest))
        if best is None:
            best = _Open(self._length)
            self._open.append(best)
        return done + self._put(best, example)

    def rest(self) -> list[Row]:
        """What is still open, padded."""
        return [self._close(row) for row in list(self._open)]

    def state(self) -> dict[str, Any]:
        """JSON-able: what is in the open rows, each a list of [prefix, token ids]."""
        rows = [[[prefix, tokens.tolist()] for tokens, prefix in row.examples] for row in self._open]
        return {"rows": rows, "padded": self.padded}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state()` was taken. Raises StateError, and changes nothing, where it does not fit."""
        try:
            opened = [_Open(self._length, [_example(*pair) for pair in row]) for row in state["rows"]]
            for row in opened:
                row.room -= sum(len(example.tokens) for example in row.examples)
            padded = int(state["padded"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                "what was being packed is not valid", why=str(error), do="delete the checkpoint to start afresh"
            ) from None
        if len(opened) > self._open_rows or any(row.room < 1 for row in opened):
            raise StateError(
                "what was being packed does not fit", why=f"rows have {self._length} tokens now",
                do="delete the checkpoint to start afresh",
            )
        self._open, self.padded = opened, padded

    def _put(self, row: _Open, example: Example) -> list[Row]:
        row.examples.append(example)
        row.room -= len(example.tokens)
        return [] if row.room else [self._close(row)]

    def _close(self, row: _Open) -> Row:
        self._open = [other for other in self._open if other is not row]
        segments = [(example.prefix, len(example.tokens)) for example in row.examples]
        parts = [example.tokens for example in row.examples]
        if row.room:
            self.padded += row.room
            segments.append((row.room, row.room))
            parts.append(np.full(row.room, self._pad, dtype=np.int32))
        return Row(np.concatenate(parts), tuple(segments))


def to_batch(rows: Sequence[Row]) -> Batch:
    """At least one row. Where each is one causal segment, the batch has none, as one of a plain stream."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows])).long()
    plain = all(len(row.segments) == 1 and row.segments[0][0] <= 1 for row in rows)
    return Batch(tokens, None if plain else tuple(row.segments for row in rows))


def _example(prefix: object, tokens: object) -> Example:
    ids = np.array(tokens, dtype=np.int32)
    if type(prefix) is not int or ids.ndim != 1 or not 0 <= prefix <= len(ids):
        raise ValueError(f"no example: prefix {prefix!r}")
    return Example(ids, prefix)
