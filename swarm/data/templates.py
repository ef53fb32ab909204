"""How a task is put to the model: solved examples, then the one that is asked, in wordings drawn anew for each.

The wordings are those that GPT-JT was trained with (the loaders of https://github.com/DS3Lab/CocktailSGD): separators
and words before an answer vary, so that a model learns the task and not the layout. Of Natural-Instructions the
definition stands first two times in three, and the list of labels every second time where there are few of them.
All randomness comes from the dice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from swarm.data.sample import Sample

BETWEEN_EXAMPLES = ("\n", "\n\n", "\n\n", "\n\n\n", "\n###\n", "\n---\n")
BEFORE_ANSWER = ("\n", "\n", "\n\n", " ")
ANSWER_WORDS = ("Output:", "Output:", "Ans:", "A:", "Answer:", "Label:", "Label:")
INPUT_WORDS = ("Input: ", "Given: ", "Context: ", "Example: ", "Question: ", "", "", "", "", "")
"""of Natural-Instructions; P3's prompts have their own words"""
DEFINITIONS, LABELS = 2 / 3, 1 / 2
"""how often they are there"""
MAX_LABELS = 10
EXAMPLES_A_LABEL = 3
"""fewer, and the answers are no labels, just few"""


class Pack(NamedTuple):
    """Samples of one task: the last is asked, those before it are shown with their answers. Of text a document."""

    samples: tuple[Sample, ...]
    labels: tuple[str, ...] = ()
    """all answers of the task, in order, where they are few"""


def packs(samples: Sequence[Sample], dice: np.random.RandomState, *, shots: int, room_chars: int) -> list[Pack]:
    """Each sample in exactly one pack, packs in random order. Tasks are never mixed in one.

    `shots`: at most so many solved examples in one, how many is drawn for each; `room_chars`: about as long as a pack
    may be, where one sample is not longer than that already.
    """
    made: list[Pack] = []
    tasks: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.prompt:
            tasks[sample.task].append(sample)
        else:
            made.append(Pack((sample,)))
    for members in tasks.values():
        labels = labels_of(members)
        room = room_chars - len(members[0].definition) - sum(len(label) + 4 for label in labels)
        order = dice.permutation(len(members))
        sizes = dice.randint(1, shots + 2, size=len(members))  # more than are needed, so that they are one draw
        first = 0
        for size in sizes:
            if first == len(members):
                break
            taken, chars = [members[order[first]]], _chars(members[order[first]])
            for index in order[first + 1 : first + size]:
                chars += _chars(members[index])
                if chars > room:
                    break
                taken.append(members[index])
            first += len(taken)
            made.append(Pack(tuple(reversed(taken)), labels))
    return [made[index] for index in dice.permutation(len(made))]


def labels_of(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The answers of a task, sorted, if it is one of a few classes; else none."""
    seen: set[str] = set()
    for sample in samples:
        seen.add(sample.text)
        if len(seen) > MAX_LABELS:
            return ()
    return tuple(sorted(seen)) if 2 <= len(seen) and len(seen) * EXAMPLES_A_LABEL <= len(samples) else ()


def put(pack: Pack, dice: np.random.RandomState) -> tuple[str, str]:
    """(prompt, answer); of text ("", text). The answer takes the space before it along: tokenizers join the two."""
    asked = pack.samples[-1]
    if not asked.prompt:
        return "", asked.text
    is_instruction = bool(asked.definition)
    between, before = _one_of(BETWEEN_EXAMPLES, dice), _one_of(BEFORE_ANSWER, dice)
    words, given = _one_of(ANSWER_WORDS, dice), _one_of(INPUT_WORDS, dice)
    definition_drawn, labels_drawn = dice.random_sample() < DEFINITIONS, dice.random_sample() < LABELS
    head = asked.definition if definition_drawn else ""
    if is_instruction and pack.labels and labels_drawn:
        numbered = "".join(f"\n{number}. {label}" for number, label in enumerate(pack.labels, 1))
        head += f"\nPossible labels:{numbered}\n"
    parts = [head.strip("\n")] if head else []
    for sample in pack.samples:
        question = (given if is_instruction else "") + sample.prompt.rstrip()
        lead = question if question.endswith(":") and not is_instruction else question + before + words
        parts.append(lead if sample is asked else f"{lead} {sample.text.strip()}")
    return between.join(parts), " " + asked.text.strip()


def _one_of(choices: Sequence[str], dice: np.random.RandomState) -> str:
    return choices[dice.randint(len(choices))]


def _chars(sample: Sample) -> int:
    return len(sample.prompt) + len(sample.text) + 16  # and the words between
