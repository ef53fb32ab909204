"""Task data sets that are not rows: Natural-Instructions as its repository has it, and chains of thought in one JSON.

    natural-instructions/splits/default/train_tasks.txt     names of tasks, one a line
    natural-instructions/tasks/task001_x.json               {Definition: [..], Instances: [{id, input, output: [..]}]}
    mmlu-cot.json                                           {subject: few-shot text with chains of thought}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swarm.data.sample import Sample
from swarm.errors import ConfigError

TRAIN_TASKS = "splits/default/train_tasks.txt"


def task_paths(folder: Path) -> list[Path]:
    """The tasks of a Natural-Instructions folder that are for training; all where it names none. Sorted.

    Raises ConfigError: no tasks/, a task that is named and not there.
    """
    tasks = sorted((folder / "tasks").glob("*.json"))
    if not tasks:
        raise ConfigError(
            f"{folder} holds no Natural-Instructions", why=f"there is no {folder / 'tasks'}/*.json",
            do="give the folder of a clone of allenai/natural-instructions",
        )
    split = folder / TRAIN_TASKS
    if not split.is_file():
        return tasks
    named = {line.strip() for line in split.read_text(encoding="utf-8").splitlines() if line.strip()}
    missing = named - {path.stem for path in tasks}
    if missing:
        raise ConfigError(
            f"{split} names tasks that are not there", why=f"{len(missing)} of them, such as {min(missing)}",
            do="fetch all of the folder",
        )
    return [path for path in tasks if path.stem in named]


def read_task(path: Path) -> Iterator[Sample]:
    """The instances of one Natural-Instructions task; the first answer of each. Raises ConfigError, OSError."""
    document = _load(path)
    definition, instances = document.get("Definition"), document.get("Instances")
    words = " ".join(definition) if isinstance(definition, list) and all(map(_is_text, definition)) else definition
    if not isinstance(instances, list) or not isinstance(words, str):
        raise ConfigError(
            f"{path} is no Natural-Instructions task",
            why=f"it needs Definition and Instances; found: {_keys(document)}", do="check the file",
        )
    for number, instance in enumerate(instances):
        answers = instance.get("output") if isinstance(instance, dict) else None
        answer = answers[0] if isinstance(answers, list) and answers else answers
        if not isinstance(instance, dict) or not _is_text(instance.get("input")) or not isinstance(answer, str):
            found = _keys(instance) if isinstance(instance, dict) else type(instance).__name__
            raise ConfigError(
                f"{path}: instance {number} is not as it should be",
                why=f"it needs input, a text, and output, a list of texts; found: {found}", do="check the file",
            )
        name = f"{path.stem}#{instance.get('id') or number}"
        yield Sample(name, _clean(answer), _clean(instance["input"]), path.stem, _clean(words).strip())


def read_subjects(path: Path) -> Iterator[Sample]:
    """Each subject's text as a document. Raises ConfigError, OSError."""
    for subject, text in _load(path).items():
        if not _is_text(text):
            raise ConfigError(
                f"{path}: {subject[:60]!r} is not text", why=f"it is a {type(text).__name__}",
                do="a file of chains of thought is one JSON object of subject: text",
            )
        yield Sample(f"{path.name}#{subject}", _clean(text))


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON", why=str(error)[:200], do="check the file") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not one JSON object", why=f"it is a {type(document).__name__}", do="check it")
    return document


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair


def _keys(document: dict[str, Any]) -> str:
    return ", ".join(list(document)[:20]) or "none"
