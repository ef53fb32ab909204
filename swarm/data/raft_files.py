"""RAFT's labelled rows from where they are: a folder in the form in which ought/raft is published, or the hub.

    FOLDER/[data/]TASK/train.csv, task.json       the repository's own files: labels as text; task.json lists them all
    FOLDER/TASK/train/0000.parquet                the hub's revision refs/convert/parquet: labels as numbers, named
    FOLDER/TASK/train-00000-of-00001.parquet      in the file's own schema
    FOLDER/prompt_construction_settings.jsonl     instructions and order of fields, of oughtinc/raft-baselines (raft.py)

The data set's own loading is a script, which `datasets` runs no more; its parquet revision is what loads today.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import load_dataset

from swarm.data.raft import FIELDS, LABEL, TASKS, UNLABELLED, Row, Task, row_text
from swarm.errors import ConfigError

HUB, HUB_REVISION = "ought/raft", "refs/convert/parquet"
SETTINGS = ("prompt_construction_settings.jsonl", "prompt_construction_settings.json")
Table = tuple[list[dict[str, Any]], list[str]]
"""rows, whose label is text; and all labels there are, empty where the source does not say"""


def read_tasks(source: str, *, names: Sequence[str] = (), say: Callable[[str], None]) -> list[Task]:
    """The tasks found in a folder, or at the hub (`source` is "ought/raft"); `names`: only those.

    `say` gets what makes the scores others than HELM's: tasks or instructions that are missing.
    Raises ConfigError: no such folder or task, nothing of RAFT in it, files that are not in the form above.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ConfigError(f"RAFT has no task {unknown[0]!r}", why=f"it has {', '.join(TASKS)}", do="choose from these")
    folder = Path(source).expanduser()
    if source != HUB and not folder.is_dir():
        raise ConfigError(
            f"no folder {folder}", why="RAFT is read from a folder or from the hub",
            do=f"give a folder that holds TASK/train.csv or TASK/train/0000.parquet, or {HUB} for the hub",
        )
    fields, instructions = _settings(folder) if source != HUB else ({}, {})
    tasks = []
    for name in names or TASKS:
        table = _from_hub(name) if source == HUB else _from_folder(folder, name)
        if table is not None:
            tasks.append(_task(name, table, fields.get(name, FIELDS[name]), instructions.get(name, "")))
    if not tasks:
        raise ConfigError(
            f"{folder} holds nothing of RAFT", why=f"there is no {(names or TASKS)[0]}/train.csv or .parquet in it",
            do="download the data set ought/raft (revision refs/convert/parquet) into it",
        )
    missing = [name for name in names or TASKS if name not in {task.name for task in tasks}]
    if missing:
        say(f"not in {folder}: {', '.join(missing)}")
    without = [task.name for task in tasks if not task.instructions]
    if without:
        say(
            f"prompts of {len(without)} tasks open with their labels only, which is not HELM's protocol: put "
            f"{SETTINGS[0]} of github.com/oughtinc/raft-baselines into the folder"
        )
    return tasks


def _task(name: str, table: Table, fields: Sequence[str], instructions: str) -> Task:
    rows, labels = table
    found = []
    for number, values in enumerate(rows, start=1):
        missing = [field for field in (*fields, LABEL) if field not in values]
        if missing:
            raise ConfigError(
                f"RAFT's {name} has no column {missing[0]!r}", why=f"its columns are: {', '.join(map(str, values))}",
                do="use the files as they are published, or correct the order of fields in the settings file",
            )
        if not isinstance(values[LABEL], str) or values[LABEL] in ("", UNLABELLED):
            raise ConfigError(
                f"row {number} of RAFT's {name} has no label", why="the test rows are published without",
                do="use the labelled rows: the split that is called train",
            )
        found.append(Row(row_text(fields, values), values[LABEL]))
    if len(found) < 2:
        why = "some are shown, the others asked"
        raise ConfigError(f"RAFT's {name} has {len(found)} rows", why=why, do="use all 50")
    labels = labels or sorted({row.label for row in found})
    return Task(name, tuple(found), tuple(labels), instructions)


def _from_folder(folder: Path, name: str) -> Table | None:
    for base in (folder / name, folder / "data" / name):
        patterns = ("train/*.parquet", "train*.parquet", "raft-train*.parquet")
        parquet = sorted(path for pattern in patterns for path in base.glob(pattern))
        if parquet:
            tables = [_parquet(path) for path in parquet]
            return [row for rows, _ in tables for row in rows], tables[0][1]
        if (base / "train.csv").is_file():
            return _csv(base / "train.csv"), _listed(base / "task.json")
    return None


def _csv(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}", why=str(error), do="download it again") from None
    if any(None in row or None in row.values() for row in rows):
        raise ConfigError(f"{path} is not a table", why="its rows differ in length", do="download it again")
    return rows


def _listed(path: Path) -> list[str]:
    """The labels that task.json lists; without the file, none."""
    if not path.is_file():
        return []
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["label_columns"][LABEL]
        return [str(label) for label in labels if label != UNLABELLED]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read the labels in {path}", why=repr(error), do="download it again") from None


def _parquet(path: Path) -> Table:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows, schema = file.read().to_pylist(), file.schema_arrow
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(f"{path} is not parquet", why=str(error).splitlines()[0], do="download it again") from None
    try:  # where `datasets` keeps the names of a ClassLabel
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = list(features[LABEL]["names"])
    except (KeyError, TypeError, ValueError):
        names = []
    return _named(rows, names, str(path))


def _from_hub(name: str) -> Table:
    try:
        dataset = load_dataset(HUB, name, split="train", revision=HUB_REVISION)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot load RAFT's {name} from the hub", why=(str(error) or type(error).__name__).splitlines()[0],
            do="check the internet connection, or give a folder with its files",
        ) from None
    return _named(dataset.to_list(), list(getattr(dataset.features.get(LABEL), "names", [])), f"{HUB}, {name}")


def _named(rows: list[dict[str, Any]], names: Sequence[str], where: str) -> Table:
    """Numbers of labels into their names."""
    for row in rows:
        number = row.get(LABEL)
        if isinstance(number, int):
            if not 0 <= number < len(names):
                raise ConfigError(
                    f"{where}: a label has no name", why=f"{number}, of {len(names)} names in its schema",
                    do="use the parquet files of the hub, which hold the names, or the csv files",
                )
            row[LABEL] = names[number]
    return rows, [label for label in names if label != UNLABELLED]


def _settings(folder: Path) -> tuple[Mapping[str, Sequence[str]], Mapping[str, str]]:
    """(task -> order of fields, task -> instructions); nothing where the file is not there."""
    path = next((folder / name for name in SETTINGS if (folder / name).is_file()), None)
    if path is None:
        return {}, {}
    try:
        fields, instructions = (json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n"))
        ordered = {str(name): [str(field) for field in order] for name, order in fields.items()}
        return ordered, {str(name): str(text) for name, text in instructions.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read", why=f"{error}: it has two lines of JSON, fields and instructions, by task",
            do="download it again",
        ) from None
