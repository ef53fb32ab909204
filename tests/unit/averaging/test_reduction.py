"""What the owner of a part computes: a mean by weights and by verdict, said in so many bits. How far each one is
believed: test_robust.py."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging import plan, robust
from swarm.averaging.reduction import combine, reduce_part
from swarm.averaging.robust import Verdict
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


def test_values_at_the_limit_of_the_codec_do_not_overflow() -> None:
    """A stranger may send what the codec lets pass: the mean is finite, or refused, and never reaches the weights."""
    largest = torch.full((N,), 9.9e29)
    mean = combine({f"{i}": largest * (-1) ** i for i in range(64)}, {f"{i}": 5 for i in range(64)})
    assert bool(torch.isfinite(mean).all())
    two = combine({"a": largest, "b": largest}, {"a": 1, "b": 1})
    assert bool(torch.isfinite(two).all())


def test_a_verdict_is_what_counts_and_the_centre_makes_up_for_what_is_cut_off() -> None:
    values = {"a": vector(0), "b": vector(1), "c": vector(2)}
    tokens = {"a": 1, "b": 1, "c": 1}
    centre = vector(3)
    verdict = Verdict({"a": 0.5, "b": 0.25, "c": 0.0}, {"a": 1.0, "b": 0.5, "c": 0.0}, centre.clone(), 0.125)
    mean = combine(values, tokens, verdict)
    assert torch.allclose(mean, 0.5 * values["a"] + 0.25 * values["b"] + 0.125 * centre, atol=1e-6)
    data, left = reduce_part(
        values, tokens, vector(4), num_fine=0, bits=32,
        verdict=Verdict({"a": 0.0, "b": 0.0, "c": 0.0}, {"a": 0.0, "b": 0.0, "c": 0.0}),
    )
    assert torch.equal(codec.decode(data, 2, 0, 32), vector(4)), "what earlier results have lost is said all the same"
    assert torch.count_nonzero(left) == 0


def test_what_comes_in_is_left_as_it_is() -> None:
    """The same contributions may be asked for again, without somebody."""
    values = {name: vector(ord(name)) for name in "abcde"}
    feedback = vector(1, 0.01)
    reduce_part(values, dict.fromkeys(values, 3), feedback, num_fine=1, bits=4)
    assert all(torch.equal(values[name], vector(ord(name))) for name in values)
    assert torch.equal(feedback, vector(1, 0.01))


def test_a_mean_of_people_who_trust_each_other() -> None:
    values = {"a": vector(0), "b": vector(1), "c": vector(2), "d": vector(3, 1000)}
    tokens = {"a": 1, "b": 1, "c": 1, "d": 1}
    mean = combine(values, tokens, robust.plain(plan.weights(tokens)))
    assert torch.allclose(mean, sum(values.values()) / 4, atol=1e-3)


def test_nothing_but_zeros_gives_zeros() -> None:
    values = {name: torch.zeros(N) for name in "abcd"}
    data, left = reduce_part(values, dict.fromkeys(values, 3), torch.zeros(N), num_fine=1, bits=4)
    assert torch.count_nonzero(codec.decode(data, 2, 1, 4)) == torch.count_nonzero(left) == 0
