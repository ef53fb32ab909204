"""What the owner of a part computes: an exact weighted mean, that no single contribution can carry away."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging.reduction import NORM_LIMIT, combine, reduce_part
from swarm.network import codec
from swarm.network.codec import BLOCK

N = 2 * BLOCK


def vector(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale


def test_the_mean_is_weighted_by_tokens() -> None:
    values = {"a": vector(0), "b": vector(1), "c": vector(2)}
    mean = combine(values, {"a": 20, "b": 30, "c": 50})
    exact = sum(share * values[name].double() for name, share in (("a", 0.2), ("b", 0.3), ("c", 0.5)))
    assert torch.allclose(mean.double(), exact, atol=1e-6)
    data, left = reduce_part(values, {"a": 20, "b": 30, "c": 50}, torch.zeros(N), num_fine=0, bits=32)
    assert torch.equal(codec.decode(data, 2, 0, 32), mean) and torch.count_nonzero(left) == 0


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.permutations("abcde"), st.sampled_from([2, 4, 8, 32]))
def test_the_order_of_arrival_makes_no_difference(order: list[str], bits: int) -> None:
    values = {name: vector(ord(name)) for name in order}
    tokens = {name: ord(name) for name in reversed(order)}
    reference = {name: vector(ord(name)) for name in "abcde"}
    one = reduce_part(values, tokens, vector(1, 0.01), num_fine=1, bits=bits)
    two = reduce_part(reference, {n: ord(n) for n in "abcde"}, vector(1, 0.01), num_fine=1, bits=bits)
    assert one[0] == two[0] and torch.equal(one[1], two[1])


def test_one_contribution_is_itself() -> None:
    assert torch.equal(combine({"a": vector(3)}, {"a": 17}), vector(3))


@pytest.mark.parametrize("honest", [2, 3, 7])
def test_a_flipped_and_blown_up_contribution_is_cut_down(honest: int) -> None:
    """Among three or more: minus 1000 times the truth moves the mean by a bounded part of itself."""
    truth = vector(0)
    values = {f"honest-{i}": truth + vector(i + 1, 0.1) for i in range(honest)}
    tokens = dict.fromkeys(values, 100)
    clean = combine(values, tokens)
    values["liar"], tokens["liar"] = -1000 * truth, 100
    mean = combine(values, tokens)
    share = 1 / (honest + 1)
    assert float((mean - clean * (1 - share)).norm()) <= share * NORM_LIMIT * 1.02 * float(truth.norm())
    if honest > NORM_LIMIT:
        assert float(torch.dot(mean, truth)) > 0, "most of the swarm still decides the direction"


def test_a_claim_of_many_tokens_and_a_large_norm_gain_only_their_caps() -> None:
    values = {"a": vector(0), "b": vector(0), "c": vector(0), "liar": -1000 * vector(0)}
    tokens = {"a": 100, "b": 100, "c": 100, "liar": 10**9}
    mean = combine(values, tokens)
    assert torch.isfinite(mean).all()
    # weight 2 of 5; its norm per root of its claimed tokens is what it claims, so the limit there is looser
    assert float(mean.norm()) <= 0.4 * 1000 * float(vector(0).norm())
    honest_claim = combine(values, {**tokens, "liar": 100})
    assert float(honest_claim.norm()) <= (0.25 * NORM_LIMIT + 0.75) * float(vector(0).norm()) * 1.01


def test_two_alone_are_not_clipped() -> None:
    """There is no majority to be out of line with."""
    mean = combine({"a": vector(0), "b": vector(1, 1000)}, {"a": 1, "b": 1})
    assert torch.allclose(mean, (vector(0) + vector(1, 1000)) / 2, rtol=1e-5, atol=1e-4)


def test_honest_peers_of_different_speed_are_not_clipped() -> None:
    """Nine times the tokens: three times the drift if it is all noise, nine times if it is all signal."""
    signal = {"a": vector(0), "b": vector(0), "fast": vector(0) * 9}
    tokens = {"a": 100, "b": 100, "fast": 900}
    expected = (signal["a"] + signal["b"] + 2 * signal["fast"]) / 4  # its weight is capped at twice the median
    assert torch.allclose(combine(signal, tokens), expected, rtol=1e-5, atol=1e-5)


def test_values_at_the_limit_of_the_codec_do_not_overflow() -> None:
    """A stranger may send what the codec lets pass: the mean is finite, or refused, and never reaches the weights."""
    largest = torch.full((N,), 9.9e29)
    mean = combine({f"{i}": largest * (-1) ** i for i in range(64)}, {f"{i}": 5 for i in range(64)})
    assert bool(torch.isfinite(mean).all())
    two = combine({"a": largest, "b": largest}, {"a": 1, "b": 1})
    assert bool(torch.isfinite(two).all())


def test_nothing_but_zeros_gives_zeros() -> None:
    values = {name: torch.zeros(N) for name in "abcd"}
    data, left = reduce_part(values, dict.fromkeys(values, 3), torch.zeros(N), num_fine=1, bits=4)
    assert torch.count_nonzero(codec.decode(data, 2, 1, 4)) == torch.count_nonzero(left) == 0
