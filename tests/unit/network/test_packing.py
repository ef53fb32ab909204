"""Numbers of 2, 4 and 8 bits into bytes and back: by hand, every byte, every number, any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.network.packing import EIGHT, FOUR, TWO, Width, pack, unpack

widths = pytest.mark.parametrize("width", [TWO, FOUR, EIGHT])


def packed(whole: torch.Tensor, width: Width) -> torch.Tensor:
    out = torch.empty(whole.shape[0], whole.shape[1] // width.to_a_byte, dtype=torch.uint8)
    pack(whole, width, out)
    return out


def unpacked(data: torch.Tensor, width: Width) -> torch.Tensor:
    out = torch.full((data.shape[0], data.shape[1] * width.to_a_byte), torch.nan)
    unpack(data, width, out)
    return out


def test_bytes_by_hand() -> None:
    """What another program would have to write: a wire format is these lines."""
    assert packed(torch.tensor([[-1.0, 0.0, 1.0, 2.0, 2.0, -1.0, -1.0, 0.0]]), TWO).tolist() == [
        [0b11_10_01_00, 0b01_00_00_11]
    ]
    assert packed(torch.tensor([[-7.0, 8.0, 0.0, 1.0]]), FOUR).tolist() == [[0xF0, 0x87]]
    assert packed(torch.tensor([[-127.0, 127.0, 0.0, -1.0]]), EIGHT).tolist() == [[129, 127, 0, 255]]


@widths
def test_every_byte_is_read_as_its_numbers(width: Width) -> None:
    """And written back as it was; -128 alone is read, and never written by us."""
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    found = unpacked(every, width)
    lowest = -128 if width is EIGHT else width.lowest
    assert found.min() == lowest and found.max() == width.highest
    assert len(found.unique()) == 2**width.bits, "no code is unused, none means the same as another"
    assert torch.equal(packed(found, width), every)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.sampled_from([TWO, FOUR, EIGHT]), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_any_numbers_come_back(width: Width, rows: int, eights: int, seed: int) -> None:
    """And what is packed is left as it is."""
    dice = np.random.default_rng(seed)
    numbers = dice.integers(width.lowest, width.highest + 1, (rows, 8 * eights)).astype(np.float32)
    whole = torch.from_numpy(numbers.copy())
    assert torch.equal(unpacked(packed(whole, width), width), whole)
    assert np.array_equal(whole.numpy(), numbers)


@widths
def test_bytes_are_left_alone_and_written_where_they_belong(width: Width) -> None:
    """Into rows of a longer buffer, as the codec does, and not a byte beside them."""
    buffer = torch.full((3, 32), 77, dtype=torch.uint8)
    pack(torch.zeros(1, 32 * width.to_a_byte), width, buffer[1:2])
    assert buffer[0].eq(77).all() and buffer[2].eq(77).all() and not buffer[1].eq(77).all()
    before = buffer.clone()
    assert not unpacked(buffer[1:2], width).any() and torch.equal(buffer, before)


@widths
def test_minus_zero_is_zero(width: Width) -> None:
    """Rounding makes some; a code has no sign for nothing."""
    plain = packed(torch.zeros(2, 64), width)
    assert torch.equal(packed(torch.full((2, 64), -0.0), width), plain)
    assert not torch.signbit(unpacked(plain, width)).any()


def test_a_width_says_how_many_go_into_a_byte() -> None:
    assert [width.to_a_byte for width in (TWO, FOUR, EIGHT)] == [4, 2, 1]
    for width in (TWO, FOUR):
        assert width.highest - width.lowest + 1 == 2**width.bits
