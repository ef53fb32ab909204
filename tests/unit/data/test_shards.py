"""Sources of every format and place, in parts, each sample with the same name on every machine."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from swarm.config import SourceConfig
from swarm.data import hub
from swarm.data.sample import Sample
from swarm.data.shards import find_shards
from swarm.errors import ConfigError, NetworkError
from tests.unit.data.task_sets import p3_rows, write_instructions, write_jsonl


def samples_of(source: SourceConfig, cache: Path | None = None) -> dict[str, list[Sample]]:
    return {shard.name: list(shard.samples()) for shard in find_shards(source, cache=cache)}


def test_p3_is_rows_of_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p3" / "a.jsonl", p3_rows(2))
    write_jsonl(tmp_path / "p3" / "b.jsonl.zst", p3_rows(1))
    row = {"inputs_pretokenized": "x", "targets_pretokenized": "y", "inputs": [3], "targets": [4]}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "p3" / "c.parquet")
    found = samples_of(SourceConfig(format="p3", files=[str(tmp_path / "p3" / "*")]))
    assert found == {
        "a.jsonl": [
            Sample("a.jsonl#0", "yes", "Is 0 even?", "a.jsonl"), Sample("a.jsonl#1", "no", "Is 1 even?", "a.jsonl"),
        ],
        "b.jsonl.zst": [Sample("b.jsonl.zst#0", "yes", "Is 0 even?", "b.jsonl.zst")],
        "c.parquet": [Sample("c.parquet#0", "y", "x", "c.parquet")],
    }  # fmt: skip


def test_natural_instructions_is_a_folder_or_rows(tmp_path: Path) -> None:
    folder = write_instructions(tmp_path / "ni", {"task1_a": [("1", "2")], "task2_b": [("3", "4")]}, train=["task2_b"])
    said = Sample("task2_b#task2_b-0", "4", "3", "task2_b", "Do task2_b.")
    assert samples_of(SourceConfig(format="natural-instructions", files=[str(folder)])) == {"task2_b": [said]}
    pattern = SourceConfig(format="natural-instructions", files=[str(folder / "tasks" / "task2*.json")])
    assert list(samples_of(pattern).values()) == [[said]]
    row = {"task_name": "task2_b", "id": "task2_b-0", "definition": "Do task2_b.", "inputs": "3", "targets": "4"}
    flat = write_jsonl(tmp_path / "flat.jsonl", [row])
    found = samples_of(SourceConfig(format="natural-instructions", files=[str(flat)]))
    assert found == {"flat.jsonl": [Sample("task2_b/task2_b-0", "4", "3", "task2_b", "Do task2_b.")]}


def test_chains_of_thought_are_a_json_or_rows(tmp_path: Path) -> None:
    (tmp_path / "mmlu-cot.json").write_text(json.dumps({"law": "Q: x"}))
    found = samples_of(SourceConfig(format="cot", files=[str(tmp_path / "mmlu-cot.json")]))
    assert found == {"mmlu-cot.json": [Sample("mmlu-cot.json#law", "Q: x")]}
    rows = write_jsonl(tmp_path / "c.jsonl", [{"inputs": "1+1?", "targets": "1 and 1 is 2"}])
    assert samples_of(SourceConfig(format="cot", files=[str(rows)]))["c.jsonl"][0].prompt == "1+1?"


def test_the_pile_is_packed_lines(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "00.jsonl.zst", [{"text": "hello", "meta": {"pile_set_name": "Books3"}}])
    assert samples_of(SourceConfig(files=[str(path)])) == {"00.jsonl.zst": [Sample("00.jsonl.zst#0", "hello")]}
    assert "stdlib" in {shard.name for shard in find_shards(SourceConfig(stdlib=True))}


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [("p3", "a.txt", "extension"), ("text", "a.json", "extension"), ("cot", "none*", "no file matches"),
     ("natural-instructions", "nothere", "no file matches")],
)
def test_files_of_another_kind_are_refused(kind: str, name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ConfigError, match=says):
        find_shards(SourceConfig(format=kind, files=[str(tmp_path / name)]))


def test_a_file_that_has_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", p3_rows(1))
    [shard] = find_shards(SourceConfig(format="p3", files=[str(path)]))
    path.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*a\.jsonl"):
        list(shard.samples())


# --- the hub: `load_dataset` takes a folder where it takes an id; the rest of the way is the same code


@pytest.fixture
def local_hub(tmp_path: Path) -> str:
    for number in range(3):
        rows = [{"inputs": f"{number}.{i}?", "targets": "yes", "more": i} for i in range(4)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / f"train-{number}.parquet")
    return str(tmp_path / "set")


def test_a_data_set_is_one_part_or_streamed_by_its_files(local_hub: str, tmp_path: Path) -> None:
    kept = samples_of(SourceConfig(format="p3", hub=local_hub), tmp_path / "cache")
    [(name, samples)] = kept.items()
    assert name == f"{local_hub}/train" and len(samples) == 12
    assert samples[5] == Sample(f"{name}#5", "yes", "1.1?", name)
    streamed = samples_of(SourceConfig(format="p3", hub=local_hub, streaming=True))
    assert [len(part) for part in streamed.values()] == [4, 4, 4]
    assert [s.prompt for part in streamed.values() for s in part] == [s.prompt for s in samples]
    assert next(iter(streamed)) == f"{local_hub}/train/0"


def test_all_tasks_of_p3_s_parquet_revision_are_one_source(tmp_path: Path) -> None:
    """Its folders are task/split/0000.parquet; which of them is said by a pattern."""
    for task in ("ag_news", "imdb"):
        for split in ("train", "test"):
            (tmp_path / "P3" / task / split).mkdir(parents=True)
            row = {"inputs": [1], "targets": [2]}
            row |= {"inputs_pretokenized": f"{task} {split}?", "targets_pretokenized": "yes"}
            datasets.Dataset.from_list([row]).to_parquet(tmp_path / "P3" / task / split / "0000.parquet")
    source = SourceConfig(format="p3", hub=str(tmp_path / "P3"), files=["*/train/*.parquet"], streaming=True)
    found = samples_of(source)
    assert [sample.prompt for part in found.values() for sample in part] == ["ag_news train?", "imdb train?"]
    assert len(found) == 2, "a part is a task"


def test_lines_are_streamed_too(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "train" / "00.jsonl", [{"text": f"row {i}", "meta": None} for i in range(5)])
    source = SourceConfig(hub=str(tmp_path / "set"), streaming=True)
    [(_, samples)] = samples_of(source).items()
    assert [sample.text for sample in samples] == [f"row {i}" for i in range(5)]


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_columns_are_listed(streaming: bool, local_hub: str, tmp_path: Path) -> None:
    source = SourceConfig(format="natural-instructions", hub=local_hub, streaming=streaming)
    with pytest.raises(ConfigError) as caught:
        samples_of(source, tmp_path / "cache")
    assert "inputs, targets, more" in caught.value.why


@pytest.mark.parametrize("changes", [{"split": "nosuch"}, {"subset": "nosuch"}])
def test_what_is_not_there_is_refused(changes: dict[str, str], local_hub: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the data set") as caught:
        find_shards(SourceConfig(format="p3", hub=local_hub, **changes), cache=tmp_path / "cache")
    assert caught.value.why and hub.PARQUET in caught.value.do


def test_a_data_set_with_a_script_is_refused_with_what_to_write(tmp_path: Path) -> None:
    """As bigscience/P3 is: the library refuses the script, and we say which revision loads."""
    folder = tmp_path / "P3"
    folder.mkdir()
    (folder / "P3.py").write_text("raise SystemExit('no script may run')")
    with pytest.raises(ConfigError) as caught:
        find_shards(SourceConfig(format="p3", hub=str(folder)))
    assert hub.PARQUET in caught.value.do


@pytest.mark.parametrize("name", sorted(hub.REPLACED))
def test_each_data_set_of_the_recipe_has_its_advice(name: str) -> None:
    refused = hub._refused(SourceConfig(hub=name.upper()), ValueError("Dataset scripts are no longer supported"))
    assert hub.REPLACED[name] in refused.do and "no longer supported" in refused.why


def test_a_package_that_is_missing_is_named() -> None:
    error = ValueError("Compression type zstd not supported")
    refused = hub._refused(SourceConfig(hub="monology/pile-uncopyrighted"), error)
    assert "pip install zstandard" in refused.do


def test_a_hub_out_of_reach_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="cannot be reached"):
        find_shards(SourceConfig(hub="nobody/nothing", streaming=True), cache=tmp_path)


def test_a_data_set_that_breaks_off_can_be_tried_again(local_hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __iter__(self):
            yield {"inputs": "x", "targets": "y"}
            raise EOFError("connection reset")

    monkeypatch.setattr(hub, "open_rows", lambda source, cache: [Broken()])
    [shard] = find_shards(SourceConfig(format="p3", hub="a/b"))
    samples = shard.samples()
    assert next(samples).text == "y"
    with pytest.raises(NetworkError, match="broke off") as caught:
        next(samples)
    assert caught.value.why == "connection reset"
