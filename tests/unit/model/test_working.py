"""bfloat16 weights with 8 further bits: close to fp32, seen as bfloat16 by the model, and no small step is lost."""

from __future__ import annotations

import pytest
import torch

from swarm.model import working


def parameter_of(values: torch.Tensor, *, halved: bool = True) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(values.clone())
    if halved:
        working.halve([parameter])
    return parameter


def values_of(parameter: torch.Tensor) -> torch.Tensor:
    return working.read(parameter, 0, parameter.numel()).view(parameter.shape)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Of all magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(shape, generator=generator) * 8)
    return torch.randn(shape, generator=generator) * sizes


def test_it_is_off_by_at_most_its_last_bit() -> None:
    values = random(300, 40)
    parameter = parameter_of(values)
    assert ((values_of(parameter) - values).abs() <= values.abs() * 2**-16).all()


def test_the_model_sees_the_nearest_bfloat16() -> None:
    values = random(300, 40)
    parameter = parameter_of(values)
    assert parameter.dtype == torch.bfloat16 and parameter.requires_grad
    error, best = (parameter.detach().float() - values).abs(), (values.bfloat16().float() - values).abs()
    assert (error <= best + 2 * values.abs() * 2**-16).all(), "but for those just in the middle"


def test_it_takes_three_bytes_a_weight() -> None:
    parameter = parameter_of(random(64, 64))
    rest = working.rest_of(parameter)
    assert rest is not None
    assert parameter.untyped_storage().nbytes() + rest.untyped_storage().nbytes() == 3 * 64 * 64


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 2.0**-126, -(2.0**100), 1 + 2**-15, 1 - 2**-16, 255.998])
def test_exact_values_stay_and_the_sign_too(value: float) -> None:
    parameter = parameter_of(torch.tensor([value]))
    found = values_of(parameter)
    assert found.item() == pytest.approx(value, rel=2**-16, abs=0)
    assert torch.signbit(found).item() == torch.signbit(torch.tensor(value)).item()


def test_what_was_read_is_written_back_without_a_change() -> None:
    parameter = parameter_of(random(1000))
    before, rest = parameter.detach().clone(), working.rest_of(parameter)
    assert rest is not None
    rest_before = rest.clone()
    working.write(parameter, 0, values_of(parameter))
    assert torch.equal(parameter.detach(), before) and torch.equal(rest, rest_before)
    working.write(parameter, 0, values_of(parameter), random_from=torch.Generator().manual_seed(1))
    assert torch.equal(parameter.detach(), before) and torch.equal(rest, rest_before), "there is nothing to round"


def test_a_span_is_read_and_written_alone() -> None:
    values = random(10, 10)
    parameter = parameter_of(values)
    working.write(parameter, 20, torch.ones(30))
    found = values_of(parameter).view(-1)
    assert (found[20:50] == 1).all()
    assert torch.equal(found[:20], values_of(parameter_of(values)).view(-1)[:20])
    assert torch.equal(found[50:], values_of(parameter_of(values)).view(-1)[50:])
    assert torch.equal(working.read(parameter, 20, 50), torch.ones(30))


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("numel", [1, 7, working.STRIDE - 1, working.STRIDE, 2 * working.STRIDE + 3])
def test_all_of_it_in_strides(halved: bool, numel: int) -> None:
    values, change = random(numel), random(numel, seed=1)
    parameter = parameter_of(values, halved=halved)
    limit = 0.0 if not halved else 2**-15
    out = torch.empty(numel)
    working.read_all(parameter, out)
    assert ((out - values).abs() <= values.abs() * limit).all()
    working.write_all(parameter, change)
    working.read_all(parameter, out)
    assert ((out - change).abs() <= change.abs() * limit).all()
    working.add(parameter, values)
    working.read_all(parameter, out)
    wanted = values + change
    assert ((out - wanted).abs() <= (wanted.abs() + change.abs()) * limit).all()


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """1 + 300 x 2^-14: in bfloat16, whose next value is 1 + 2^-7, each would be lost."""
    parameter = parameter_of(torch.ones(1000))
    plain = torch.ones(1000, dtype=torch.bfloat16)
    for _ in range(300):
        working.add(parameter, torch.full((1000,), 2.0**-14))
        plain += 2.0**-14
    assert (plain == 1).all()
    assert (values_of(parameter) - (1 + 300 * 2.0**-14)).abs().max() < 2.0**-15


def test_rounding_at_random_is_right_on_average_where_even_the_further_bits_end() -> None:
    generator = torch.Generator().manual_seed(0)
    up, nearest = parameter_of(torch.full((4096,), -1.0)), parameter_of(torch.full((4096,), -1.0))
    step = -(2.0**-19)
    for _ in range(400):
        working.write(up, 0, working.read(up, 0, 4096) + step, random_from=generator)
        working.write(nearest, 0, working.read(nearest, 0, 4096) + step)
    assert (values_of(nearest) == -1).all()
    assert values_of(up).mean().item() + 1 == pytest.approx(400 * step, rel=0.02)


def test_rounding_at_random_can_be_repeated() -> None:
    found = []
    for _ in range(2):
        parameter = parameter_of(torch.zeros(1000))
        working.write(parameter, 0, random(1000, seed=3), random_from=torch.Generator().manual_seed(5))
        found.append(values_of(parameter))
    assert torch.equal(*found)
    other = parameter_of(torch.zeros(1000))
    working.write(other, 0, random(1000, seed=3), random_from=torch.Generator().manual_seed(6))
    assert not torch.equal(values_of(other), found[0])


def test_only_fp32_parameters_are_halved_and_only_once() -> None:
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    whole = torch.nn.Parameter(torch.full((3,), 1 + 2.0**-12))
    working.halve([half, whole])
    assert half.dtype == torch.float16 and working.rest_of(half) is None
    rest = working.rest_of(whole)
    working.halve([half, whole])
    assert working.rest_of(whole) is rest and (values_of(whole) == 1 + 2.0**-12).all()


def test_new_memory_for_the_weights_leaves_the_further_bits() -> None:
    """As where a graph still needs the old ones."""
    parameter = parameter_of(torch.full((5,), 1 + 2.0**-12))
    old = parameter.data
    parameter.data = parameter.data.clone()
    working.add(parameter, torch.ones(5))
    assert (values_of(parameter) == 2 + 2.0**-12).all() and (old == 1).all()
