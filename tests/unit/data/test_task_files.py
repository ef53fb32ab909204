"""Natural-Instructions as its repository has it, and a JSON of chains of thought."""

from __future__ import annotations

import json

import pytest

from swarm.data.sample import Sample
from swarm.data.task_files import read_subjects, read_task, task_paths
from swarm.errors import ConfigError
from tests.unit.data.task_sets import write_instructions

TASKS = {"task001_add": [("1 1", "2"), ("2 2", "4")], "task002_say": [("a", "A")], "task003_test": [("x", "y")]}


def test_a_task_s_instances_are_samples(tmp_path):
    folder = write_instructions(tmp_path / "ni", TASKS)
    assert list(read_task(folder / "tasks" / "task001_add.json")) == [
        Sample("task001_add#task001_add-0", "2", "1 1", "task001_add", "Do task001_add."),
        Sample("task001_add#task001_add-1", "4", "2 2", "task001_add", "Do task001_add."),
    ]


def test_only_tasks_for_training_are_read(tmp_path):
    folder = write_instructions(tmp_path / "ni", TASKS, train=["task002_say", "task001_add", ""])
    assert [path.stem for path in task_paths(folder)] == ["task001_add", "task002_say"]
    assert len(task_paths(write_instructions(tmp_path / "all", TASKS))) == 3


def test_a_task_that_is_named_and_not_there(tmp_path):
    folder = write_instructions(tmp_path / "ni", TASKS, train=["task001_add", "task999_gone"])
    with pytest.raises(ConfigError, match="train_tasks") as caught:
        task_paths(folder)
    assert "task999_gone" in caught.value.why


def test_a_folder_that_is_something_else(tmp_path):
    with pytest.raises(ConfigError, match="holds no Natural-Instructions") as caught:
        task_paths(tmp_path)
    assert "clone" in caught.value.do


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "not one JSON object"),
        ("{", "is not JSON"),
        ('{"Definition": ["a"], "Examples": []}', "found: Definition, Examples"),
        ('{"Definition": 3, "Instances": []}', "is no Natural-Instructions task"),
        ('{"Definition": [3], "Instances": []}', "is no Natural-Instructions task"),
        ('{"Definition": "a", "Instances": [{"input": "x"}]}', "instance 0"),
        ('{"Definition": "a", "Instances": [{"input": "x", "output": []}]}', "instance 0"),
        ('{"Definition": "a", "Instances": [{"input": "x", "output": ["y"]}, 3]}', "instance 1"),
    ],
)
def test_a_task_that_is_not_as_it_should_be(content, says, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        list(read_task(tmp_path / "t.json"))
    assert says in str(caught.value) and str(tmp_path / "t.json") in str(caught.value)


def test_older_files_have_one_definition_and_answers_that_are_no_lists(tmp_path):
    document = {"Definition": "Add.", "Instances": [{"input": "1 1", "output": "2"}]}
    (tmp_path / "t.json").write_text(json.dumps(document))
    assert list(read_task(tmp_path / "t.json")) == [Sample("t#0", "2", "1 1", "t", "Add.")]


def test_each_subject_is_a_document(tmp_path):
    (tmp_path / "mmlu-cot.json").write_text(json.dumps({"law": "Q: x\nA: so y.", "half": "\ud83d"}))
    assert list(read_subjects(tmp_path / "mmlu-cot.json")) == [
        Sample("mmlu-cot.json#law", "Q: x\nA: so y."), Sample("mmlu-cot.json#half", "?"),
    ]  # fmt: skip


def test_a_subject_that_is_no_text(tmp_path):
    (tmp_path / "c.json").write_text('{"law": ["Q"]}')
    with pytest.raises(ConfigError, match="'law' is not text"):
        list(read_subjects(tmp_path / "c.json"))
