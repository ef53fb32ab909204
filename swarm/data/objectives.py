"""What is learnt from a text: how a document becomes examples. (Signatures; being written.)"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from swarm.data.marks import Marks

Ids = np.ndarray[Any, Any]


class Example(NamedTuple):
    tokens: Ids
    """int32 [n], n >= 1, at most a row"""
    prefix: int
    """so many first tokens see each other, and no loss is taken of them"""


class Objective(Protocol):
    def examples(self, text: Ids, dice: np.random.RandomState, *, prompt: int = 0) -> list[Example]:
        """Of one document, or one task example, without end-of-text: integer ids [tokens]. Empty for an empty text.
        `prompt`: its first tokens are the input of a task (0: plain text). The same for the same dice."""


def make_objective(name: str, *, sequence_length: int, marks: Marks) -> Objective:
    """`name`: causal, prefix, ul2 or ul2r. Raises ConfigError: unknown, rows too short, marks missing."""
    raise NotImplementedError


def needs_segments(name: str) -> bool:
    """Whether rows of this objective need a mask of their own: a model that ignores it cannot learn from them."""
    raise NotImplementedError
