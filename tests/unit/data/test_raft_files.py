"""RAFT is read in each form in which it is published, to the same rows; what is no RAFT gets an error that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarm.data import raft_files
from swarm.data.raft import Task
from swarm.data.raft_files import read_tasks
from swarm.errors import ConfigError
from tests.unit.data.raft_support import LABELS, SETTINGS, made_up, write_csv, write_parquet, write_settings

ADE, NEURIPS = "ade_corpus_v2", "neurips_impact_statement_risks"


def read(folder: Path, *names: str) -> tuple[list[Task], list[str]]:
    notes: list[str] = []
    return read_tasks(str(folder), names=names, say=notes.append), notes


@pytest.mark.parametrize("place", ["train/0000.parquet", "train-00000-of-00001.parquet", "raft-train.parquet"])
def test_csv_and_parquet_say_the_same(tmp_path: Path, place: str) -> None:
    rows = made_up(ADE)
    write_csv(tmp_path / "csv", ADE, rows)
    write_csv(tmp_path / "deep" / "data", ADE, rows)
    write_parquet(tmp_path / "parquet" / ADE / place, ADE, rows)
    tables = [read(tmp_path / name, ADE)[0] for name in ("csv", "deep", "parquet")]
    assert tables[0] == tables[1] == tables[2]
    (task,) = tables[0]
    assert len(task.rows) == 50 and task.labels == LABELS and task.rows[3].label == rows[3]["Label"]
    assert task.rows[3].text == 'Sentence: sentence number 3, "so"'


def test_all_that_is_there_is_read_and_what_is_missing_is_said(tmp_path: Path) -> None:
    write_csv(tmp_path, NEURIPS, made_up(NEURIPS))
    write_csv(tmp_path, ADE, made_up(ADE))
    tasks, notes = read(tmp_path)
    assert [task.name for task in tasks] == [ADE, NEURIPS]
    assert "banking_77" in notes[0] and ADE not in notes[0]
    assert "labels only" in notes[1] and SETTINGS in notes[1], "it is not HELM's protocol without the instructions"


def test_published_instructions_and_order_of_fields_are_used(tmp_path: Path) -> None:
    write_csv(tmp_path, NEURIPS, made_up(NEURIPS))
    (tmp_path / SETTINGS).write_text(
        json.dumps({NEURIPS: ["Paper title", "Impact statement"]}) + "\n" + json.dumps({NEURIPS: "Do this."}) + "\n"
    )
    (task,), notes = read(tmp_path, NEURIPS)
    assert task.instructions == "Do this." and task.rows[0].text.startswith("Paper title: ") and notes == []


def test_without_a_list_the_labels_are_those_that_occur(tmp_path: Path) -> None:
    write_csv(tmp_path, ADE, made_up(ADE, labels=("zebra", "apple", "milk")), labels=None)
    assert read(tmp_path, ADE)[0][0].labels == ("apple", "milk", "zebra")


def test_the_hub_is_asked_for_the_revision_that_loads_today(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: object, **options: object) -> object:
        asked.append((arguments, options))
        raise OSError("offline")

    monkeypatch.setattr(raft_files, "load_dataset", load)
    with pytest.raises(ConfigError, match="from the hub") as caught:
        read_tasks("ought/raft", names=[ADE], say=print)
    assert asked == [(("ought/raft", ADE), {"split": "train", "revision": "refs/convert/parquet"})]
    assert "offline" in caught.value.why


def test_what_the_hub_gives_is_read_as_its_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.unit.data.raft_support import as_dataset

    monkeypatch.setattr(raft_files, "load_dataset", lambda *_, **__: as_dataset(ADE, made_up(ADE)))
    write_csv(tmp_path, ADE, made_up(ADE))
    assert read_tasks("ought/raft", names=[ADE], say=lambda _: None) == read(tmp_path, ADE)[0]


def wrong(folder: Path, problem: str) -> None:
    rows = made_up(ADE)
    if problem == "column":
        rows = [{"Text": "x", "Label": LABELS[0], "ID": 0}] * 3
    if problem == "unlabelled":
        rows[7]["Label"] = "Unlabeled"
    write_csv(folder, ADE, rows[:1] if problem == "one row" else rows)
    file = folder / ADE / "train.csv"
    if problem == "ragged":
        file.write_text('Sentence,Label,ID\n"a",ADE-related,0\nb\n')
    if problem == "bytes":
        file.write_bytes(b"Sentence,Label,ID\n\xff\xfe,ADE-related,0\n")
    if problem == "task.json":
        (folder / ADE / "task.json").write_text("{}")
    if problem == "settings":
        (folder / SETTINGS).write_text("not json")
    if problem == "parquet":
        (folder / ADE / "train.parquet").write_text("no parquet")
    if problem == "names":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"Sentence": ["a"], "Label": [1], "ID": [0]})
        pyarrow.parquet.write_table(table, folder / ADE / "train.parquet")


@pytest.mark.parametrize(("problem", "says"), [
    ("column", "no column 'Sentence'.*columns are: Text, Label"), ("unlabelled", "row 8 .*no label"),
    ("one row", "has 1 rows"), ("ragged", "not a table"), ("bytes", "cannot read"), ("task.json", "labels in"),
    ("settings", "two lines of JSON"), ("parquet", "not parquet"), ("names", "a label has no name"),
])
def test_what_is_wrong_with_the_files_is_said(tmp_path: Path, problem: str, says: str) -> None:
    import re

    wrong(tmp_path, problem)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, ADE)
    assert re.search(says, str(caught.value), re.DOTALL) and caught.value.do


def test_a_place_without_raft(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nothing of RAFT"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="no task 'mnist'"):
        read(tmp_path, "mnist")


def test_the_settings_of_all_tasks_can_be_written_and_read(tmp_path: Path) -> None:
    write_csv(tmp_path, ADE, made_up(ADE))
    write_settings(tmp_path, {ADE: "Hello."})
    assert read(tmp_path, ADE)[0][0].instructions == "Hello."
