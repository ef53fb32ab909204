"""RAFT, eleven real classification tasks with 50 labelled examples each, asked as HELM asks them.

RAFT: https://arxiv.org/abs/2109.14076; HELM: https://arxiv.org/abs/2211.09110, scenario `raft`. The test labels are
hidden, so HELM divides the 50: 10 to show, 40 to ask. Each of three trials shows 5 of the 10, as balanced as they
allow; the answer is what the model writes up to the end of the line, at most 30 tokens.

Rows come from the data set as it is published (raft_files.py). The instructions that open each prompt are published
beside it, in `prompt_construction_settings.jsonl` of github.com/oughtinc/raft-baselines: two lines of JSON, the order
of the fields and the instructions, by task. Without that file prompts open with the labels only, and the score is not
HELM's.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

FIELDS: Mapping[str, tuple[str, ...]] = {
    "ade_corpus_v2": ("Sentence",),
    "banking_77": ("Query",),
    "neurips_impact_statement_risks": ("Impact statement", "Paper title"),
    "one_stop_english": ("Article",),
    "overruling": ("Sentence",),
    "semiconductor_org_types": ("Organization name", "Paper title"),
    "systematic_review_inclusion": ("Title", "Abstract", "Journal"),
    "tai_safety_research": ("Title", "Abstract Note", "Publication Title", "Item Type", "Publication Year"),
    "terms_of_service": ("Sentence",),
    "tweet_eval_hate": ("Tweet",),
    "twitter_complaints": ("Tweet text",),
}
"""task -> its columns in the order in which prompts show them"""
TASKS = tuple(FIELDS)
LABEL, UNLABELLED = "Label", "Unlabeled"

SHOWN_MAX, TRIALS, ANSWER_TOKENS_MAX = 5, 3, 30
SPLIT_SEED, ASKED_SHARE = 42, 0.8

OVERLAP = (
    "P3 and Natural-Instructions hold examples of tasks that RAFT and HELM test (banking77, tweet_eval_hate and others)"
    ": a model that was trained on them has seen some of what it is asked here"
)


@dataclass(frozen=True)
class Row:
    text: str
    """"Field: value" lines"""
    label: str


@dataclass(frozen=True)
class Task:
    name: str
    rows: tuple[Row, ...]
    """in the order of the data set"""
    labels: tuple[str, ...]
    """all there are, in their order"""
    instructions: str = ""
    """as published; empty: not at hand"""


@dataclass(frozen=True)
class Prompt:
    """What is asked, in pieces, so that examples can be left out where there is no room."""

    head: str
    examples: tuple[str, ...]
    asked: str

    def text(self, num_examples: int | None = None) -> str:
        """With all of its examples or so many of the first."""
        return "\n".join([self.head, *self.examples[:num_examples], self.asked])


@dataclass(frozen=True)
class Question:
    prompt: Prompt
    right: str
    trial: int


def split(task: Task) -> tuple[list[Row], list[Row]]:
    """(to show, to ask): HELM's, which is `datasets`' `train_test_split(test_size=0.8, seed=42)`."""
    asked = int(np.ceil(ASKED_SHARE * len(task.rows)))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(task.rows))
    return [task.rows[index] for index in order[asked:]], [task.rows[index] for index in order[:asked]]


def shown(rows: Sequence[Row], trial: int) -> list[Row]:
    """Up to five examples for a trial, drawn as HELM does: one of each label in turn, the commonest label first."""
    dice = random.Random(trial)
    by_label: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    by_count: defaultdict[int, list[str]] = defaultdict(list)
    for label in sorted(by_label):
        by_count[len(by_label[label])].append(label)
    order: list[str] = []
    for count in sorted(by_count, reverse=True):
        dice.shuffle(by_count[count])
        order += by_count[count]
    found: list[Row] = []
    for label in cycle(order):
        if len(found) == min(SHOWN_MAX, len(rows)):
            break
        if by_label[label]:
            found.append(by_label[label].pop(dice.randrange(len(by_label[label]))))
    return found


def questions(task: Task) -> Iterator[Question]:
    """120 of a task with 50 rows: 40 in each of three trials."""
    examples, asked = split(task)
    for trial in range(TRIALS):
        before = tuple(f"{row.text}\n{LABEL}: {row.label}\n" for row in shown(examples, trial))
        for row in asked:
            yield Question(Prompt(head(task), before, f"{row.text}\n{LABEL}:"), row.label, trial)


def head(task: Task) -> str:
    """What a prompt begins with: instructions and the numbered labels. HELM's copies of the instructions have the
    labels in them already."""
    listed = "Possible labels:\n" + "".join(f"{number}. {label}\n" for number, label in enumerate(task.labels, start=1))
    published = task.instructions.rstrip()
    if "Possible labels:" in published:
        return published + "\n"
    return f"{published}\n{listed}" if published else listed


def row_text(fields: Sequence[str], values: Mapping[str, object]) -> str:
    """A row as prompts show it. A value that is None is empty."""
    return "\n".join(f"{field}: {'' if values[field] is None else values[field]}" for field in fields)
