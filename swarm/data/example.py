"""An example: one thing to learn from one text. What objectives make of documents, and what rows are packed of."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

Ids = np.ndarray[Any, Any]
"""token ids [tokens], of an integer type"""


class Example(NamedTuple):
    tokens: Ids
    """int32 [n], n >= 2 and at most a row"""
    prefix: int
    """so many first tokens see each other, and no loss is taken of them; fewer than n"""


class Objective(Protocol):
    def examples(self, text: Ids, dice: np.random.RandomState, *, prompt: int = 0) -> list[Example]:
        """Of one document or task, without end-of-text; none of an empty one. The same for the same dice.

        `prompt`: so many first tokens are what a task gives, and the others the answer (0: plain text)."""


def fit(text: Ids, prompt: int, room: int) -> tuple[Ids, int, bool]:
    """(text, prompt, whether its end is there) of a task in at most `room` tokens: what is too much is left out at the
    beginning of the prompt, down to half of the room, and then at the end of the answer."""
    prompt = min(prompt, len(text))
    skipped = min(max(0, len(text) - room), max(0, prompt - room // 2))
    part = text[skipped : skipped + room]
    return part, prompt - skipped, skipped + len(part) == len(text)
