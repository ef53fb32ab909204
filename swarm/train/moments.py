"""AdamW's two moments of one parameter: fp32, or 8 bits a value in blocks of 256.

The 8 bits are those of bitsandbytes' 8-bit optimizers (https://arxiv.org/abs/2110.02861): its dynamic maps, an fp32
scale a block, its own functions on whatever device it has them for, the CPU included. Its optimizers themselves want
temporary fp32 copies of a whole parameter, which for a large embedding are more than all that is saved: here a step
goes through it in strides.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import torch

BLOCK = 256
MIN_VALUES = 4096
"""smaller parameters keep fp32 moments, as bitsandbytes has it: norms and biases need it and take nothing"""


class Moments(Protocol):
    """Of a parameter, counted flat; [start, end) begins at a multiple of 256."""

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(first, second), fp32 [end - start]; to be changed in place, then given to `write`."""

    def write(self, start: int, first: torch.Tensor, second: torch.Tensor) -> None: ...


def moments_of(parameter: torch.Tensor, bits: int) -> Moments:
    """All zero. `bits`: 32 or 8."""
    return EightBit(parameter) if bits == 8 and parameter.numel() >= MIN_VALUES else Exact(parameter)


class Exact:
    def __init__(self, parameter: torch.Tensor) -> None:
        self._both = torch.zeros(2, parameter.numel(), device=parameter.device)

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._both[0, start:end], self._both[1, start:end]

    def write(self, start: int, first: torch.Tensor, second: torch.Tensor) -> None:
        """They are views: nothing is left to do."""


class EightBit:
    def __init__(self, parameter: torch.Tensor) -> None:
        numel, device = parameter.numel(), parameter.device
        self._maps = _maps(device)
        # zero scales: whatever the codes are, all values are zero
        self._codes = torch.zeros(2, numel, dtype=torch.uint8, device=device)
        self._scales = torch.zeros(2, -(-numel // BLOCK), device=device)

    def read(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (
            _bitsandbytes().dequantize_blockwise(
                self._codes[which, start:end], absmax=self._scales[which, start // BLOCK:-(-end // BLOCK)],
                code=self._maps[which], blocksize=BLOCK,
            ) for which in (0, 1)
        )
        return first, second

    def write(self, start: int, first: torch.Tensor, second: torch.Tensor) -> None:
        for which, values in enumerate((first, second)):
            codes, state = _bitsandbytes().quantize_blockwise(values, code=self._maps[which], blocksize=BLOCK)
            self._codes[which, start:start + values.numel()] = codes
            self._scales[which, start // BLOCK:start // BLOCK + len(state.absmax)] = state.absmax


def eight_bit_problem(device: torch.device) -> str:
    """Why there are no 8-bit moments on this device, or "". It is tried, not looked up."""
    try:
        values = torch.linspace(-1, 1, 2 * BLOCK, device=device)
        moments = EightBit(values)
        moments.write(0, values, values.square())
        first, second = moments.read(0, 2 * BLOCK)
    except Exception as error:  # what is missing shows in as many ways as there are libraries below
        return f"bitsandbytes cannot do it on {device}: {(str(error).splitlines() or [type(error).__name__])[0]}"
    near = (first - values).abs().max() < 0.1 and (second - values.square()).abs().max() < 0.1
    return "" if near else f"bitsandbytes computes something else on {device}"


@functools.cache
def _maps(device: torch.device) -> torch.Tensor:
    """The values of the 256 codes, of the first moment and of the second, which is never negative."""
    functional = _bitsandbytes()
    return torch.stack([functional.create_dynamic_map(signed=True), functional.create_dynamic_map(signed=False)]).to(
        device
    )


@functools.cache
def _bitsandbytes() -> Any:
    """Only where it is needed: the import takes 2 s and 120 MB. What it says of kernels that it does not find is of no
    use here."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    finally:
        logger.setLevel(level)
    return bitsandbytes.functional
