"""How values travel, in a round or down the chain: int4 or int8 in blocks of 256 with an fp16 scale each, or fp32.

    encoded part = unit (fp32) | scale of each block (fp16, times unit) | int8 of fine blocks | int4 pairs of the rest

`unit` is the largest scale of the part, so the fp16 scales lie in 0..1 however small the values are (fine-tuning moves
weights by 1e-5, where a bare fp16 scale has lost its precision). Values are rounded to nearest, symmetric, without
zero point: int4 uses -7..7, int8 -127..127. Plain torch is as fast as bitsandbytes here and has less error on Gaussian
values (measured; DESIGN notes). An fp16 scale is off by up to 2^-11, which clips a block's largest value by up to 0.06
of a quantum; under 2^-14 of the unit it is coarser, and blocks under 2^-25 of it become zero. What is lost either way
is in the error feedback of whoever encoded it. Decoding is the same elementary operations everywhere: one int to float
conversion and one rounded multiplication, so all peers get the same bits (I1).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from swarm.errors import BadMessage, PeerRefused

assert sys.byteorder == "little", "the wire format is little-endian; a big-endian machine would need swaps here"

BLOCK = 256
"""values that share a scale"""
_UNIT_BYTES = 4
_SCALE_BYTES = 2
STRIDE_BLOCKS = 2048
MAX_MAGNITUDE = 1e30
"""of a unit, and of an fp32 value: sums of what strangers send stay finite"""


def encoded_bytes(num_fine: int, num_coarse: int, bits: int) -> int:
    """Exact size of an encoded part with so many fine and coarse blocks."""
    if bits == 32:
        return (num_fine + num_coarse) * BLOCK * 4
    coarse = BLOCK if bits == 8 else BLOCK // 2
    return _UNIT_BYTES + (num_fine + num_coarse) * _SCALE_BYTES + num_fine * BLOCK + num_coarse * coarse


def encode(values: torch.Tensor, num_fine: int, bits: int) -> bytes:
    """Encode fp32 `values` [num_blocks * 256], of which the first `num_fine` blocks keep 8 bits.

    Raises PeerRefused where a value is not finite or beyond all reason: this peer has nothing to contribute then, and
    the others go on without it.
    """
    return encode_and_read(values, num_fine, bits)[0]


def encode_and_read(values: torch.Tensor, num_fine: int, bits: int) -> tuple[bytes, torch.Tensor]:
    """(encoded, what `decode` makes of it, fp32 [num_blocks * 256]); for who keeps an error feedback."""
    values = values.contiguous()
    blocks = values.view(-1, BLOCK)
    absmax = torch.maximum(blocks.amax(dim=1), -blocks.amin(dim=1)) if len(blocks) else torch.zeros(0)
    largest = float(absmax.max()) if len(blocks) else 0.0
    if bits == 32:
        if not largest < MAX_MAGNITUDE:  # true for NaN too
            raise PeerRefused("values that are not finite cannot be averaged")
        return values.numpy().tobytes(), values
    levels = _levels(len(blocks), num_fine, bits)
    scales = absmax / levels
    unit = float(scales.max()) if len(blocks) else 0.0
    if not unit < MAX_MAGNITUDE:
        raise PeerRefused("values that are not finite cannot be averaged")
    if unit == 0.0:
        relative = torch.zeros(len(blocks), dtype=torch.float16)
    else:
        relative = (scales / unit).to(torch.float16)
    exact = (relative.to(torch.float32) * unit).unsqueeze(1)  # what the receiver will multiply with
    divisor = torch.where(exact > 0, exact, torch.inf)  # a block whose scale is gone becomes zero
    limit = levels.unsqueeze(1)
    said = torch.empty_like(blocks)
    fine = torch.empty(len(blocks) if bits == 8 else num_fine, BLOCK, dtype=torch.int8)
    packed = torch.empty(len(blocks) - len(fine), BLOCK // 2, dtype=torch.uint8)
    for start, end in _strides(len(blocks), len(fine)):
        span = slice(start, end)
        whole = torch.div(blocks[span], divisor[span], out=said[span]).round_()
        torch.minimum(torch.maximum(whole, -limit[span], out=whole), limit[span], out=whole)
        integers = whole.to(torch.int8)
        if end <= len(fine):
            fine[span] = integers
        else:
            pairs = (integers + 8).view(torch.int16)  # two nibbles, the first one in the low byte
            packed[start - len(fine):end - len(fine)] = (pairs | (pairs >> 4)).to(torch.uint8)
        whole.mul_(exact[span])
    header = torch.tensor([unit], dtype=torch.float32).numpy().tobytes() + relative.numpy().tobytes()
    return b"".join((header, fine.numpy().data, packed.numpy().data)), said.view(-1)


def decode(data: bytes, num_blocks: int, num_fine: int, bits: int) -> torch.Tensor:
    """The fp32 values [num_blocks * 256] of an encoded part. Raises BadMessage on a wrong size, a scale that is not
    finite, negative or over 1, or (fp32) a value that is not: nothing else can come out than bounded numbers."""
    wanted = encoded_bytes(num_fine, num_blocks - num_fine, bits)
    if len(data) != wanted:
        raise BadMessage("an encoded part of a wrong size", why=f"{len(data)} bytes, expected {wanted}")
    if num_blocks == 0:
        return torch.zeros(0)
    if bits == 32:
        values = torch.frombuffer(bytearray(data), dtype=torch.float32)
        if not max(float(values.max()), -float(values.min())) < MAX_MAGNITUDE:  # true for NaN too
            raise BadMessage("an encoded part with values that are not finite")
        return values
    content = bytearray(data)  # torch wants to be able to write
    unit = float(torch.frombuffer(content, dtype=torch.float32, count=1)[0])
    relative = torch.frombuffer(content, dtype=torch.float16, count=num_blocks, offset=_UNIT_BYTES).to(torch.float32)
    if not 0 <= unit < MAX_MAGNITUDE:  # true for NaN too
        raise BadMessage("an encoded part with an impossible unit")
    if not bool(((relative >= 0) & (relative <= 1)).all()):  # false for NaN too
        raise BadMessage("an encoded part with an impossible scale")
    scales = (relative * unit).unsqueeze(1)
    bytes_at = _UNIT_BYTES + num_blocks * _SCALE_BYTES
    body = torch.frombuffer(content, dtype=torch.uint8, offset=bytes_at)
    num_wide = num_blocks if bits == 8 else num_fine
    fine = body[:num_wide * BLOCK].view(torch.int8).view(-1, BLOCK)
    packed = body[num_wide * BLOCK:].view(-1, BLOCK // 2)
    values = torch.empty(num_blocks, BLOCK)
    for start, end in _strides(num_blocks, num_wide):
        if end <= num_wide:
            values[start:end] = fine[start:end]
        else:
            pairs = packed[start - num_wide:end - num_wide].to(torch.int16)
            nibbles = (pairs | (pairs << 4)).bitwise_and_(0x0F0F).view(torch.uint8)
            torch.sub(nibbles, 8.0, out=values[start:end])
        values[start:end].mul_(scales[start:end])
    return values.view(-1)


def _strides(num_blocks: int, num_fine: int) -> Iterator[tuple[int, int]]:
    """Runs of blocks, the fine ones first, that fit the cache: large temporary tensors cost four times the arithmetic,
    because the kernel hands out their memory page by page (measured: 20 ms instead of 5 for 10 M values)."""
    for first, last in ((0, num_fine), (num_fine, num_blocks)):
        for start in range(first, last, STRIDE_BLOCKS):
            yield start, min(start + STRIDE_BLOCKS, last)


def _levels(num_blocks: int, num_fine: int, bits: int) -> torch.Tensor:
    levels = torch.full((num_blocks,), 127.0 if bits == 8 else 7.0)
    levels[:num_fine] = 127.0
    return levels
