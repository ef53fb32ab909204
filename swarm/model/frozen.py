"""Matrices that are not trained, kept in as few bits as they need: NF4, bfloat16 or fp32.

NF4 (QLoRA, https://arxiv.org/abs/2305.14314): a weight is the nearest of 16 values, which lie like the quantiles of a
normal distribution, times the largest of its block of 64: 4.25 bits a weight with a bfloat16 scale. Made of separately
rounded operations, so that the same file gives the same codes on every machine, and a digest can name them; and of
plain torch, so that it works wherever torch does.

A product with such a matrix makes the matrix's values anew, in its forward and once more in its backward: a graph keeps
the codes, and not a copy of the matrix for each layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

BLOCK = 64
"""weights that share a scale"""
STRIDE = 2**22
"""weights worked on at a time: a multiple of BLOCK"""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Matrix(NamedTuple):
    """How a matrix is kept. `scales` None: `values` are its values, fp32 or bfloat16 [rows, columns]; else NF4."""

    values: torch.Tensor
    """of NF4: two codes a byte, uint8 [padded weights / 2]"""
    scales: torch.Tensor | None
    """bfloat16, of each block of 64 weights, counted flat"""
    shape: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.scales) if t is not None)


def keep(weight: torch.Tensor, kind: str) -> Matrix:
    """`weight`: fp32 [rows, columns], contiguous, also on the meta device; `kind`: nf4, bf16 or fp32."""
    shape = (weight.shape[0], weight.shape[1])
    if kind != "nf4":
        return Matrix(weight.detach().to(torch.bfloat16 if kind == "bf16" else torch.float32), None, shape)
    padded = -(-weight.numel() // BLOCK) * BLOCK
    codes = torch.empty(padded // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(padded // BLOCK, dtype=torch.bfloat16, device=weight.device)
    flat = weight.detach().reshape(-1)
    for start in range(0, 0 if weight.is_meta else padded, STRIDE):
        part = flat[start:start + STRIDE]
        if len(part) % BLOCK:
            part = functional.pad(part, (0, -len(part) % BLOCK))
        end = start + len(part)
        codes[start // 2:end // 2], scales[start // BLOCK:end // BLOCK] = _encode(part)
    return Matrix(codes, scales, shape)


def values_of(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns] on the matrix's device: each value is rounded once, from fp32. Not a copy where it is there."""
    if matrix.scales is None:
        return matrix.values.to(dtype)
    numel = matrix.shape[0] * matrix.shape[1]
    found = torch.empty(2 * len(matrix.values), dtype=dtype, device=matrix.values.device)
    pairs = _pairs(found.device)
    for start in range(0, len(found), STRIDE):
        end = min(start + STRIDE, len(found))
        part = pairs.index_select(0, matrix.values[start // 2:end // 2].to(torch.int32)).view(-1, BLOCK)
        part.mul_(matrix.scales[start // BLOCK:end // BLOCK, None])
        found[start:end].view(-1, BLOCK).copy_(part)
    return found[:numel].view(matrix.shape)


def linear(inputs: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    """[..., columns] -> [..., rows] in the inputs' type, as `functional.linear`; a gradient for `inputs` only."""
    found = _Linear.apply(inputs, matrix, bias)  # type: ignore[no-untyped-call]
    assert isinstance(found, torch.Tensor)
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.matrix = matrix
        return functional.linear(inputs, values_of(matrix, inputs.dtype), None if bias is None else bias.to(inputs))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        gradient = gradients[0]
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return gradient @ values_of(ctx.matrix, gradient.dtype), None, None


def _encode(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [blocks * 64] -> (uint8 [blocks * 32], bfloat16 [blocks])"""
    blocks = flat.view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1).to(torch.bfloat16)
    divisor = scales.to(torch.float32)
    divisor[divisor == 0] = 1.0
    levels = torch.tensor(NF4, device=flat.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize((blocks / divisor[:, None]).view(-1), middles, out_int32=True).to(torch.uint8)
    return codes[0::2] | (codes[1::2] << 4), scales


def _pairs(device: torch.device) -> torch.Tensor:
    """What each byte stands for: fp32 [256, 2]."""
    levels = torch.tensor(NF4, device=device)
    return torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)
