"""Rows one at a time, of jsonl, jsonl.zst and parquet; what is broken is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from swarm.data.files import read_files
from swarm.data.rows import ending, read_rows
from swarm.errors import ConfigError

ROWS = [{"a": i, "text": f"row {i} \u00e9"} for i in range(2500)]


def pick(fields, where):
    if "text" not in fields:
        raise ConfigError(f"{where}: no text", why=", ".join(fields))
    return ["text"]


def texts(path):
    return [row["text"] for _, _, row in read_rows(path, pick)]


def lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def packed(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jsonl", ".jsonl"), ("a.b.JSONL", ".jsonl"), ("a.jsonl.zst", ".jsonl.zst"), ("a.zst", ".zst"), ("a", "")],
)
def test_what_kind_a_file_is_of(name, kind):
    assert ending(Path(name)) == kind


def test_all_kinds_give_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "a.jsonl.zst").write_bytes(packed(lines()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=300)
    for name in ("a.jsonl", "a.jsonl.zst", "a.parquet"):
        assert texts(tmp_path / name) == [row["text"] for row in ROWS]
        assert [number for _, number, _ in read_rows(tmp_path / name, pick)] == list(range(2500))


def test_an_archive_of_several_frames_is_read_whole(tmp_path):
    """pzstd and others that write in parallel make one frame after the other."""
    (tmp_path / "a.jsonl.zst").write_bytes(packed(lines(ROWS[:700])) + packed(lines(ROWS[700:])))
    assert len(texts(tmp_path / "a.jsonl.zst")) == 2500


def test_documents_may_be_packed(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(packed(lines(ROWS[:3])))
    found = read_files([str(tmp_path / "*.zst")], text_field="text")
    assert found == [(f"a.jsonl.zst#{i}", f"row {i} \u00e9") for i in range(3)]


def test_only_the_row_at_hand_is_read(tmp_path):
    """What is broken further on is no matter until one gets there."""
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:5]) + b"{broken\n")
    rows = read_rows(tmp_path / "a.jsonl", pick)
    assert [next(rows)[1] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 6 is not JSON"):
        next(rows)


def test_of_parquet_only_what_is_wanted_is_read(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:9]), tmp_path / "a.parquet")
    assert {tuple(row) for _, _, row in read_rows(tmp_path / "a.parquet", pick)} == {("text",)}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl.zst", packed(lines())[:-2000], "cannot be unpacked after line"),
        ("a.jsonl.zst", b"not zstandard", "a.jsonl.zst"),
        ("a.jsonl.zst", packed(b'{"text": "\xff"}\n'), "is not UTF-8"),
        ("a.jsonl.zst", packed(b"{}\n"), "line 1: no text"),
        ("a.jsonl", b'{"text": "x"}\n{"b": 1}\n', "line 2: no text"),
        ("a.jsonl", b"3\n", "it is a int|no text"),
        ("a.parquet", b"PAR1", "is not parquet"),
    ],
)
def test_what_is_broken_is_named(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        texts(tmp_path / name)
