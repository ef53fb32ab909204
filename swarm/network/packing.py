"""Small whole numbers into bytes and back: a byte each, two to a byte, or four to a byte.

    8 bits   -127..127   as int8
    4 bits     -7..8     plus 7, the first of two in the low half of a byte
    2 bits     -1..2     plus 1, the first of four in the lowest two bits of a byte

4 and 2 bits leave no code unused: zero has one, and one more number lies above it than below. Which way is up is said
by the sign of a block's scale (codec.py). Numbers are squeezed where they lie: those of one byte, seen as one int16 or
int32, are shifted onto each other, which is whole-number arithmetic that vector units do at the speed of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Width:
    bits: int
    lowest: int
    highest: int

    @property
    def to_a_byte(self) -> int:
        return 8 // self.bits


EIGHT, FOUR, TWO = Width(8, -127, 127), Width(4, -7, 8), Width(2, -1, 2)


def pack(whole: torch.Tensor, width: Width, out: torch.Tensor) -> None:
    """`whole`: fp32 [rows, columns] of whole numbers in the width's range, left as it is; `out`: uint8 [rows, columns /
    numbers to a byte]."""
    if width is EIGHT:
        out.view(torch.int8).copy_(whole)
        return
    codes = whole.to(torch.int8).sub_(width.lowest)
    if width is FOUR:
        pairs = codes.view(torch.int16)
        out.copy_(pairs.bitwise_or_(pairs >> 4))  # to uint8: the low byte
        return
    fours = codes.view(torch.int32)
    fours.bitwise_or_(fours >> 6)
    out.copy_(fours.bitwise_or_(fours >> 12))


def unpack(packed: torch.Tensor, width: Width, out: torch.Tensor) -> None:
    """`packed`: uint8 [rows, bytes]; `out`: fp32 [rows, bytes x numbers to a byte], becomes whole numbers. Any byte
    can be unpacked; one of 8 bits may be -128."""
    if width is EIGHT:
        out.copy_(packed.view(torch.int8))
        return
    if width is FOUR:
        pairs = packed.to(torch.int16)
        codes = pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.int8)
    else:
        fours = packed.to(torch.int32)
        fours.bitwise_or_(fours << 12)
        codes = fours.bitwise_or_(fours << 6).bitwise_and_(0x03030303).view(torch.int8)
    out.copy_(codes.add_(width.lowest))
