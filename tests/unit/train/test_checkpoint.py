"""Checkpoints come back bit for bit, or the one before does, and what was damaged is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging.global_state import GlobalState
from swarm.errors import HomeError
from swarm.train import checkpoint
from swarm.train.checkpoint import KEPT, MANIFEST, Checkpoint

NUMELS = [512, 256]


def saved(version: int, *, numels: list[int] = NUMELS) -> Checkpoint:
    generator = torch.Generator().manual_seed(version)
    states = [
        GlobalState(
            index, version + index, version * 100, torch.randn(numel, generator=generator),
            (torch.randn(numel, generator=generator),),
        )
        for index, numel in enumerate(numels)
    ]
    return Checkpoint(states, {"pass": 1, "position": version})


def load(folder: Path, warnings: list[str] | None = None, numels: list[int] = NUMELS) -> Checkpoint | None:
    warn: Callable[[str], None] = (lambda text: None) if warnings is None else warnings.append
    return checkpoint.load_newest(
        folder, numels=dict(enumerate(numels)), num_fragments=len(numels), num_buffers=1, warn=warn
    )


def write(folder: Path, what: Checkpoint) -> Path:
    return checkpoint.write(folder, what, num_fragments=len(NUMELS))


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    return one is not None and one.stream == other.stream and len(one.states) == len(other.states) and all(
        a.digest == b.digest and torch.equal(a.weights, b.weights) and torch.equal(a.buffers[0], b.buffers[0])
        and (a.fragment, a.version, a.tokens) == (b.fragment, b.version, b.tokens)
        for a, b in zip(one.states, other.states, strict=True)
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two checkpoints, 1 and 2."""
    for version in (1, 2):
        write(tmp_path / "checkpoints", saved(version))
    return tmp_path / "checkpoints"


def test_the_newest_comes_back_bit_for_bit(folder: Path) -> None:
    warnings: list[str] = []
    assert same(load(folder, warnings), saved(2)) and warnings == []
    assert names(folder) == ["000001", "000002"]
    assert names(folder / "000002") == ["fragment-000.safetensors", "fragment-001.safetensors", MANIFEST]


def test_where_there_is_none_there_is_none(tmp_path: Path) -> None:
    assert load(tmp_path) is None and load(tmp_path / "nowhere") is None


def test_three_are_kept(tmp_path: Path) -> None:
    for version in range(1, KEPT + 4):
        write(tmp_path, saved(version))
        assert same(load(tmp_path), saved(version))
    assert names(tmp_path) == [f"{sequence:06d}" for sequence in range(4, KEPT + 4)]


def test_more_than_a_million_are_still_in_order(tmp_path: Path) -> None:
    write(tmp_path, saved(1))
    (tmp_path / "000001").rename(tmp_path / "999999")
    assert write(tmp_path, saved(2)).name == "1000000"
    assert same(load(tmp_path), saved(2))


def test_a_kill_while_writing_leaves_nothing_that_counts(folder: Path) -> None:
    """SIGKILL cleans nothing up: half a folder stays under its temporary name until the next checkpoint."""
    half = folder / ".000003.tmp"
    half.mkdir()
    (half / "fragment-000.safetensors").write_bytes(b"half")
    (half / MANIFEST).write_text("{}")
    warnings: list[str] = []
    assert same(load(folder, warnings), saved(2)) and warnings == []
    write(folder, saved(3))
    assert names(folder) == ["000001", "000002", "000003"]
    assert same(load(folder), saved(3))


@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path / "fragment-000.safetensors", 1000),
    lambda path: os.truncate(path / "fragment-001.safetensors", 0),
    lambda path: flip(path / "fragment-000.safetensors", -5),
    lambda path: flip(path / "fragment-001.safetensors", 3),
    lambda path: (path / "fragment-001.safetensors").unlink(),
    lambda path: (path / MANIFEST).unlink(),
    lambda path: os.truncate(path / MANIFEST, 0),
    lambda path: os.truncate(path / MANIFEST, 300),
    lambda path: (path / MANIFEST).write_text("[" * 100_000),
    lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"),
    lambda path: os.replace(path / "fragment-000.safetensors", path / "fragment-001.safetensors"),
    lambda path: [file.unlink() for file in path.iterdir()],
])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    folder: Path, damage: Callable[[Path], object]
) -> None:
    damage(folder / "000002")
    warnings: list[str] = []
    assert same(load(folder, warnings), saved(1))
    assert len(warnings) == 1 and "000002" in warnings[0]
    assert write(folder, saved(3)).name == "000003", "and the next one can be written all the same"
    assert same(load(folder), saved(3))


@pytest.mark.parametrize(("where", "value"), [
    (("fragments", 0, "version"), 3), (("fragments", 0, "tokens"), 201), (("fragments", 1, "digest"), "0" * 64),
    (("fragments", 0, "version"), -1), (("fragments", 0, "version"), 2**64), (("fragments", 0, "version"), None),
    (("fragments", 0, "version"), float("inf")), (("fragments", 0, "fragment"), 1), (("fragments", 0), {}),
    (("fragments", 0), {"version": 2, "tokens": 200, "digest": "0" * 64}), (("fragments", 1), "x"),
    (("fragments",), []), (("fragments",), None), (("fragments",), {}), (("files",), {}), (("files",), []),
    (("files",), None), (("files", "fragment-000.safetensors"), "0" * 64), (("stream",), None), (("stream",), 5),
])
def test_a_manifest_that_says_something_else_is_refused(
    folder: Path, where: tuple[str | int, ...], value: object
) -> None:
    path = folder / "000002" / MANIFEST
    document = json.loads(path.read_text())
    place = document
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    path.write_text(json.dumps(document))
    warnings: list[str] = []
    assert same(load(folder, warnings), saved(1))
    assert len(warnings) == 1 and "000002" in warnings[0]


@settings(max_examples=120, derandomize=True, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7), file=st.sampled_from([0, 1, 2]))
def test_no_flipped_bit_ever_gets_into_the_swarm(position: int, bit: int, file: int) -> None:
    """The place in the data has no hash of its own; nothing but this peer's choice of text hangs on it."""
    path = FLIPPED / (["fragment-000.safetensors", "fragment-001.safetensors", MANIFEST][file])
    intact = path.read_bytes()
    try:
        flip(path, position, bit)
        got = load(FLIPPED.parent)
        assert got is not None
        states = Checkpoint(got.states, {})
        assert same(states, Checkpoint(saved(1).states)) or (
            file == 2 and same(states, Checkpoint(saved(2).states))
        )
    finally:
        path.write_bytes(intact)


FLIPPED = Path()


@pytest.fixture(autouse=True, scope="module")
def checkpoints_to_flip(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FLIPPED
    folder = tmp_path_factory.mktemp("flipped")
    write(folder, saved(1))
    FLIPPED = write(folder, saved(2))


def test_a_checkpoint_of_another_run_is_left_out(folder: Path) -> None:
    """The number of fragments, or their shapes, are the run config's."""
    for numels in ([512], [512, 256, 256], [256, 512], [512, 768]):
        warnings: list[str] = []
        assert load(folder, warnings, numels) is None
        assert len(warnings) == 2 and "000002" in warnings[0] and "000001" in warnings[1]
    assert checkpoint.load_newest(folder, numels=dict(enumerate(NUMELS)), num_fragments=2, num_buffers=2) is None


# --- some fragments of four

FOUR = {0: 256, 1: 512, 2: 768, 3: 1024}


def stage(first: int, end: int, version: int = 5) -> Checkpoint:
    whole = saved(version, numels=list(FOUR.values()))
    return Checkpoint(whole.states[first:end], whole.stream)


def load_stage(folder: Path, first: int, end: int, warnings: list[str] | None = None) -> Checkpoint | None:
    warn: Callable[[str], None] = (lambda text: None) if warnings is None else warnings.append
    numels = {index: FOUR[index] for index in range(first, end)}
    return checkpoint.load_newest(folder, numels=numels, num_fragments=4, num_buffers=1, warn=warn)


def test_a_peer_writes_and_reads_just_the_fragments_that_it_holds(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, stage(1, 3), num_fragments=4)
    assert names(path) == ["fragment-001.safetensors", "fragment-002.safetensors", MANIFEST]
    document = json.loads((path / MANIFEST).read_text())
    assert document["num_fragments"] == 4 and [entry["fragment"] for entry in document["fragments"]] == [1, 2]
    assert same(load_stage(tmp_path, 1, 3), stage(1, 3))


@pytest.mark.parametrize(("wanted", "found"), [
    ((1, 2), (1, 2)), ((2, 4), (2, 3)), ((0, 4), (1, 3)), ((0, 2), (1, 2)),
])
def test_whoever_holds_others_now_takes_those_that_it_still_needs(
    tmp_path: Path, wanted: tuple[int, int], found: tuple[int, int]
) -> None:
    checkpoint.write(tmp_path, stage(1, 3), num_fragments=4)
    warnings: list[str] = []
    assert same(load_stage(tmp_path, *wanted, warnings), stage(*found)) and warnings == []


def test_a_newer_one_of_other_fragments_is_passed_over_and_not_called_damaged(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, stage(0, 2, version=5), num_fragments=4)
    checkpoint.write(tmp_path, stage(2, 4, version=9), num_fragments=4)
    warnings: list[str] = []
    assert same(load_stage(tmp_path, 0, 2, warnings), stage(0, 2, version=5)) and warnings == []
    assert same(load_stage(tmp_path, 1, 3), stage(2, 3, version=9)), "the newest that has any"
    (tmp_path / "000001").rename(tmp_path / "old")
    assert load_stage(tmp_path, 0, 2, warnings) is None and warnings == []


def test_damage_to_a_fragment_that_is_not_needed_costs_nothing(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, stage(0, 4), num_fragments=4)
    flip(path / "fragment-003.safetensors", 700)
    warnings: list[str] = []
    assert same(load_stage(tmp_path, 0, 3, warnings), stage(0, 3)) and warnings == []
    assert load_stage(tmp_path, 2, 4, warnings) is None and len(warnings) == 1


def without_the_number(path: Path) -> None:
    """As the first ones were written, by peers that held everything."""
    document = json.loads((path / MANIFEST).read_text())
    del document["num_fragments"]
    (path / MANIFEST).write_text(json.dumps(document))


def test_old_checkpoints_of_whole_peers_still_load(tmp_path: Path) -> None:
    without_the_number(checkpoint.write(tmp_path, stage(0, 4), num_fragments=4))
    warnings: list[str] = []
    assert same(load_stage(tmp_path, 0, 4, warnings), stage(0, 4))
    assert same(load_stage(tmp_path, 1, 3, warnings), stage(1, 3)) and warnings == []


def test_without_a_number_it_must_hold_everything(tmp_path: Path) -> None:
    without_the_number(checkpoint.write(tmp_path, stage(1, 3), num_fragments=4))
    warnings: list[str] = []
    assert load_stage(tmp_path, 1, 3, warnings) is None and "fragments of this run" in warnings[0]


@pytest.mark.parametrize("number", [3, 5, 0, -1, None, "4"])
def test_a_checkpoint_of_a_run_with_another_number_of_fragments_is_refused(tmp_path: Path, number: object) -> None:
    path = checkpoint.write(tmp_path, stage(1, 3), num_fragments=4)
    document = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**document, "num_fragments": number}))
    warnings: list[str] = []
    assert load_stage(tmp_path, 1, 3, warnings) is None and len(warnings) == 1


@pytest.mark.parametrize("indices", [[1, 1], [2, 1], [1, 4], [-1, 2], [1, None], [1, "2"], [True, 2]])
def test_fragments_are_named_once_in_order_and_are_the_run_s(tmp_path: Path, indices: list[object]) -> None:
    path = checkpoint.write(tmp_path, stage(1, 3), num_fragments=4)
    document = json.loads((path / MANIFEST).read_text())
    for entry, index in zip(document["fragments"], indices, strict=True):
        entry["fragment"] = index
    (path / MANIFEST).write_text(json.dumps(document))
    warnings: list[str] = []
    assert load_stage(tmp_path, 0, 4, warnings) is None and len(warnings) == 1


def test_all_damaged_means_none(folder: Path) -> None:
    for number in ("000001", "000002"):
        flip(folder / number / "fragment-000.safetensors", 700)
    warnings: list[str] = []
    assert load(folder, warnings) is None and len(warnings) == 2


def test_things_that_are_no_checkpoints_are_left_alone(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "000007").write_text("a file, not a folder")
    warnings: list[str] = []
    assert same(load(folder, warnings), saved(2)) and warnings == []
    for version in range(3, 6):
        write(folder, saved(version))
    assert {"notes", "000007"} <= set(names(folder))


FULL = """
import resource, sys, torch
from pathlib import Path
from swarm.averaging.global_state import GlobalState
from swarm.errors import HomeError
from swarm.train import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
states = [GlobalState(i, 9, 9, torch.ones(n), (torch.ones(n),)) for i, n in enumerate((512, 256))]
try:
    checkpoint.write(Path(sys.argv[1]), checkpoint.Checkpoint(states), num_fragments=2)
except HomeError as error:
    print(error)
    raise SystemExit(7)
"""


@pytest.mark.parametrize("room", [0, 2500])
def test_a_full_disk_costs_the_new_checkpoint_only(folder: Path, room: int) -> None:
    """A process that may write no file over so many bytes: at once, and after the first file."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(folder), str(room)], capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 7, done.stderr
    assert "the disk is full" in done.stdout
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, "no leftovers either"
    assert names(folder) == ["000001", "000002"] and same(load(folder), saved(2))


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(HomeError, match="cannot write a checkpoint"):
        write(tmp_path / "taken", saved(1))
    with pytest.raises(HomeError, match="cannot write a checkpoint"):
        write(tmp_path / "taken" / "checkpoints", saved(1))
