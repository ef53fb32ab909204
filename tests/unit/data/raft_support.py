"""RAFT's files as they are published, with made-up rows: for tests here and in tests/unit/asking."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from swarm.data.raft import FIELDS

LABELS = ("ADE-related", "not ADE-related")
SETTINGS = "prompt_construction_settings.jsonl"


def made_up(task: str, *, rows: int = 50, labels: Sequence[str] = LABELS) -> list[dict[str, Any]]:
    return [
        {**{field: f"{field.lower()} number {row}, \"so\"" for field in FIELDS[task]},
         "Label": labels[row * row % 7 % len(labels)], "ID": row}
        for row in range(rows)
    ]


def write_csv(folder: Path, task: str, rows: Sequence[dict[str, Any]], labels: Sequence[str] | None = LABELS) -> None:
    (folder / task).mkdir(parents=True, exist_ok=True)
    with (folder / task / "train.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    if labels is not None:
        columns = {"data_columns": [*FIELDS[task], "ID"], "label_columns": {"Label": labels}}
        about = {"name": task, "description": "", **columns}
        (folder / task / "task.json").write_text(json.dumps(about))


def as_dataset(task: str, rows: Sequence[dict[str, Any]], labels: Sequence[str] = LABELS) -> Dataset:
    features = {**{field: Value("string") for field in FIELDS[task]}, "ID": Value("int32")}
    features["Label"] = ClassLabel(names=["Unlabeled", *labels])
    numbered = [{**row, "Label": labels.index(row["Label"]) + 1} for row in rows]
    return Dataset.from_list(numbered, features=Features(features))


def write_parquet(path: Path, task: str, rows: Sequence[dict[str, Any]], labels: Sequence[str] = LABELS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    as_dataset(task, rows, labels).to_parquet(path)


def write_settings(folder: Path, instructions: dict[str, str]) -> None:
    order = {task: list(fields) for task, fields in FIELDS.items()}
    (folder / SETTINGS).write_text(json.dumps(order) + "\n" + json.dumps(instructions) + "\n")
