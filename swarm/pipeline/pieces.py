"""How many sequences of a microbatch are computed at once: all, or ever fewer after memory has run out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class Pieces:
    def __init__(self) -> None:
        self.at_once: int | None = None
        """sequences, at most; None: memory has never run out"""
        self.warn: Callable[[str], None] = lambda text: None
        """gets what a person should know"""

    def as_it_fits(self, sequences: int, compute: Callable[[int], T]) -> T:
        """`compute(sequences at once)`, with half as many each time that memory runs out, and with no more from then
        on. Raises torch.OutOfMemoryError where one is too much."""
        while True:
            at_once = min(sequences, self.at_once or sequences)
            try:
                return compute(at_once)
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
            # not above: the exception holds on to what the attempt had in memory
            self.at_once = at_once // 2
            torch.cuda.empty_cache()
            self.warn(f"out of memory: going on with {self.at_once} of a microbatch's sequences at once")


def spans(sequences: int, at_once: int) -> list[slice]:
    return [slice(first, min(first + at_once, sequences)) for first in range(0, sequences, at_once)]


def share(span: slice, sequences: int) -> float:
    """Of a mean over all sequences, which are equally long."""
    length: int = span.stop - span.start
    return length / sequences
