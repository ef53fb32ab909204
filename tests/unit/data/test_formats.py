"""Columns of the published data sets become samples; others are refused with what was found."""

from __future__ import annotations

import pytest

from swarm.data.formats import Columns, find_columns, to_sample
from swarm.data.sample import Sample
from swarm.errors import ConfigError


def columns(kind, *fields):
    return find_columns(kind, fields, "a.jsonl", text_field="text")


def test_the_published_columns_are_known():
    assert columns("text", "text", "meta") == Columns("text")
    assert columns("p3", "inputs", "targets") == Columns("targets", "inputs")
    assert columns("cot", "targets", "inputs", "task") == Columns("targets", "inputs", "task")
    flat = columns("natural-instructions", "task_name", "id", "definition", "inputs", "targets")
    assert flat == Columns("targets", "inputs", "task_name", "definition", "id")
    assert set(flat.wanted()) == {"task_name", "id", "definition", "inputs", "targets"}


def test_words_come_before_token_ids_of_another_model():
    """bigscience/P3: inputs and targets are what T5's tokenizer made."""
    found = columns("p3", "inputs", "inputs_pretokenized", "targets", "targets_pretokenized", "idx")
    assert (found.prompt, found.text) == ("inputs_pretokenized", "targets_pretokenized")


@pytest.mark.parametrize(
    ("kind", "fields", "need"),
    [
        ("text", ["body", "title"], "no field 'text'"),
        ("p3", ["question", "answer"], "need inputs and targets"),
        ("p3", ["inputs"], "need inputs and targets"),
        ("cot", ["question", "rationale"], "need inputs and targets"),
        ("natural-instructions", ["inputs", "targets"], "need definition, inputs and targets"),
        ("p3", [], "columns found are: none"),
    ],
)
def test_other_columns_are_refused_with_those_that_were_found(kind, fields, need):
    with pytest.raises(ConfigError) as caught:
        columns(kind, *fields)
    text = str(caught.value)
    assert need in text and ", ".join(fields) in text and "a.jsonl" in text and caught.value.do


def sample(kind, row, **more):
    return to_sample(columns(kind, *row), row, "row 3", **{"name": "a#3", "task": "a", **more})


def test_rows_become_samples():
    assert sample("text", {"text": "hello", "meta": {"set": "x"}}) == Sample("a#3", "hello")
    assert sample("p3", {"inputs": "1+1?", "targets": "2"}) == Sample("a#3", "2", "1+1?", "a")
    row = {"task_name": "task7", "id": "task7-1", "definition": "Add.", "inputs": "1+1", "targets": "2"}
    assert sample("natural-instructions", row) == Sample("task7/task7-1", "2", "1+1", "task7", "Add.")
    assert sample("natural-instructions", {**row, "id": None}).name == "a#3"


def test_of_several_answers_the_first_is_taken():
    assert sample("p3", {"inputs": "x", "targets": ["yes", "yeah"]}).text == "yes"
    assert sample("p3", {"inputs": "x", "targets": []}).text == ""


def test_null_is_an_empty_text_and_half_an_emoji_is_mended():
    assert sample("p3", {"inputs": None, "targets": "\ud83d"}) == Sample("a#3", "?", "", "a")


@pytest.mark.parametrize("value", [3, {"a": 1}, [3], True])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ConfigError, match="row 3: 'targets' is not text"):
        sample("p3", {"inputs": "x", "targets": value})
