"""Rows of one length from examples of any length. (Signatures; being written.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from swarm.data.batch import Batch, Segment
from swarm.data.objectives import Example, Ids


class Row(NamedTuple):
    tokens: Ids
    """int32 [sequence_length]"""
    segments: tuple[Segment, ...]


class Packer:
    """Deterministic. `pad`: the id that fills what stays empty (the end of text)."""

    def __init__(self, sequence_length: int, pad: int, *, open_rows: int = 16) -> None:
        raise NotImplementedError

    def add(self, example: Example) -> list[Row]:
        """Rows that are full now: none, one, or two."""
        raise NotImplementedError

    def rest(self) -> list[Row]:
        """All that are still open, padded."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """JSON-able: what is in the open rows."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def to_batch(rows: Sequence[Row]) -> Batch:
    """Rows as a batch; its segments are None where all rows are one causal segment each."""
    raise NotImplementedError
