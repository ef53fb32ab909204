"""Rows of task data sets as samples: which columns hold what.

| format | columns |
|---|---|
| text | the run's `text_field` |
| p3 (https://arxiv.org/abs/2110.08207) | inputs, targets; or inputs_pretokenized, targets_pretokenized |
| natural-instructions, flat (https://arxiv.org/abs/2204.07705) | definition, inputs, targets; task_name, id |
| cot, as rows | inputs, targets |

A column that says which task a row is of is used where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swarm.data.files import clean_text, missing_field
from swarm.data.sample import Sample
from swarm.errors import ConfigError

PAIRS = (("inputs_pretokenized", "targets_pretokenized"), ("inputs", "targets"))
"""the first pair that is there: bigscience/P3 has token ids of another model under the plain names"""
TASK_COLUMNS = ("task_name", "task", "dataset")


@dataclass(frozen=True)
class Columns:
    """Names of columns; "" where there is none."""

    text: str
    prompt: str = ""
    task: str = ""
    definition: str = ""
    name: str = ""

    def wanted(self) -> list[str]:
        return [name for name in (self.text, self.prompt, self.task, self.definition, self.name) if name]


def find_columns(kind: str, fields: Sequence[str], where: str, *, text_field: str) -> Columns:
    """`kind`: the source's format; `fields`: the columns that are there. Raises ConfigError that lists them."""
    if kind == "text":
        if text_field not in fields:
            raise missing_field(where, text_field, ", ".join(fields))
        return Columns(text=text_field)
    pair = next((pair for pair in PAIRS if all(name in fields for name in pair)), None)
    is_flat = kind == "natural-instructions"
    if pair is None or (is_flat and "definition" not in fields):
        need = "definition, inputs and targets" if is_flat else "inputs and targets"
        raise ConfigError(
            f"{where}: these are not rows of format {kind}",
            why=f"they need {need}; the columns found are: {', '.join(map(str, fields)) or 'none'}",
            do="choose the format that they have (text, p3, natural-instructions, cot), or rename the columns",
        )
    task = next((name for name in TASK_COLUMNS if name in fields), "")
    identity = "id" if is_flat and "id" in fields else ""
    return Columns(pair[1], pair[0], task, "definition" if is_flat else "", identity)


def to_sample(columns: Columns, row: dict[str, Any], where: str, *, name: str, task: str) -> Sample:
    """`name`, `task`: where no column says so. Raises ConfigError for a value that is no text."""
    def get(column: str) -> str:
        value = row.get(column)
        if isinstance(value, list):  # several right answers: the first
            value = value[0] if value else None
        return clean_text(value, where, column)

    if not columns.prompt:
        return Sample(name, get(columns.text))
    definition = get(columns.definition) if columns.definition else ""
    task = get(columns.task) if columns.task else task
    # an id is unique in its task at most
    name = f"{task}/{row[columns.name]}" if columns.name and row.get(columns.name) else name
    return Sample(name, get(columns.text), get(columns.prompt), task, definition)
