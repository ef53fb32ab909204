"""How values travel, in a round or down the chain: 2, 4 or 8 bits in blocks of 256 with an fp16 scale each, or fp32.

    encoded part = unit (fp32) | scale of each block (fp16, times unit) | fine blocks, 8 bits | the rest (packing.py)

`unit` is the largest scale of the part, so the fp16 scales lie in -1..1 however small the values are (fine-tuning moves
weights by 1e-5, where a bare fp16 scale has lost its precision). A value is its scale times a whole number, the nearest
in range. A scale has the sign of its block's largest value, which so lies on the side where the numbers reach further
(2 bits: -1..2): a number is spared that a symmetric range would leave unused, and zero stays zero. An fp16 scale is off
by up to 2^-11, which shifts a block's largest value by up to 0.06 of a quantum; under 2^-14 of the unit it is coarser,
and blocks under 2^-25 of it become zero. What is lost either way is in the error feedback of whoever encoded it.
Decoding is the same elementary operations everywhere: one int to float conversion and one rounded multiplication, so
all peers get the same bits (I1).

On a GPU the values are scaled, rounded and packed there, and only bytes come to main memory: 2, 4 and 8 bits encode
8.7, 4.8 and 3.0 GB a second, and decode 44, 28 and 15 (one H200, `bench.py codec --device cuda`).

One core, GB of fp32 a CPU-second (`scripts/bench.py codec`): 2 and 4 bits encode 1.4, decode 2.4; encode and read 1.0,
for a large new tensor costs its page faults. bitsandbytes' CPU kernels: nf4 encode 0.11, decode 4.7; 8 bits 0.34, 2.6.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from swarm.errors import BadMessage, PeerRefused
from swarm.network.packing import EIGHT, FOUR, TWO, Width, pack, unpack

assert sys.byteorder == "little", "the wire format is little-endian; a big-endian machine would need swaps here"

CPU = torch.device("cpu")
BLOCK = 256
"""values that share a scale"""
COARSE = {2: TWO, 4: FOUR, 8: EIGHT}
"""bits -> how blocks are written that are not fine"""
REACH = {EIGHT: 127.0, FOUR: 8.0, TWO: 2.5}
"""A block's largest value over its scale. 2 bits: what feedback owes after 24 rounds, over a contribution's norm, of
normal values, Student's t (3), 5 % that are not zero, pseudo-gradients of the demo (one fragment, 9 rounds):

    -1..2, reach 2.5                    0.51  0.97  0.46  0.28
    -1..2, reach 2                      0.53  0.97  0.35  0.30
    no zero (0.5 and 1.5), reach 3      0.53  1.27  1.27  0.27
    0.5 and 1.5 times root mean square  1.00  3.27  4.84  0.29   and more with each round: what is clipped comes back
    -1..1, reach 1                      1.26  1.90  0.64  0.82
"""
STRIDE_BLOCKS, GPU_STRIDE_BLOCKS = 512, 2**16
MAX_MAGNITUDE = 1e30
"""of a unit, and of an fp32 value: sums of what strangers send stay finite"""
_UNIT_BYTES = 4
_SCALE_BYTES = 2


def encoded_bytes(num_fine: int, num_coarse: int, bits: int) -> int:
    """Exact size of an encoded part with so many fine and coarse blocks."""
    if bits == 32:
        return (num_fine + num_coarse) * BLOCK * 4
    coarse = BLOCK // COARSE[bits].to_a_byte
    return _UNIT_BYTES + (num_fine + num_coarse) * _SCALE_BYTES + num_fine * BLOCK + num_coarse * coarse


def encode(values: torch.Tensor, num_fine: int, bits: int) -> bytes:
    """Encode fp32 `values` [num_blocks * 256], of which the first `num_fine` blocks keep 8 bits, on their device.

    Raises PeerRefused where a value is not finite or beyond all reason: this peer has nothing to contribute then, and
    the others go on without it.
    """
    return _encode(values.contiguous(), num_fine, bits, None)


def encode_and_read(values: torch.Tensor, num_fine: int, bits: int) -> tuple[bytes, torch.Tensor]:
    """(encoded, what `decode` makes of it, fp32 [num_blocks * 256]); for who keeps an error feedback."""
    values = values.contiguous()
    said = values if bits == 32 else torch.empty_like(values)
    return _encode(values, num_fine, bits, said), said


def decode(
    data: bytes, num_blocks: int, num_fine: int, bits: int, *, device: torch.device = CPU
) -> torch.Tensor:
    """The fp32 values [num_blocks * 256] of an encoded part, worked out on `device`. Raises BadMessage on a wrong size,
    a scale that is not finite or beyond the unit, or (fp32) a value that is not: nothing else can come out than bounded
    numbers."""
    wanted = encoded_bytes(num_fine, num_blocks - num_fine, bits)
    if len(data) != wanted:
        raise BadMessage("an encoded part of a wrong size", why=f"{len(data)} bytes, expected {wanted}")
    if num_blocks == 0:
        return torch.zeros(0, device=device)
    if bits == 32:
        values = torch.frombuffer(bytearray(data), dtype=torch.float32)
        if not max(float(values.max()), -float(values.min())) < MAX_MAGNITUDE:  # true for NaN too
            raise BadMessage("an encoded part with values that are not finite")
        return values.to(device)
    head = bytearray(memoryview(data)[:_UNIT_BYTES + num_blocks * _SCALE_BYTES])  # torch wants to be able to write
    unit = float(torch.frombuffer(head, dtype=torch.float32, count=1)[0])
    relative = torch.frombuffer(head, dtype=torch.float16, offset=_UNIT_BYTES).to(torch.float32)
    if not 0 <= unit < MAX_MAGNITUDE:  # true for NaN too
        raise BadMessage("an encoded part with an impossible unit")
    if not bool((relative.abs() <= 1).all()):  # false for NaN too
        raise BadMessage("an encoded part with an impossible scale")
    scales = (relative * unit).unsqueeze(1).to(device)
    values, body = torch.empty(num_blocks, BLOCK, device=device), memoryview(data)[len(head):]
    for span, place, width in _strides(num_blocks, num_fine, bits, device):
        packed = torch.frombuffer(bytearray(body[place]), dtype=torch.uint8).view(-1, BLOCK // width.to_a_byte)
        unpack(packed.to(device), width, values[span])
        values[span].mul_(scales[span])
    return values.view(-1)


def _encode(values: torch.Tensor, num_fine: int, bits: int, said: torch.Tensor | None) -> bytes:
    """`said`, fp32 [num_blocks * 256], becomes what `decode` will make of the bytes."""
    blocks = values.view(-1, BLOCK)
    if bits == 32:
        if len(blocks) and not max(float(values.max()), -float(values.min())) < MAX_MAGNITUDE:  # true for NaN too
            raise PeerRefused("values that are not finite cannot be averaged")
        return values.cpu().numpy().tobytes()
    head, exact = _scales(blocks, num_fine, bits)
    divisor = torch.where(exact != 0, exact, torch.inf)  # a block whose scale is gone becomes zero
    data = bytearray(encoded_bytes(num_fine, len(blocks) - num_fine, bits))
    data[:len(head)] = head
    body = torch.frombuffer(data, dtype=torch.uint8)[len(head):] if len(blocks) else torch.zeros(0, dtype=torch.uint8)
    packed = body if values.device == CPU else torch.empty_like(body, device=values.device)
    work = torch.empty(min(_stride_blocks(values.device), len(blocks)), BLOCK, device=values.device)
    for span, place, width in _strides(len(blocks), num_fine, bits, values.device):
        whole = torch.div(blocks[span], divisor[span], out=work[:span.stop - span.start])
        whole.round_().clamp_(width.lowest, width.highest)
        pack(whole, width, packed[place].view(-1, BLOCK // width.to_a_byte))
        if said is not None:
            torch.mul(whole, exact[span], out=said.view(-1, BLOCK)[span])
    if packed is not body:
        body.copy_(packed)
    return bytes(data)


def _scales(blocks: torch.Tensor, num_fine: int, bits: int) -> tuple[bytes, torch.Tensor]:
    """(unit and scales as they travel, the scale of each block that the receiver multiplies with [num_blocks, 1])."""
    scales = torch.empty(len(blocks), device=blocks.device)
    for span, _, width in _strides(len(blocks), num_fine, bits, blocks.device):
        most, least = blocks[span].amax(dim=1), blocks[span].amin(dim=1)
        torch.div(torch.where(most >= -least, most, least), REACH[width], out=scales[span])
    unit = float(scales.abs().max()) if len(blocks) else 0.0
    if not unit < MAX_MAGNITUDE:  # true for NaN too
        raise PeerRefused("values that are not finite cannot be averaged")
    relative = (scales / unit if unit else torch.zeros_like(scales)).to(torch.float16)
    head = torch.tensor([unit], dtype=torch.float32).numpy().tobytes() + relative.cpu().numpy().tobytes()
    return head, (relative.to(torch.float32) * unit).unsqueeze(1)


def _stride_blocks(device: torch.device) -> int:
    """Blocks that fit the CPU's cache: larger temporary tensors cost four times the arithmetic there, because the
    kernel hands out their memory page by page. A GPU wants all of them at once."""
    return STRIDE_BLOCKS if device == CPU else GPU_STRIDE_BLOCKS


def _strides(
    num_blocks: int, num_fine: int, bits: int, device: torch.device
) -> Iterator[tuple[slice, slice, Width]]:
    """(blocks, their bytes in the body, how they are written): runs of a stride, the fine ones first."""
    at, stride = 0, _stride_blocks(device)
    for first, last, width in ((0, num_fine, EIGHT), (num_fine, num_blocks, COARSE[bits])):
        for start in range(first, last, stride):
            end = min(start + stride, last)
            size = (end - start) * BLOCK // width.to_a_byte
            yield slice(start, end), slice(at, at + size), width
            at += size
