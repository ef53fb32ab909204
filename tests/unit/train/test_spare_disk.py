"""Spare copies on a disk: within their room, checked when read, and no trouble to anybody when the disk is full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swarm.averaging.global_state import GlobalState
from swarm.train import spare_disk, state_file
from swarm.train.checkpoint import Checkpoint, older, write
from swarm.train.spare_disk import SpareDisk, room_bytes
from tests.unit.train.test_state_file import head_of

NUMELS = {0: 512, 1: 256, 2: 512}


def state(fragment: int, version: int = 1) -> GlobalState:
    generator = torch.Generator().manual_seed(100 * fragment + version)
    weights, momentum = (torch.randn(NUMELS[fragment], generator=generator) for _ in range(2))
    return GlobalState(fragment, version, version * 100, weights, (momentum,))


def make(folder: Path, room: int = 10**6, warnings: list[str] | None = None) -> SpareDisk:
    said = [] if warnings is None else warnings
    return SpareDisk(folder / "spares", room_bytes=room, numels=NUMELS, num_buffers=1, warn=said.append)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "spares").iterdir())


def test_copies_come_back_after_a_new_start(tmp_path: Path) -> None:
    disk = make(tmp_path)
    assert disk.heads() == {} and disk.read(0) is None
    assert disk.write(state(0)) and disk.write(state(2, 5)) and disk.write(state(0, 7))
    for again in (disk, make(tmp_path)):
        assert again.heads() == {0: head_of(state(0, 7)), 2: head_of(state(2, 5))}
        read = again.read(0)
        assert read is not None and torch.equal(read.weights, state(0, 7).weights)
    assert files(tmp_path) == ["fragment-000.safetensors", "fragment-002.safetensors"]


def test_nothing_is_made_where_nothing_is_kept(tmp_path: Path) -> None:
    assert make(tmp_path).heads() == {} and list(tmp_path.iterdir()) == []


def test_without_memory_nothing_is_offered_and_nothing_is_lost(tmp_path: Path) -> None:
    assert make(tmp_path).write(state(0))
    disk = make(tmp_path)
    disk.offer_nothing()
    assert disk.room_bytes == 0 and disk.heads() == {0: head_of(state(0))}, "others may lack it"
    assert disk.write(state(1)), "a fragment that this peer lets go of, and nobody else has"
    assert set(make(tmp_path).heads()) == {0, 1}


def test_what_goes_beyond_the_room_is_not_written_and_what_is_there_stays(tmp_path: Path) -> None:
    warnings: list[str] = []
    disk = make(tmp_path, make(tmp_path).size_bytes(0) + make(tmp_path).size_bytes(1), warnings)
    assert disk.write(state(0)) and disk.write(state(1))
    assert not disk.has_room_for(2) and not disk.write(state(2))
    assert disk.has_room_for(0) and disk.write(state(0, 2)), "in the place of the older one"
    assert sum(path.stat().st_size for path in (tmp_path / "spares").iterdir()) <= disk.used_bytes() <= disk.room_bytes
    disk.drop(0)
    assert disk.write(state(2)) and set(disk.heads()) == {1, 2} and not warnings


def test_no_room_means_no_copy(tmp_path: Path) -> None:
    disk = make(tmp_path, 0)
    assert not disk.has_room_for(1) and not disk.write(state(1)) and not (tmp_path / "spares").exists()


def test_a_start_with_less_room_lets_go_of_the_copies_with_fewest_tokens(tmp_path: Path) -> None:
    disk = make(tmp_path)
    for copy in (state(0, 5), state(1, 9), state(2, 7)):
        assert disk.write(copy)
    assert set(make(tmp_path, disk.size_bytes(1) + disk.size_bytes(2)).heads()) == {1, 2}
    assert set(make(tmp_path, disk.size_bytes(1)).heads()) == {1}
    assert make(tmp_path, 0).heads() == {} and files(tmp_path) == []


@pytest.mark.parametrize("position", [-1, 400, 2000])
def test_a_damaged_copy_is_dropped_with_a_word(tmp_path: Path, position: int) -> None:
    warnings: list[str] = []
    disk = make(tmp_path, warnings=warnings)
    assert disk.write(state(0))
    path = tmp_path / "spares" / "fragment-000.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(bytes(content))
    assert disk.read(0) is None and disk.heads() == {} and not path.exists()
    assert len(warnings) == 1 and "spare copy of fragment 0 is damaged and was dropped" in warnings[0]
    assert disk.write(state(0)) and disk.read(0) is not None


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x10" + b"\0" * 7 + b'{"a":1}        '])
def test_a_start_finds_damage_in_what_files_say_and_leaves_what_is_not_its_own(tmp_path: Path, content: bytes) -> None:
    disk = make(tmp_path)
    assert disk.write(state(1))
    folder = tmp_path / "spares"
    (folder / "fragment-000.safetensors").write_bytes(content)
    (folder / ".fragment-001.safetensors.abc.tmp").write_bytes(b"half of it")
    (folder / "notes.txt").write_bytes(b"somebody's")
    warnings: list[str] = []
    assert set(make(tmp_path, warnings=warnings).heads()) == {1}
    assert files(tmp_path) == ["fragment-001.safetensors", "notes.txt"]
    assert len(warnings) == 1 and "was dropped" in warnings[0]


def test_a_copy_under_another_s_name_or_of_another_run_is_dropped(tmp_path: Path) -> None:
    disk = make(tmp_path)
    assert disk.write(state(1)) and disk.write(state(0))
    folder = tmp_path / "spares"
    (folder / "fragment-001.safetensors").rename(folder / "fragment-002.safetensors")
    (folder / "fragment-000.safetensors").rename(folder / "fragment-099.safetensors")
    assert make(tmp_path).heads() == {} and files(tmp_path) == []


def test_a_copy_that_has_gone_is_a_word_and_no_error(tmp_path: Path) -> None:
    warnings: list[str] = []
    disk = make(tmp_path, warnings=warnings)
    assert disk.write(state(0))
    (tmp_path / "spares" / "fragment-000.safetensors").unlink()
    assert disk.read(0) is None and disk.heads() == {} and len(warnings) == 1


def test_a_full_disk_costs_the_new_copy_only(tmp_path: Path) -> None:
    """A limit on the size of files does what a full disk does: the write fails half way."""
    disk = make(tmp_path)
    assert disk.write(state(1))
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.unit.train.test_spare_disk import make, state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
said = []
disk = make(Path({str(tmp_path)!r}), warnings=said)
assert not disk.write(state(0)) and not disk.write(state(1, 9))
assert len(said) == 2 and all("was not written, training goes on" in text for text in said), said
assert "disk is full" in said[0], said
assert disk.read(1).version == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == ["fragment-001.safetensors"], "no half of a file is left behind"


def test_a_folder_that_cannot_be_made_is_a_word(tmp_path: Path) -> None:
    warnings: list[str] = []
    (tmp_path / "spares").write_text("a file")
    disk = make(tmp_path, warnings=warnings)
    assert not disk.write(state(0)) and "was not written" in warnings[0] and disk.heads() == {}


@pytest.mark.parametrize(("free", "share"), [(50 * 10**9, 5 * 10**9), (10**13, 20 * 10**9), (0, 0)])
def test_by_itself_a_peer_takes_a_tenth_of_what_is_free_and_20_gb_at_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, share: int
) -> None:
    monkeypatch.setattr(spare_disk.state_file, "free_bytes", lambda folder: free)
    assert room_bytes(None, tmp_path) == share
    assert room_bytes(0, tmp_path) == 0 and room_bytes(10**14, tmp_path) == 10**14


def test_checkpoints_of_fragments_that_were_held_before_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for held in ([state(0, 3), state(1, 3)], [state(1, 4)], [state(1, 5), state(2, 5)]):
        write(folder, Checkpoint(held), num_fragments=3)
    found = older(folder, numels=NUMELS, num_fragments=3, num_buffers=1)
    assert [(s.fragment, s.version, s.digest) for s in found] == [
        (s.fragment, s.version, s.digest) for s in (state(0, 3), state(1, 5), state(2, 5))
    ]
    assert [s.fragment for s in older(folder, numels={0: 512}, num_fragments=3, num_buffers=1)] == [0]
    (folder / "000003" / "manifest.json").write_text("damaged")
    found = older(folder, numels=NUMELS, num_fragments=3, num_buffers=1)
    assert [(s.fragment, s.version) for s in found] == [(0, 3), (1, 4)]
    assert older(tmp_path / "none", numels=NUMELS, num_fragments=3, num_buffers=1) == []


def test_sizes_are_those_of_the_files_and_no_less(tmp_path: Path) -> None:
    disk = make(tmp_path)
    assert disk.write(state(0))
    assert 4 * 2 * 512 < (tmp_path / "spares" / "fragment-000.safetensors").stat().st_size <= disk.size_bytes(0)
    assert disk.size_bytes(0) == state_file.file_bytes(512, 1)
