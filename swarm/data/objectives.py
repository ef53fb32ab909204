"""What is learnt from a text: how a document becomes examples.

causal   every token from those before it
prefix   prefix-LM: a text is split at a random place (a task at the end of its prompt); what comes first sees itself
         and is given, the rest is learnt
ul2, ul2r   hidden spans, and prefix-LM: denoising.py

A document longer than a row is cut into windows. Its last example ends with end-of-text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swarm.data.denoising import UL2, UL2R, Denoising
from swarm.data.example import Example, Ids, Objective, fit
from swarm.data.marks import Marks
from swarm.errors import ConfigError

MIXTURES = {"ul2": UL2, "ul2r": UL2R}
NAMES = ("causal", "prefix", *MIXTURES)
MIN_LENGTH = 8
MIN_SENTINELS = 8
"""fewer would cut texts into pieces of a few words"""


@dataclass(frozen=True)
class Causal:
    length: int
    """of the longest example"""
    end: int

    def examples(self, text: Ids, dice: np.random.RandomState, *, prompt: int = 0) -> list[Example]:
        return [Example(window, 0) for window in _windows(text, self.end, self.length)]


@dataclass(frozen=True)
class PrefixLM:
    length: int
    end: int

    def examples(self, text: Ids, dice: np.random.RandomState, *, prompt: int = 0) -> list[Example]:
        if prompt and len(text):
            text, prompt, ends = fit(text, prompt, self.length - 1)
            return [Example(_ended(text, self.end) if ends else text.astype(np.int32), prompt)]
        windows = _windows(text, self.end, self.length)
        return [Example(window, int(dice.randint(1, len(window)))) for window in windows]


def make_objective(name: str, *, sequence_length: int, marks: Marks) -> Objective:
    """`name`: one of NAMES. Raises ConfigError: unknown, rows too short, a vocabulary without room for the marks."""
    if name not in NAMES:
        raise ConfigError(f"no objective {name!r}", why=f"there are {', '.join(NAMES)}", do="correct `objective`")
    if sequence_length < MIN_LENGTH:
        raise ConfigError(
            f"sequences of {sequence_length} tokens are too short", why=f"examples need {MIN_LENGTH}",
            do="set a longer train.sequence_length",
        )
    if name not in MIXTURES:
        return (Causal if name == "causal" else PrefixLM)(sequence_length, marks.end)
    if not marks.modes or len(marks.sentinels) < MIN_SENTINELS:
        raise ConfigError(
            f"the vocabulary has no room for what {name} marks",
            why=f"it needs 3 modes and {MIN_SENTINELS} or more sentinels (64 are good) on rows of the embedding that no"
            f" token uses; there are {len(marks.modes) + len(marks.sentinels)}",
            do="set a larger vocab_size in model.config, or another objective",
        )
    return Denoising(MIXTURES[name], length=sequence_length, marks=marks)


def needs_segments(name: str) -> bool:
    """Whether rows of this objective need a mask of their own, so that a model that ignores masks cannot learn from
    them (model/families.py: `check_segments`). Causal ones do too where documents are packed and kept apart."""
    return name != "causal"


def _windows(text: Ids, end: int, length: int) -> list[Ids]:
    """int32 pieces of the text and its end; a last one that would be the end alone is left out."""
    if not len(text):
        return []
    whole = _ended(text, end)
    pieces = [whole[first : first + length] for first in range(0, len(whole), length)]
    return pieces if len(pieces[-1]) > 1 else pieces[:-1]


def _ended(text: Ids, end: int) -> Ids:
    whole = np.empty(len(text) + 1, dtype=np.int32)
    whole[:-1], whole[-1] = text, end
    return whole
