"""Text files on this machine as documents: txt (one a file), jsonl, jsonl.zst and parquet (one a row).

Why our own readers: `datasets.load_dataset` for files writes an Arrow copy under ~/.cache and infers the type of
every column, so it fails on a column that we do not even want. Here one column is read, straight into memory,
and nothing is written anywhere.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from swarm.data import rows
from swarm.errors import ConfigError

ENDINGS = (".txt", *rows.ENDINGS)
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
    return [
        document for name, path in find_files(patterns) for document in read_file(name, path, text_field=text_field)
    ]


def read_file(name: str, path: Path, *, text_field: str) -> Iterator[Document]:
    """As `read_files`, of one file."""
    def pick(fields: Sequence[str], where: str) -> list[str]:
        if text_field not in fields:
            raise missing_field(where, text_field, ", ".join(fields))
        return [text_field]

    try:
        if rows.ending(path) == ".txt":
            # bytes, not read_text: newlines stay as they are, so that all systems see the same text
            yield name, path.read_bytes().decode("utf-8-sig")
        else:
            for where, number, row in rows.read_rows(path, pick):
                yield f"{name}#{number}", clean_text(row[text_field], where, text_field)
    except OSError as error:
        why = str(error.strerror or error)
        raise ConfigError(f"cannot read {path}", why=why, do="check `files` in the run config") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text",
            why=f"byte {error.start}: {error.reason}",
            do="convert it, for example with iconv",
        ) from None


def find_files(patterns: list[str], *, endings: Sequence[str] = ENDINGS) -> list[tuple[str, Path]]:
    """(document name, path) of each file that matches a pattern, once, sorted. Raises ConfigError."""
    found: dict[Path, str] = {}
    for pattern in patterns:
        full = os.path.expanduser(pattern)
        plain = os.path.isfile(full)  # first: brackets and stars are allowed in names of files
        matches = [Path(full)] if plain else [Path(m) for m in glob.glob(full, recursive=True) if os.path.isfile(m)]
        if not matches:
            raise ConfigError(
                f"no file matches {pattern!r}", why=f"looked for {full}", do="check `files` in the run config"
            )
        base = Path(full).parent if plain else _fixed_part(full)
        for path in matches:
            if rows.ending(path) not in endings:
                raise ConfigError(
                    f"{path} has an extension we cannot read",
                    why=f"got {rows.ending(path) or 'none'}, known are {', '.join(endings)}",
                    do="narrow the pattern in `files`, or rename the file",
                )
            found.setdefault(path.resolve(), path.relative_to(base).as_posix())
    return sorted((name, path) for path, name in found.items())


def _fixed_part(pattern: str) -> Path:
    """The folder before the first wildcard: "/a/b/*/c.txt" -> "/a/b"."""
    parent = Path(pattern).parent
    while glob.has_magic(str(parent)):
        parent = parent.parent
    return parent


def missing_field(where: str, text_field: str, fields: str) -> ConfigError:
    return ConfigError(
        f"{where}: no field {text_field!r}", why=f"the fields are: {fields}", do="set text_field to one of them"
    )


def clean_text(value: object, where: str, text_field: str) -> str:
    """null is an empty document (data sets are full of them); anything else that is no string is a wrong field."""
    if value is None:
        return ""
    if isinstance(value, str):
        # JSON can spell half a surrogate pair (a cut emoji), which no encoding can store
        return value.encode("utf-8", "replace").decode()
    raise ConfigError(
        f"{where}: {text_field!r} is not text",
        why=f"it is a {type(value).__name__}",
        do="set text_field to a field of strings",
    )
