"""How values travel in a round: int4 or int8 in blocks of 256 with an fp16 scale each, or fp32 as they are.

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

import torch

from swarm.averaging.layout import BLOCK
from swarm.errors import BadMessage, PeerRefused

assert sys.byteorder == "little", "the wire format is little-endian; a big-endian machine would need swaps here"

_UNIT_BYTES = 4
_SCALE_BYTES = 2
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
    if bits == 32:
        if not bool((values.abs() < MAX_MAGNITUDE).all()):  # false for NaN too
            raise PeerRefused("values that are not finite cannot be averaged")
        return values.numpy().tobytes(), values
    blocks = values.view(-1, BLOCK)
    levels = _levels(len(blocks), num_fine, bits)
    absmax = blocks.abs().amax(dim=1)
    scales = absmax / levels
    unit = float(scales.max()) if len(blocks) else 0.0
    if not unit < MAX_MAGNITUDE:  # true for NaN too
        raise PeerRefused("values that are not finite cannot be averaged")
    if unit == 0.0:
        relative = torch.zeros(len(blocks), dtype=torch.float16)
    else:
        relative = (scales / unit).to(torch.float16)
    exact = (relative.to(torch.float32) * unit).unsqueeze(1)  # what the receiver will multiply with
    divisor = torch.where(exact > 0, exact, torch.inf)  # a block whose scale is gone becomes zero
    limit = levels.unsqueeze(1)
    whole = (blocks / divisor).round_().clamp_(-limit, limit)
    integers = whole.to(torch.int8)
    said = whole.mul_(exact).view(-1)
    header = torch.tensor([unit], dtype=torch.float32).numpy().tobytes() + relative.numpy().tobytes()
    if bits == 8:
        return header + integers.numpy().tobytes(), said
    fine, coarse = integers[:num_fine], integers[num_fine:]
    pairs = (coarse + 8).view(torch.int16)  # two nibbles, the first one in the low byte
    packed = (pairs | (pairs >> 4)).to(torch.uint8)
    return header + fine.numpy().tobytes() + packed.numpy().tobytes(), said


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
        if not bool((values.abs() < MAX_MAGNITUDE).all()):
            raise BadMessage("an encoded part with values that are not finite")
        return values
    unit = float(torch.frombuffer(bytearray(data[:_UNIT_BYTES]), dtype=torch.float32)[0])
    at = _UNIT_BYTES + num_blocks * _SCALE_BYTES
    relative = torch.frombuffer(bytearray(data[_UNIT_BYTES:at]), dtype=torch.float16).to(torch.float32)
    if not 0 <= unit < MAX_MAGNITUDE:  # true for NaN too
        raise BadMessage("an encoded part with an impossible unit")
    if not bool(((relative >= 0) & (relative <= 1)).all()):  # false for NaN too
        raise BadMessage("an encoded part with an impossible scale")
    scales = relative * unit
    integers = torch.empty(num_blocks, BLOCK, dtype=torch.float32)
    fine_bytes = (num_blocks if bits == 8 else num_fine) * BLOCK
    if fine_bytes:
        integers[:fine_bytes // BLOCK] = (
            torch.frombuffer(bytearray(data[at:at + fine_bytes]), dtype=torch.int8).view(-1, BLOCK).to(torch.float32)
        )
    if fine_bytes // BLOCK < num_blocks:
        packed = torch.frombuffer(bytearray(data[at + fine_bytes:]), dtype=torch.uint8)
        pairs = torch.stack((packed & 15, packed >> 4), dim=1).view(-1, BLOCK)
        integers[fine_bytes // BLOCK:] = pairs.to(torch.float32) - 8.0
    return (integers * scales.unsqueeze(1)).view(-1)


def _levels(num_blocks: int, num_fine: int, bits: int) -> torch.Tensor:
    levels = torch.full((num_blocks,), 127.0 if bits == 8 else 7.0)
    levels[:num_fine] = 127.0
    return levels
