"""A batch of training sequences, each cut into segments that do not see each other.

A segment is one example of one document: of a plain stream the whole row, of packed tasks or UL2 examples several in a
row. (prefix, length): its first `prefix` tokens see each other, what comes after is causal, positions count from 0, and
a loss is taken of what comes after the prefix, the first token of all excepted, which nothing foretells. So (n, n) is a
segment that nothing is learnt from: padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Segment = tuple[int, int]
"""(prefix, length) in tokens, 0 <= prefix <= length, length >= 1"""


@dataclass(frozen=True, eq=False)
class Batch:
    tokens: torch.Tensor
    """int64 [sequences, length]"""
    segments: tuple[tuple[Segment, ...], ...] | None = None
    """of each row; their lengths add up to the row's. None: each row is one causal segment"""

    def __post_init__(self) -> None:
        if self.segments is None:
            return
        if len(self.segments) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} rows, and segments of {len(self.segments)}")
        length = self.tokens.shape[1]
        for row in self.segments:
            if sum(size for _, size in row) != length or any(not 0 <= prefix <= size >= 1 for prefix, size in row):
                raise ValueError(f"segments {row} do not make a row of {length} tokens")

    def __len__(self) -> int:
        """Sequences."""
        return len(self.tokens)

    def numel(self) -> int:
        """Tokens, padding too: what the books of a swarm count."""
        return self.tokens.numel()

    @property
    def num_targets(self) -> int:
        """Tokens that a loss is taken of."""
        if self.segments is None:
            return len(self.tokens) * (self.tokens.shape[1] - 1)
        return sum(num_targets(row) for row in self.segments)

    @property
    def num_segments(self) -> int:
        """In all rows together; 0 where there are none to tell of."""
        return sum(len(row) for row in self.segments or ())

    def split(self, sequences: int) -> list[Batch]:
        """Parts of so many sequences, the last one of what is left."""
        return [self.part(slice(first, first + sequences)) for first in range(0, len(self), sequences)]

    def part(self, rows: slice) -> Batch:
        return Batch(self.tokens[rows], None if self.segments is None else self.segments[rows])


def num_targets(row: Sequence[Segment]) -> int:
    """Tokens of a row with these segments that a loss is taken of."""
    return sum(length - max(1, prefix) for prefix, length in row if length > prefix)
