"""Global state: its digest names every bit, its chunks tile it."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging import global_state
from swarm.averaging.global_state import (
    CHUNK_BYTES,
    GlobalState,
    chunk_length,
    digest_of,
    initial_state,
    num_chunks,
)
from swarm.averaging.roll import Entry

fixed = settings(max_examples=40, derandomize=True, deadline=None)
PER_CHUNK = CHUNK_BYTES // 4


def state_of(
    numel: int, num_buffers: int = 1, *, fragment: int = 2, version: int = 7, tokens: int = 900
) -> GlobalState:
    generator = torch.Generator().manual_seed(numel)
    tensors = [torch.randn(numel, generator=generator) for _ in range(1 + num_buffers)]
    return GlobalState(fragment, version, tokens, tensors[0], tuple(tensors[1:]))


@fixed
@given(st.integers(0, 1), st.integers(0, 511), st.integers(0, 31))
def test_any_single_bit_changes_the_digest(tensor: int, index: int, bit: int) -> None:
    state = state_of(512)
    flipped = [values.clone() for values in (state.weights, *state.buffers)]
    flipped[tensor].view(torch.int32)[index] ^= -(2**31) if bit == 31 else 1 << bit
    other = GlobalState(state.fragment, state.version, state.tokens, flipped[0], tuple(flipped[1:]))
    assert other.digest != state.digest


def test_version_tokens_and_fragment_change_the_digest() -> None:
    state = state_of(300)
    others = [
        dataclasses.replace(state, fragment=3), dataclasses.replace(state, version=8),
        dataclasses.replace(state, tokens=901), dataclasses.replace(state, weights=state.buffers[0]),
        dataclasses.replace(state, weights=state.buffers[0], buffers=(state.weights,)),
        dataclasses.replace(state, buffers=()),
    ]
    digests = {state.digest, *(other.digest for other in others)}
    assert len(digests) == 1 + len(others)
    assert dataclasses.replace(state).digest == state.digest


def test_who_contributed_is_part_of_the_digest_and_nobody_is_as_before() -> None:
    """Versions from before there were rolls keep their digests; the start of a run is one of them."""
    state = state_of(300)
    one, two = Entry("a", 7, 5, 9), Entry("b", 7, 5, 9)
    rolls = [(), (one,), (two,), (one, two), (dataclasses.replace(one, trained=10),)]
    assert len({dataclasses.replace(state, roll=roll).digest for roll in rolls}) == len(rolls)
    assert dataclasses.replace(state, roll=()).digest == state.digest
    said = digest_of(state.fragment, state.version, state.tokens, state.chunk_hashes, (one,))
    assert said == dataclasses.replace(state, roll=(one,)).digest


def test_negative_zero_is_another_state_than_zero() -> None:
    """They compare equal, but 1 / x does not: peers must not differ even there."""
    state = initial_state(0, torch.zeros(256), 1)
    assert GlobalState(0, 0, 0, -torch.zeros(256), state.buffers).digest != state.digest


def test_the_digest_is_what_the_docstring_says() -> None:
    """Whoever writes another implementation has to get this."""
    state = state_of(PER_CHUNK + 5, fragment=3, version=2**40, tokens=10**15)
    hashes = b""
    for values in (state.weights, *state.buffers):
        raw = values.numpy().tobytes()
        hashes += b"".join(
            hashlib.sha256(raw[at:at + CHUNK_BYTES]).digest() for at in range(0, len(raw), CHUNK_BYTES)
        )
    head = b"swarm state\0" + struct.pack("<IQQ", 3, 2**40, 10**15)
    assert state.digest == hashlib.sha256(head + hashes).hexdigest()
    assert state.chunk_hashes == hashes and digest_of(3, 2**40, 10**15, hashes) == state.digest


@pytest.mark.parametrize("numel", [1, 256, PER_CHUNK - 1, PER_CHUNK, PER_CHUNK + 1, 3 * PER_CHUNK + 77])
@pytest.mark.parametrize("num_buffers", [0, 1, 2])
def test_chunks_tile_the_state(numel: int, num_buffers: int) -> None:
    state = state_of(numel, num_buffers)
    assert state.num_chunks == num_chunks(numel, num_buffers)
    chunks = [bytes(state.chunk(index)) for index in range(state.num_chunks)]
    assert [len(chunk) for chunk in chunks] == [chunk_length(numel, index) for index in range(state.num_chunks)]
    assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in chunks)
    assert b"".join(chunks) == b"".join(values.numpy().tobytes() for values in (state.weights, *state.buffers))
    assert len(state.chunk_hashes) == state.num_chunks * global_state.HASH_BYTES
    with pytest.raises(IndexError):
        state.chunk(state.num_chunks)


@fixed
@given(st.integers(1, 4 * PER_CHUNK), st.integers(0, 2))
def test_chunk_arithmetic_for_any_size(numel: int, num_buffers: int) -> None:
    total = num_chunks(numel, num_buffers)
    lengths = [chunk_length(numel, index) for index in range(total)]
    assert sum(lengths) == numel * 4 * (1 + num_buffers)
    assert all(0 < length <= CHUNK_BYTES for length in lengths)


def test_a_state_is_immutable_and_starts_with_empty_buffers() -> None:
    weights = torch.randn(256, generator=torch.Generator().manual_seed(0))
    state = initial_state(5, weights, 2)
    assert (state.fragment, state.version, state.tokens, len(state.buffers)) == (5, 0, 0, 2)
    assert all(torch.count_nonzero(buffer) == 0 for buffer in state.buffers)
    assert state.buffers[0].data_ptr() != state.buffers[1].data_ptr()
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.version = 1  # type: ignore[misc]
    assert state.digest is state.digest, "computed once"
    assert "tensor" not in repr(state), "errors that name a state stay readable"


def test_the_digest_is_the_same_with_any_number_of_threads() -> None:
    digests = set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            digests.add(state_of(100_000).digest)
    finally:
        torch.set_num_threads(1)
    assert len(digests) == 1
