"""Prompts, split and drawing of examples are HELM's: against `datasets` itself, and cases worked out by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data.raft import FIELDS, TASKS, Prompt, Row, Task, head, questions, row_text, shown, split
from tests.unit.data.raft_support import LABELS, as_dataset, made_up


def task(name: str = "ade_corpus_v2", *, rows: int = 50, instructions: str = "") -> Task:
    found = made_up(name, rows=rows)
    return Task(name, tuple(Row(row_text(FIELDS[name], row), row["Label"]) for row in found), LABELS, instructions)


def test_there_are_eleven_tasks() -> None:
    assert len(TASKS) == 11 and all(FIELDS[name] for name in TASKS)
    assert not {"Label", "ID"} & {field for fields in FIELDS.values() for field in fields}


def test_the_split_is_that_of_datasets() -> None:
    found = task()
    parts = as_dataset("ade_corpus_v2", made_up("ade_corpus_v2")).train_test_split(test_size=0.8, seed=42)
    to_show, to_ask = split(found)
    assert (len(to_show), len(to_ask)) == (10, 40)
    assert [row.text for row in to_show] == [f"Sentence: {row['Sentence']}" for row in parts["train"]]
    assert [row.text for row in to_ask] == [f"Sentence: {row['Sentence']}" for row in parts["test"]]
    assert not set(to_show) & set(to_ask)


def test_the_first_prompt_in_full() -> None:
    found = task(instructions="Say what the sentence is about.")
    first = next(questions(found))
    to_show, to_ask = split(found)
    lines = first.prompt.text().split("\n")
    listed = ["Possible labels:", "1. ADE-related", "2. not ADE-related", ""]
    assert lines[:5] == ["Say what the sentence is about.", *listed]
    assert lines[-2:] == [to_ask[0].text, "Label:"], "and no space after it"
    shots = first.prompt.text().split("\n\n")[1:-1]
    assert len(shots) == 5 and set(shots) <= {f"{row.text}\nLabel: {row.label}" for row in to_show}
    assert first.right == to_ask[0].label


def test_three_trials_of_forty_questions_each_with_examples_of_its_own() -> None:
    found = list(questions(task()))
    assert len(found) == 120 and [question.trial for question in found] == [0] * 40 + [1] * 40 + [2] * 40
    examples = [{question.prompt.examples for question in found if question.trial == trial} for trial in range(3)]
    assert all(len(each) == 1 for each in examples), "one choice a trial"
    assert len(set.union(*examples)) == 3
    asked = [[question.prompt.asked for question in found if question.trial == trial] for trial in range(3)]
    assert asked[0] == asked[1] == asked[2] and len(set(asked[0])) == 40


def test_examples_are_drawn_as_helm_does() -> None:
    """Worked out from its rule: labels by their number of rows, ties shuffled, one row of each label in turn."""
    rows = [Row(f"r{index}", label) for index, label in enumerate("aaabbcd")]
    for trial in range(5):
        dice = random.Random(trial)
        alone = ["c", "d"]  # the order in which ties are shuffled: 3 rows (a), 2 rows (b), 1 row (c, d)
        for labels in (["a"], ["b"], alone):
            dice.shuffle(labels)
        of = {label: [row for row in rows if row.label == label] for label in "abcd"}
        wanted = [of[label].pop(dice.randrange(len(of[label]))) for label in ["a", "b", *alone, "a"]]
        assert shown(rows, trial) == wanted


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=15), st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_examples_are_balanced_and_none_is_shown_twice(labels: list[str], trial: int) -> None:
    rows = [Row(f"r{index}", label) for index, label in enumerate(labels)]
    found = shown(rows, trial)
    assert len(found) == min(5, len(rows)) and len(set(found)) == len(found) and set(found) <= set(rows)
    assert shown(rows, trial) == found
    counts = {label: sum(row.label == label for row in found) for label in labels}
    for label, count in counts.items():  # nobody has two more than somebody who has rows left
        assert all(count <= other + 1 or other == labels.count(name) for name, other in counts.items()), label
    assert len({row.label for row in found}) == min(5, len(set(labels)))


def test_instructions_that_have_the_labels_in_them_are_left_as_they_are() -> None:
    published = "Classify.\nPossible labels:\n1. x\n2. y\n"
    assert head(task(instructions=published)) == published
    assert head(task()) == "Possible labels:\n1. ADE-related\n2. not ADE-related\n"


def test_examples_are_left_out_from_the_end() -> None:
    prompt = Prompt("head\n", ("one\n", "two\n", "three\n"), "asked")
    assert prompt.text() == prompt.text(3) == "head\n\none\n\ntwo\n\nthree\n\nasked"
    assert prompt.text(1) == "head\n\none\n\nasked" and prompt.text(0) == "head\n\nasked"


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_fewer_rows_are_divided_alike(rows: int) -> None:
    to_show, to_ask = split(task(rows=rows))
    assert len(to_show) + len(to_ask) == rows and to_ask
    assert len(list(questions(task(rows=rows)))) == 3 * len(to_ask)


def test_a_row_is_a_line_for_each_field_in_their_order() -> None:
    values = {"Paper title": "P", "Impact statement": None, "Label": "x"}
    assert row_text(FIELDS["neurips_impact_statement_risks"], values) == "Impact statement: \nPaper title: P"
