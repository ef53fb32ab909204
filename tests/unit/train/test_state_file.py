"""A state comes back from its file bit for bit, or not at all; and others' readers can read the file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from swarm.averaging import roll
from swarm.averaging.global_state import GlobalState
from swarm.averaging.roll import Entry
from swarm.errors import HomeError, StateError
from swarm.network.keys import Keypair
from swarm.network.records import Head
from swarm.train import state_file

NUMEL = 512


def some_state(*, fragment: int = 3, version: int = 42, numel: int = NUMEL, num_buffers: int = 1) -> GlobalState:
    generator = torch.Generator().manual_seed(version)
    weights, *buffers = (torch.randn(numel, generator=generator) for _ in range(1 + num_buffers))
    return GlobalState(fragment, version, version * 1000, weights, tuple(buffers))


def head_of(state: GlobalState) -> Head:
    return Head(version=state.version, digest=state.digest, tokens=state.tokens)


def read(path: Path, state: GlobalState) -> GlobalState:
    return state_file.read(
        path, fragment=state.fragment, head=head_of(state), numel=state.weights.numel(), num_buffers=len(state.buffers)
    )


@pytest.mark.parametrize("num_buffers", [0, 1, 2])
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, num_buffers: int) -> None:
    state, path = some_state(num_buffers=num_buffers), tmp_path / "state.safetensors"
    assert state_file.write(path, state) == hashlib.sha256(path.read_bytes()).hexdigest() == state_file.sha256(path)
    again = read(path, state)
    assert again.digest == state.digest and (again.fragment, again.version, again.tokens) == (3, 42, 42000)
    pairs = zip([again.weights, *again.buffers], [state.weights, *state.buffers], strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert path.stat().st_size <= state_file.file_bytes(NUMEL, num_buffers)


def test_who_has_contributed_comes_back_and_one_more_or_less_is_another_state(tmp_path: Path) -> None:
    names = sorted(Keypair(bytes([i]) * 32).peer_id for i in range(1, 129))
    listed = tuple(Entry(name, 2**40, 2**40, 10**15) for name in names)
    state, path = dataclasses.replace(some_state(), roll=listed), tmp_path / "state.safetensors"
    state_file.write(path, state)
    again = read(path, state)
    assert again.roll == listed and again.digest == state.digest
    assert state_file.head_in(path) == (3, head_of(state))
    assert path.stat().st_size <= state_file.file_bytes(NUMEL, 1)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["roll"]) == roll.to_json(listed)
    for text in ("[]", "[[", "null", "9" * 5000, json.dumps(roll.to_json(listed[1:]))):
        tensors = {"weights": state.weights, "buffer-0": state.buffers[0]}
        save_file(tensors, path, metadata={"roll": text})
        with pytest.raises(StateError, match="does not hold the state"):
            read(path, state)


def test_other_programs_read_the_file_and_what_it_says_of_itself(tmp_path: Path) -> None:
    state, path = some_state(), tmp_path / "state.safetensors"
    state_file.write(path, state)
    tensors = load_file(path)
    assert set(tensors) == {"weights", "buffer-0"} and torch.equal(tensors["weights"], state.weights)
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    assert said == {"fragment": "3", "version": "42", "tokens": "42000", "digest": state.digest}
    assert state_file.head_in(path) == (3, head_of(state))


def test_a_state_that_was_read_stays_what_it_was_when_its_file_is_replaced_or_gone(tmp_path: Path) -> None:
    """A spare is served while it is renewed, and a checkpoint's states outlive its folder."""
    state, path = some_state(), tmp_path / "state.safetensors"
    state_file.write(path, state)
    again = read(path, state)
    state_file.write(path, some_state(version=43))
    assert torch.equal(again.weights, state.weights)
    path.unlink()
    assert torch.equal(again.weights, state.weights) and torch.equal(again.buffers[0], state.buffers[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_flipped_bit_gets_through(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    state = some_state(numel=256)
    path = tmp_path_factory.mktemp("flip") / "state.safetensors"
    state_file.write(path, state)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    try:
        again = read(path, state)
    except StateError:
        return
    assert torch.equal(again.weights, state.weights), "only what a file says of itself may be another"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, 300, 2000])
def test_a_file_that_was_cut_off_is_no_state(tmp_path: Path, length: int) -> None:
    state, path = some_state(), tmp_path / "state.safetensors"
    state_file.write(path, state)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StateError, match="does not hold the state"):
        read(path, state)


def test_another_shape_kind_or_head_is_no_state(tmp_path: Path) -> None:
    state, path = some_state(), tmp_path / "state.safetensors"
    state_file.write(path, state)
    for numel, num_buffers in ((NUMEL - 1, 1), (NUMEL, 2)):
        with pytest.raises(StateError):
            state_file.read(path, fragment=3, head=head_of(state), numel=numel, num_buffers=num_buffers)
    for head in (head_of(some_state(version=41)), Head(version=43, digest=state.digest, tokens=state.tokens)):
        with pytest.raises(StateError):
            state_file.read(path, fragment=3, head=head, numel=NUMEL, num_buffers=1)
    halves = {"weights": state.weights.half(), "buffer-0": state.buffers[0].half()}
    save_file(halves, path)
    with pytest.raises(StateError):
        read(path, state)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none", state)


@pytest.mark.parametrize("said", [
    None, {}, {"fragment": "x"}, {"fragment": "3", "version": "-1", "tokens": "1", "digest": "a" * 64},
    {"fragment": "3", "version": "1", "tokens": "1", "digest": "zz"}, {"fragment": "3", "version": "1", "digest": "a"},
    {"fragment": "3", "version": "9" * 30, "tokens": "1", "digest": "a" * 64},
])
def test_a_file_that_does_not_say_what_it_is_is_refused(tmp_path: Path, said: object) -> None:
    path = tmp_path / "state.safetensors"
    text = json.dumps({"__metadata__": said}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(StateError, match="does not say"):
        state_file.head_in(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(StateError, match="does not say"):
        state_file.head_in(path)


def test_where_it_cannot_be_written_the_old_file_is_whole(tmp_path: Path) -> None:
    state, path = some_state(), tmp_path / "state.safetensors"
    state_file.write(path, state)
    with pytest.raises(HomeError, match="cannot write"):
        state_file.write(tmp_path / "no" / "folder", state)
    assert read(path, state).digest == state.digest and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_there_is_room_on_this_disk(tmp_path: Path) -> None:
    assert state_file.free_bytes(tmp_path) > 0
