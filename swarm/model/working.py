"""Working weights that take 3 bytes instead of 4: bfloat16, which the device computes with, and 8 further bits beside.

bfloat16 keeps 8 bits of a weight, an inner step often moves it by less, and what is averaged is the difference between
working and global weights: in bfloat16 alone that difference is mostly rounding, every round would carry it into the
global weights, and small steps would be lost. So each weight has 8 more bits, which the model never sees. Together they
are fp32 with 16 bits of 24: off by at most 2^-16 of the weight. Inner steps and rounds work on the fp32 value (`read`,
`write`); what a round changes and rounding loses stays in the drift, and so comes into the next round. Inner steps
round at random, right on average, so that steps below 2^-16 of a weight add up as well.

The idea is that of FlashOptim's split weights (arXiv 2602.23349): one byte a weight more than bfloat16 alone, and four
less than an fp32 master copy beside it. It costs a few integer operations a weight and inner step, which the optimizer
hides: it works in strides that fit the cache.

The further bits hang at their parameter. A parameter without them is plain fp32 and read and written as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

STRIDE = 2**18
"""values worked on at a time: temporary tensors stay in the cache, and are not memory to be planned"""


def halve(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Turn fp32 parameters into bfloat16 with 8 further bits, one after the other, in place. Other ones stay."""
    for parameter in parameters:
        if parameter.dtype == torch.float32 and rest_of(parameter) is None:
            values = parameter.data.contiguous().view(-1)
            parameter.data = torch.empty(parameter.shape, dtype=torch.bfloat16, device=parameter.device)
            rest = torch.empty(parameter.numel(), dtype=torch.int8, device=parameter.device)
            parameter.rest = rest  # type: ignore[attr-defined]
            write_all(parameter, values)


def rest_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """The further bits, int8 [numel]; None where it has none."""
    rest: torch.Tensor | None = getattr(parameter, "rest", None)
    return rest


def read(parameter: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """The values [start, end) of it, counted flat, in fp32 on its device. A plain fp32 tensor: a view."""
    flat, rest = parameter.detach().view(-1)[start:end], rest_of(parameter)
    if rest is None:
        return flat.to(torch.float32)
    bits = flat.view(torch.int16).to(torch.int32).bitwise_left_shift_(8).add_(rest[start:end])
    return bits.bitwise_left_shift_(8).view(torch.float32)


def write(
    parameter: torch.Tensor, start: int, values: torch.Tensor, *, random_from: torch.Generator | None = None
) -> None:
    """Set the values from `start` on to these, fp32 [count] on its device. `random_from`, a generator there: rounds at
    random."""
    end = start + values.numel()
    flat, rest = parameter.detach().view(-1)[start:end], rest_of(parameter)
    if rest is None:
        flat.copy_(values)
        return
    bits = values.view(torch.int32)
    if random_from is None:
        bits = bits + 0x80
    else:
        bits = _random_bytes(len(bits), random_from).to(torch.int32).add_(bits)
    bits.bitwise_right_shift_(8)
    high = (bits + 0x80).bitwise_right_shift_(8)
    flat.view(torch.int16).copy_(high)
    rest[start:end].copy_(bits.sub_(high.bitwise_left_shift_(8)))


def read_all(parameter: torch.Tensor, out: torch.Tensor) -> None:
    """Copy its values to `out`, fp32 [numel], on any device."""
    if rest_of(parameter) is None:
        out.copy_(parameter.detach().reshape(-1))
        return
    for start, end in strides(parameter.numel()):
        out[start:end].copy_(read(parameter, start, end))


def write_all(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Set it to these values, fp32 of its size, on any device."""
    if rest_of(parameter) is None:
        parameter.detach().copy_(values.view(parameter.shape))
        return
    flat = values.reshape(-1)
    for start, end in strides(parameter.numel()):
        write(parameter, start, flat[start:end].to(parameter.device))


def add(parameter: torch.Tensor, change: torch.Tensor) -> None:
    """Add these values, fp32 of its size, on any device."""
    if rest_of(parameter) is None:
        parameter.detach().add_(change.view(parameter.shape).to(parameter.device, parameter.dtype))
        return
    flat = change.reshape(-1)
    for start, end in strides(parameter.numel()):
        write(parameter, start, read(parameter, start, end).add_(flat[start:end].to(parameter.device)))


def strides(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, STRIDE):
        yield start, min(start + STRIDE, numel)


def _random_bytes(count: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 [count]: eight from each number drawn."""
    drawn = torch.empty(-(-count // 8), dtype=torch.int64, device=generator.device)
    return drawn.random_(-2**63, None, generator=generator).view(torch.uint8)[:count]
