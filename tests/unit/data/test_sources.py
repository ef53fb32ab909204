"""Documents from real files, the standard library and a data set; the held-out side is the same everywhere."""

from __future__ import annotations

import json
import os
import random
import sysconfig
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from swarm.config import DataConfig
from swarm.data.files import find_files, read_files
from swarm.data.sources import documents, is_held_out, split
from swarm.data.stdlib import standard_library
from swarm.errors import ConfigError


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_all(data: DataConfig) -> dict[str, str]:
    train, held_out = documents(data)
    return dict(zip([*train["name"], *held_out["name"]], [*train["text"], *held_out["text"]], strict=True))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder and temporary folder, to see what is left behind."""
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path / "home"


# --- files


def test_txt_is_one_document_a_file(tmp_path: Path) -> None:
    texts = {f"folder{i % 3}/doc{i}.txt": f"text {i}\r\nnaïve\n" for i in range(30)}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert read_all(DataConfig(files=[str(tmp_path / "**/*.txt")])) == texts


def test_jsonl_is_one_document_a_row(tmp_path: Path) -> None:
    rows = [{"body": f"row {i} é", "other": i if i % 2 else None} for i in range(50)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    found = read_all(DataConfig(files=[str(tmp_path / "*.jsonl")], text_field="body"))
    assert found == {f"a.jsonl#{i}": row["body"] for i, row in enumerate(rows)}


def test_jsonl_as_datasets_writes_it(tmp_path: Path) -> None:
    texts = [f"text {i}\nwith a line" for i in range(40)]
    datasets.Dataset.from_dict({"text": texts, "n": list(range(40))}).to_json(tmp_path / "a.jsonl")
    assert sorted(read_all(DataConfig(files=[str(tmp_path / "a.jsonl")])).values()) == sorted(texts)


@pytest.mark.parametrize("string", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_is_one_document_a_row(tmp_path: Path, string: Any) -> None:
    texts = [f"text {i} 漢字" for i in range(60)]
    table = pyarrow.table({"n": list(range(60)), "text": pyarrow.array(texts, string)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert read_all(DataConfig(files=[str(tmp_path / "a.parquet")])) == {
        f"a.parquet#{i}": t for i, t in enumerate(texts)
    }


def test_parquet_as_datasets_writes_it(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(40)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "a.parquet")
    assert sorted(read_all(DataConfig(files=[str(tmp_path / "*.parquet")])).values()) == sorted(texts)


def test_kinds_mix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "two"}])
    datasets.Dataset.from_dict({"text": ["three"]}).to_parquet(tmp_path / "c.parquet")
    assert [text for _, text in read_files([str(tmp_path / "*")], text_field="text")] == ["one", "two", "three"]


def test_nothing_is_left_behind(home: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": f"row {i}"} for i in range(100)])
    datasets.Dataset.from_dict({"text": ["x"] * 10}).to_parquet(tmp_path / "in" / "b.parquet")
    before = sorted(tmp_path.rglob("*"))
    train, held_out = documents(DataConfig(files=[str(tmp_path / "in" / "*")]))
    assert len(train) + len(held_out) == 110
    assert train.cache_files == held_out.cache_files == []
    assert sorted(tmp_path.rglob("*")) == before


def test_home_folder_is_expanded(home: Path) -> None:
    (home / "texts").mkdir()
    (home / "texts" / "a.txt").write_text("hello")
    assert find_files(["~/texts/*.txt"]) == [("a.txt", home / "texts" / "a.txt")]


def test_names_do_not_depend_on_where_the_files_are(tmp_path: Path) -> None:
    for place in ("here", "some/where/else"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "a.txt").write_text("x")
        (tmp_path / place / "b.txt").write_text("x")
    names = [[name for name, _ in find_files([str(tmp_path / p / "**/*.txt")])] for p in ("here", "some/where/else")]
    assert names == [["b.txt", "sub/a.txt"]] * 2


def test_a_file_matched_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert len(find_files([str(tmp_path / "a.txt"), str(tmp_path / "*.txt"), str(tmp_path / "**")])) == 1


def test_brackets_in_a_file_name(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert find_files([str(tmp_path / "a[1].txt")]) == [("a[1].txt", tmp_path / "a[1].txt")]


def test_byte_order_marks_nulls_and_cut_emoji(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": null}\r\n{"text": "half \\ud83d"}\n'
    )
    found = dict(read_files([str(tmp_path / "*")], text_field="text"))
    assert found == {"a.txt": "hello", "b.jsonl#0": "one", "b.jsonl#2": "", "b.jsonl#3": "half ?"}
    train, held_out = documents(DataConfig(files=[str(tmp_path / "*")]))
    assert "" not in [*train["text"], *held_out["text"]], "empty documents are left out"


def test_no_file_matches(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="no file matches"):
        documents(DataConfig(files=[str(tmp_path / "a.txt"), str(tmp_path / "*.jsonl")]))


def test_unknown_extension(tmp_path: Path) -> None:
    for name in ("a.csv", "README"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ConfigError, match="extension") as caught:
            documents(DataConfig(files=[str(tmp_path / name)]))
        assert ".jsonl" in caught.value.why


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_missing_text_field_names_the_fields_there_are(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [{"body": "x", "title": "y"}])
    else:
        datasets.Dataset.from_dict({"body": ["x"], "title": ["y"]}).to_parquet(path)
    with pytest.raises(ConfigError, match="no field 'text'") as caught:
        documents(DataConfig(files=[str(path)]))
    assert "body, title" in caught.value.why and "text_field" in caught.value.do


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_field_that_is_no_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [{"text": "fine"}, {"text": 3}])
    else:
        datasets.Dataset.from_dict({"text": [1, 3]}).to_parquet(path)
    with pytest.raises(ConfigError, match="is not text"):
        documents(DataConfig(files=[str(path)]))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'["text"]\n', "no field"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        ("a.parquet", b"not parquet at all", "is not parquet"),
        ("a.parquet", b"", "is not parquet"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", b"", "no text"),
        ("a.jsonl", b"", "no text"),
        ("a.txt", b"x", "too short"),
    ],
)
def test_broken_files(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        documents(DataConfig(files=[str(tmp_path / name)]))
    assert caught.value.why and caught.value.do


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(ConfigError, match="cannot read"):
        documents(DataConfig(files=[str(tmp_path / "a.txt")]))


# --- what is held out


def test_held_out_is_disjoint_stable_and_of_the_right_size(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(5000)])
    data = DataConfig(files=[str(tmp_path / "a.jsonl")], held_out_percent=4.0)
    train, held_out = documents(data)
    assert train.column_names == held_out.column_names == ["name", "text"]
    assert not set(train["name"]) & set(held_out["name"])
    assert not set(train["text"]) & set(held_out["text"])
    assert len(train) + len(held_out) == 5000 and 150 < len(held_out) < 250
    again = documents(data)
    assert again[0]["name"] == train["name"] and again[1]["name"] == held_out["name"]


def test_held_out_never_changes_between_versions() -> None:
    """Pinned: if this fails, peers of two versions would train on each other's held-out text."""
    assert [i for i in range(200) if is_held_out(f"doc{i}.txt", held_out_percent=4.0)] == [39, 42, 45]


def test_other_documents_do_not_change_a_documents_side() -> None:
    draw = random.Random(0)
    everything = [(f"n{i}", f"t{i}") for i in range(1000)]
    held_out = {name for name, _ in split(everything, held_out_percent=5.0)[1]}
    for _ in range(5):
        some = draw.sample(everything, 600)
        assert {name for name, _ in split(some, held_out_percent=5.0)[1]} == held_out & {name for name, _ in some}


def test_more_percent_only_adds() -> None:
    names = [f"n{i}" for i in range(3000)]
    small, large = ({n for n in names if is_held_out(n, held_out_percent=p)} for p in (1.0, 20.0))
    assert small < large and 500 < len(large) < 700


@pytest.mark.parametrize("percent", [0.01, 4.0, 50.0])
def test_single_document_is_split_at_its_end(percent: float, tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    train, held_out = documents(DataConfig(files=[str(tmp_path / "a.txt")], held_out_percent=percent))
    assert train["text"][0] + held_out["text"][0] == text
    assert len(held_out["text"][0]) == max(1, round(10 * percent))
    assert train["name"][:] == held_out["name"][:] == ["a.txt"]


def test_few_documents_are_each_split() -> None:
    found = [(name, name * 100) for name in ("a", "b", "c") if not is_held_out(name, held_out_percent=4.0)]
    train, held_out = split([*found, ("z", "z")], held_out_percent=4.0)
    assert [(name, len(text)) for name, text in train] == [(name, 96) for name, _ in found]
    assert [(name, len(text)) for name, text in held_out] == [*((name, 4) for name, _ in found), ("z", 1)]


# --- the standard library


def test_standard_library_is_large_clean_and_the_same_each_time() -> None:
    found = standard_library()
    names = [name for name, _ in found]
    assert names == sorted(set(names)) and standard_library() == found
    assert 5e6 < sum(len(text) for _, text in found) < 5e7
    assert {"stdlib/argparse.py", "stdlib/asyncio/locks.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "encodings"} & set(name.split("/"))]
    assert not [name for name in names if "_sysconfigdata" in name or str(sysconfig.get_paths()["stdlib"]) in name]


def test_standard_library_has_prose_where_python_has_it() -> None:
    topics = pytest.importorskip("pydoc_data.topics").topics
    found = dict(standard_library())
    assert found["topics/assert"] == topics["assert"]


def test_standard_library_through_documents(home: Path, tmp_path: Path) -> None:
    train, held_out = documents(DataConfig(stdlib=True))
    assert len(train) > 400 and len(held_out) >= 5
    assert isinstance(train, datasets.Dataset) and train[0]["text"]
    assert 0.005 < sum(map(len, held_out["text"])) / sum(map(len, train["text"])) < 0.15
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["home", "temporary"], "something was left behind"


def test_standard_library_skips_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "broken.py").symlink_to(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("no code")
    for folder in ("test", "pkg", "site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "inner.py").write_text("y = 2\n")
    names = [name for name, _ in standard_library(tmp_path) if name.startswith("stdlib/")]
    assert names == ["stdlib/good.py", "stdlib/pkg/inner.py"]


def test_no_standard_library(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="standard library is not at"):
        standard_library(tmp_path / "none")


# --- data sets


@pytest.fixture
def local_hub(tmp_path: Path) -> str:
    """load_dataset takes a folder where it takes a hub id; the rest of the way is the same code."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = {"body": [f"row {i}" if i else None for i in range(50)], "n": list(range(50))}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train-00000.parquet")
    return str(folder)


def test_data_set(local_hub: str, home: Path, tmp_path: Path) -> None:
    data = DataConfig(hub=local_hub, text_field="body", held_out_percent=10.0)
    train, held_out = documents(data, cache=tmp_path / "cache")
    assert sorted([*train["text"], *held_out["text"]]) == sorted(f"row {i}" for i in range(1, 50))
    assert f"{local_hub}/train#7" in [*train["name"], *held_out["name"]]
    assert train.column_names == ["name", "text"]
    assert (tmp_path / "cache").is_dir() and not list(home.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_field": "text"}, "no field 'text'"),
        ({"text_field": "n"}, "is not text"),
        ({"text_field": "body", "split": "nosuch"}, "cannot load the data set"),
        ({"text_field": "body", "subset": "nosuch"}, "cannot load the data set"),
    ],
)
def test_data_set_errors(changes: dict[str, Any], says: str, local_hub: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        documents(DataConfig(hub=local_hub, **changes), cache=tmp_path / "cache")
    assert caught.value.why and caught.value.do


def test_data_set_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # fail at once instead of retrying
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot load the data set 'nobody/nothing'") as caught:
        documents(DataConfig(hub="nobody/nothing"), cache=tmp_path)
    assert "internet" in caught.value.do
