"""Text files on this machine as documents: txt (one a file), jsonl and parquet (one a row).

Why our own readers: `datasets.load_dataset` for files writes an Arrow copy under ~/.cache and infers the type of
every column, so it fails on a column that we do not even want. Here one column is read, straight into memory,
and nothing is written anywhere.
"""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet

from swarm.errors import ConfigError

Document = tuple[str, str]
"""(name, text)"""


def read_files(patterns: list[str], *, text_field: str) -> list[Document]:
    """Documents of every file that matches, in the order of their names.

    `patterns`: files or glob patterns (`**` goes into subfolders, `~` is the user's folder).
    A document's name is its file relative to the fixed part of its pattern, so that peers who keep the same files
    in different places agree on it; rows add their number: "news/a.jsonl#17".
    Raises ConfigError: no file matches, unknown extension, unreadable or not UTF-8, no `text_field` (says which
    fields there are), text that is not a string.
    """
    documents: list[Document] = []
    for name, path in find_files(patterns):
        try:
            documents += _READERS[path.suffix.lower()](name, path, text_field)
        except OSError as error:
            raise ConfigError(f"cannot read {path}", why=str(error.strerror or error), do="check data.files") from None
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path} is not UTF-8 text",
                why=f"byte {error.start}: {error.reason}",
                do="convert it, for example with iconv",
            ) from None
    return documents


def find_files(patterns: list[str]) -> list[tuple[str, Path]]:
    """(document name, path) of each file that matches a pattern, once, sorted. Raises ConfigError."""
    found: dict[Path, str] = {}
    for pattern in patterns:
        full = os.path.expanduser(pattern)
        plain = os.path.isfile(full)  # first: brackets and stars are allowed in names of files
        matches = [Path(full)] if plain else [Path(m) for m in glob.glob(full, recursive=True) if os.path.isfile(m)]
        if not matches:
            raise ConfigError(
                f"no file matches {pattern!r}", why=f"looked for {full}", do="check data.files in the run config"
            )
        base = Path(full).parent if plain else _fixed_part(full)
        for path in matches:
            if path.suffix.lower() not in _READERS:
                raise ConfigError(
                    f"{path} has an extension we cannot read",
                    why=f"got {path.suffix or 'none'}, known are {', '.join(_READERS)}",
                    do="narrow the pattern in data.files, or rename the file",
                )
            found.setdefault(path.resolve(), path.relative_to(base).as_posix())
    return sorted((name, path) for path, name in found.items())


def _fixed_part(pattern: str) -> Path:
    """The folder before the first wildcard: "/a/b/*/c.txt" -> "/a/b"."""
    parent = Path(pattern).parent
    while glob.has_magic(str(parent)):
        parent = parent.parent
    return parent


def _read_txt(name: str, path: Path, _text_field: str) -> list[Document]:
    # bytes, not read_text: newlines stay as they are, so that all systems see the same text
    return [(name, path.read_bytes().decode("utf-8-sig"))]


def _read_jsonl(name: str, path: Path, text_field: str) -> list[Document]:
    documents = []
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{path}, line {number + 1} is not JSON", why=str(error), do="one JSON object a line"
                ) from None
            if not isinstance(row, dict) or text_field not in row:
                fields = ", ".join(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
                raise missing_field(f"{path}, line {number + 1}", text_field, fields)
            documents.append((f"{name}#{number}", _text(row[text_field], f"{path}, line {number + 1}", text_field)))
    return documents


def _read_parquet(name: str, path: Path, text_field: str) -> list[Document]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if text_field not in fields:
                raise missing_field(str(path), text_field, ", ".join(fields))
            column = file.read(columns=[text_field]).column(text_field).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is not parquet", why=str(error).splitlines()[0], do="check the file") from None
    return [(f"{name}#{row}", _text(value, f"{path}, row {row}", text_field)) for row, value in enumerate(column)]


def missing_field(where: str, text_field: str, fields: str) -> ConfigError:
    return ConfigError(
        f"{where}: no field {text_field!r}", why=f"the fields are: {fields}", do="set data.text_field to one of them"
    )


def _text(value: object, where: str, text_field: str) -> str:
    """null is an empty document (data sets are full of them); anything else that is no string is a wrong field."""
    if value is None:
        return ""
    if isinstance(value, str):
        # JSON can spell half a surrogate pair (a cut emoji), which no encoding can store
        return value.encode("utf-8", "replace").decode()
    raise ConfigError(
        f"{where}: {text_field!r} is not text",
        why=f"it is a {type(value).__name__}",
        do="set data.text_field to a field of strings",
    )


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
