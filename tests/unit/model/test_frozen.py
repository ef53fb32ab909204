"""Frozen matrices: their codes against the definition of NF4, their products and gradients against plain torch."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from swarm.model import frozen
from swarm.model.frozen import BLOCK, NF4, Matrix, keep, linear, values_of

KINDS = ("nf4", "bf16", "fp32")


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_the_levels_are_the_quantiles_of_a_normal_distribution() -> None:
    """Appendix E of the QLoRA paper: eight quantiles above zero, seven below, zero itself, the largest is one."""
    def quantiles(count: int) -> list[float]:
        edge = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
        return [NormalDist().inv_cdf(edge + (0.5 - edge) * i / count) for i in range(count)]

    levels = sorted([*quantiles(8), 0.0, *(-value for value in quantiles(7))])
    assert [value / levels[-1] for value in levels] == pytest.approx(list(NF4), abs=1e-6)


def test_each_weight_becomes_the_nearest_level_times_its_blocks_scale() -> None:
    values = weight(6, 2 * BLOCK)
    matrix = keep(values, "nf4")
    assert matrix.scales is not None and matrix.values.dtype == torch.uint8
    scales = values.view(-1, BLOCK).abs().amax(dim=1).to(torch.bfloat16)
    assert torch.equal(matrix.scales, scales)
    choices = torch.tensor(NF4)[:, None, None] * scales.float()[None, :, None]
    best = (choices - values.view(1, -1, BLOCK)).abs().amin(dim=0).view(values.shape)
    torch.testing.assert_close((values_of(matrix, torch.float32) - values).abs(), best, rtol=0, atol=1e-8)


def test_bits_a_weight() -> None:
    values = weight(64, 64)
    assert [8 * keep(values, kind).num_bytes / values.numel() for kind in KINDS] == [4.25, 16, 32]


def test_the_error_is_what_the_paper_has() -> None:
    """9.2 % of a normal weight (recipe.md 6)."""
    values = weight(128, 512)
    error = (values_of(keep(values, "nf4"), torch.float32) - values).norm() / values.norm()
    assert 0.08 < float(error) < 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 150), st.just(0.0) | st.floats(1e-20, 1e4), st.integers(0, 9))
def test_any_shape_and_size_comes_back(rows: int, columns: int, size: float, seed: int) -> None:
    values = weight(rows, columns, seed) * size
    for kind, error in zip(KINDS, (0.16, 0.004, 0.0), strict=True):
        found = values_of(keep(values, kind), torch.float32)
        assert found.shape == values.shape
        assert float((found - values).abs().max()) <= error * float(values.abs().max())


def test_zeros_stay_zeros_and_do_not_divide() -> None:
    found = values_of(keep(torch.zeros(3, 70), "nf4"), torch.float32)
    assert torch.equal(found, torch.zeros(3, 70))


def test_strides_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    values = weight(40, 50)
    whole = keep(values, "nf4")
    monkeypatch.setattr(frozen, "STRIDE", 4 * BLOCK)
    parts = keep(values, "nf4")
    assert torch.equal(whole.values, parts.values) and whole.scales is not None and parts.scales is not None
    assert torch.equal(whole.scales, parts.scales)
    read = values_of(parts, torch.bfloat16)
    monkeypatch.undo()
    assert torch.equal(read, values_of(whole, torch.bfloat16))


def test_values_are_rounded_once() -> None:
    matrix = keep(weight(8, 128), "nf4")
    assert torch.equal(values_of(matrix, torch.bfloat16), values_of(matrix, torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradient_are_those_of_the_values(kind: str) -> None:
    matrix, bias = keep(weight(24, 64), kind), torch.randn(24)
    inputs = torch.randn(2, 5, 64, requires_grad=True)
    found = linear(inputs, matrix, bias)
    wanted = functional.linear(inputs, values_of(matrix, torch.float32), bias)
    assert torch.equal(found, wanted)
    gradient = torch.randn_like(found)
    [mine] = torch.autograd.grad(found, inputs, gradient)
    [plain] = torch.autograd.grad(wanted, inputs, gradient)
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


def test_it_computes_in_the_type_of_what_comes_in() -> None:
    matrix = keep(weight(24, 64), "nf4")
    inputs = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    found = linear(inputs, matrix, torch.randn(24))
    found.sum().backward()
    assert found.dtype == torch.bfloat16 and inputs.grad is not None and inputs.grad.dtype == torch.bfloat16


def test_a_graph_keeps_no_values_of_a_matrix() -> None:
    """28 blocks' worth of them would be the whole model again."""
    saved: list[int] = []
    matrix = keep(weight(256, 256), "nf4")
    inputs = torch.randn(2, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        left = linear(inputs, matrix, None)
    assert left.requires_grad and sum(saved) == 0


def test_nothing_is_computed_for_inputs_that_need_no_gradient() -> None:
    matrix = keep(weight(8, 64), "nf4")
    assert not linear(torch.randn(2, 64), matrix, torch.zeros(8)).requires_grad


def test_shapes_on_the_meta_device_are_those_of_real_ones() -> None:
    for kind in KINDS:
        real, meta = (keep(torch.zeros(7, 33, device=device), kind) for device in ("cpu", "meta"))
        assert isinstance(meta, Matrix) and meta.shape == real.shape and meta.num_bytes == real.num_bytes
        assert meta.values.is_meta and meta.values.shape == real.values.shape
