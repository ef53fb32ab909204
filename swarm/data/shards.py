"""A source's samples, in the parts that it comes in: a file, a task, one file of a data set on the hub.

The order of the parts and of the samples in them is the same on every machine. Nothing is read until a part is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from swarm.config import SourceConfig
from swarm.data import hub, rows, task_files
from swarm.data.files import find_files, read_file
from swarm.data.formats import Columns, find_columns, to_sample
from swarm.data.sample import Sample
from swarm.data.stdlib import standard_library
from swarm.errors import ConfigError, NetworkError

JSON = ".json"
ENDINGS = {
    "text": (".txt", *rows.ENDINGS), "p3": rows.ENDINGS, "natural-instructions": (JSON, *rows.ENDINGS),
    "cot": (JSON, *rows.ENDINGS),
}  # fmt: skip


class Shard(NamedTuple):
    name: str
    samples: Callable[[], Iterator[Sample]]
    """from the first one, each time it is called. Raises ConfigError for what is not as the format says; NetworkError
    and OSError where it cannot be reached"""


def find_shards(source: SourceConfig, *, cache: Path | None = None) -> list[Shard]:
    """`cache`: folder for what the hub's data sets leave behind. Raises ConfigError: no such files or data set, a file
    of another kind than the format has; NetworkError: the hub cannot be reached."""
    if source.stdlib:
        return [Shard("stdlib", lambda: (Sample(name, text) for name, text in standard_library()))]
    if source.hub is not None:
        parts = hub.open_rows(source, cache)
        prefix = "/".join(part for part in (source.hub, source.subset, source.split) if part)
        names = [prefix if len(parts) == 1 else f"{prefix}/{number}" for number in range(len(parts))]
        return [Shard(name, partial(_of_hub, part, source, name)) for name, part in zip(names, parts, strict=True)]
    found: list[Shard] = []
    for entry in source.files:
        folder = Path(os.path.expanduser(entry))
        if source.format == "natural-instructions" and folder.is_dir():
            found += [Shard(path.stem, partial(_guarded, task_files.read_task, path))
                      for path in task_files.task_paths(folder)]
        else:
            found += [_of_file(name, path, source)
                      for name, path in find_files([entry], endings=ENDINGS[source.format])]
    return found


def _of_file(name: str, path: Path, source: SourceConfig) -> Shard:
    if rows.ending(path) == JSON:
        read = task_files.read_task if source.format == "natural-instructions" else task_files.read_subjects
        return Shard(name, partial(_guarded, read, path))
    if source.format == "text":
        return Shard(name, lambda: (
            Sample(*document) for document in read_file(name, path, text_field=source.text_field)
        ))
    return Shard(name, partial(_of_rows, name, path, source))


def _of_rows(name: str, path: Path, source: SourceConfig) -> Iterator[Sample]:
    columns: Columns | None = None

    def pick(fields: Sequence[str], where: str) -> list[str]:
        nonlocal columns
        columns = find_columns(source.format, fields, where, text_field=source.text_field)
        return columns.wanted()

    def read(path: Path) -> Iterator[Sample]:
        for where, number, row in rows.read_rows(path, pick):
            assert columns is not None
            yield to_sample(columns, row, where, name=f"{name}#{number}", task=name)

    yield from _guarded(read, path)


def _of_hub(part: Any, source: SourceConfig, name: str) -> Iterator[Sample]:
    columns: Columns | None = None
    try:
        for number, row in enumerate(part):
            where = f"data set {name}, row {number}"
            if columns is None:
                columns = find_columns(source.format, list(row), f"data set {name}", text_field=source.text_field)
            yield to_sample(columns, row, where, name=f"{name}#{number}", task="" if source.streaming else name)
    except (ConfigError, NetworkError):
        raise
    except Exception as error:  # its libraries raise whatever theirs do: sockets, parsers, archives
        what = f"the data set {name!r} broke off"
        raise NetworkError(what, why=(str(error) or type(error).__name__).splitlines()[0][:300]) from None


def _guarded(read: Callable[[Path], Iterator[Sample]], path: Path) -> Iterator[Sample]:
    try:
        yield from read(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}", why=str(error.strerror or error), do="check `files`") from None
