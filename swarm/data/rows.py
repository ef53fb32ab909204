"""Rows of files of this machine, one at a time: jsonl, jsonl.zst and parquet. The order is the file's.

Nothing is kept but the row at hand (of parquet a batch of rows), so a file may be larger than memory. pyarrow, which
`datasets` brings, reads parquet and unpacks zstandard.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from swarm.errors import ConfigError

ENDINGS = (".jsonl", ".jsonl.zst", ".parquet")
ROWS_AT_ONCE = 1_000
Pick = Callable[[Sequence[str], str], Sequence[str]]
"""(fields that are there, where) -> those that are wanted; raises ConfigError where one is missing"""


def ending(path: Path) -> str:
    """".jsonl.zst" of "a.jsonl.zst", else the last extension, in lower case; "" where there is none."""
    parts = [part.lower() for part in path.suffixes[-2:]]
    return "".join(parts) if parts[-1:] == [".zst"] else "".join(parts[-1:])


def read_rows(path: Path, pick: Pick) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(where, number, row) of each row; "where" is for errors. Empty lines count and are left out.

    Raises ConfigError: unknown extension, not UTF-8, not JSON, not parquet, damaged, what `pick` raises; OSError.
    """
    kind = ending(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path, pick)
        else:
            with _open_lines(path) as lines:
                yield from _jsonl(path, lines, pick)
    except UnicodeDecodeError as error:
        why, do = f"byte {error.start}: {error.reason}", "convert it, for example with iconv"
        raise ConfigError(f"{path} is not UTF-8 text", why=why, do=do) from None
    except pyarrow.ArrowInvalid as error:
        kind_name = "parquet" if kind == ".parquet" else "zstandard"
        why = str(error).splitlines()[0]
        raise ConfigError(f"{path} is not {kind_name}", why=why, do="check the file") from None


def _open_lines(path: Path) -> IO[str]:
    if ending(path) == ".jsonl":
        return path.open(encoding="utf-8-sig", newline="\n")
    packed: Any = pyarrow.input_stream(str(path), compression="zstd")
    try:
        return io.TextIOWrapper(packed, encoding="utf-8-sig", newline="\n")
    except BaseException:
        packed.close()
        raise


def _jsonl(path: Path, lines: IO[str], pick: Pick) -> Iterator[tuple[str, int, dict[str, Any]]]:
    wanted: Sequence[str] | None = None
    number = -1
    try:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            where = f"{path}, line {number + 1}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where} is not JSON", why=str(error), do="one JSON object a line") from None
            if not isinstance(row, dict):
                wanted = pick([f"none, it is a {type(row).__name__}"], where)
            elif wanted is None or any(field not in row for field in wanted):
                wanted = pick(list(row), where)
            yield where, number, row
    except OSError as error:
        if ending(path) == ".jsonl":
            raise
        why = str(error).splitlines()[0]  # pyarrow's word for a damaged archive, too
        raise ConfigError(f"{path} cannot be unpacked after line {number + 1}", why=why, do="fetch it again") from None


def _parquet(path: Path, pick: Pick) -> Iterator[tuple[str, int, dict[str, Any]]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        wanted = list(pick(file.schema_arrow.names, str(path)))
        number = 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", number, row
                number += 1
