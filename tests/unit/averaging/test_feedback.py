"""Error feedback: what quantising loses in one round is said in the next, so nothing is lost over many."""

from __future__ import annotations

import pytest
import torch

from swarm.averaging.reduction import combine, reduce_part
from swarm.network import codec
from swarm.network.codec import BLOCK

NUM_BLOCKS, NUM_FINE = 3, 1


def contribution(seed: int, *, scale: float = 1e-4) -> torch.Tensor:
    """Drift points the same way round after round, with noise: the case in which a biased codec would show."""
    direction = torch.randn(NUM_BLOCKS * BLOCK, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(NUM_BLOCKS * BLOCK, generator=torch.Generator().manual_seed(seed))
    return (direction + 0.3 * noise) * scale


def largest_quantum(scale: float = 1e-4) -> float:
    return scale * 5 / 7


@pytest.mark.parametrize("bits", [4, 8])
def test_the_sender_says_everything_in_the_end(bits: int) -> None:
    """The sum of what was decoded stays within one residual of the sum of what was true, however many rounds."""
    feedback = torch.zeros(NUM_BLOCKS * BLOCK)
    told = torch.zeros_like(feedback, dtype=torch.float64)
    true = torch.zeros_like(told)
    residuals = []
    for seed in range(150):
        values = contribution(seed)
        true += values.double()
        offered = values + feedback
        said = codec.decode(codec.encode(offered, NUM_FINE, bits), NUM_BLOCKS, NUM_FINE, bits)
        told += said.double()
        feedback = offered - said
        residuals.append(float((true - told).abs().max()))
    assert max(residuals[75:]) <= largest_quantum() * 0.6, "the residual does not grow"
    assert torch.allclose(true - told, feedback.double(), atol=1e-9), "what is missing is what feedback holds"
    assert float((true - told).norm() / true.norm()) < 3e-3


def test_without_feedback_small_values_are_never_heard_of() -> None:
    """Why it exists: values under half a quantum round to zero in every round."""
    values = torch.full((BLOCK,), 0.03)
    values[0] = 1.0
    assert torch.count_nonzero(codec.decode(codec.encode(values, 0, 4), 1, 0, 4)[1:]) == 0
    feedback, told = torch.zeros(BLOCK), torch.zeros(BLOCK)
    for _ in range(100):
        offered = values + feedback
        said = codec.decode(codec.encode(offered, 0, 4), 1, 0, 4)
        feedback = offered - said
        told += said
    assert torch.allclose(told[1:] / 100, values[1:], rtol=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_owner_of_a_part_says_everything_in_the_end(bits: int) -> None:
    feedback = torch.zeros(NUM_BLOCKS * BLOCK)
    told = torch.zeros_like(feedback, dtype=torch.float64)
    true = torch.zeros_like(told)
    for seed in range(100):
        contributions = {name: contribution(3 * seed + i) for i, name in enumerate("abc")}
        tokens = {"a": 100, "b": 150, "c": 120}
        true += combine(contributions, tokens).double()
        data, feedback = reduce_part(contributions, tokens, feedback, num_fine=NUM_FINE, bits=bits)
        told += codec.decode(data, NUM_BLOCKS, NUM_FINE, bits).double()
        assert float((true - told).abs().max()) <= largest_quantum()
    assert torch.allclose(true - told, feedback.double(), atol=1e-9)
    assert float((true - told).norm() / true.norm()) < 3e-3


def test_both_sides_together() -> None:
    """Three senders and an owner with four bits each way, as in a round: the sum of the averages is the true one."""
    names = "abc"
    sender = {name: torch.zeros(NUM_BLOCKS * BLOCK) for name in names}
    owner = torch.zeros(NUM_BLOCKS * BLOCK)
    told = torch.zeros_like(owner, dtype=torch.float64)
    true = torch.zeros_like(told)
    tokens = dict.fromkeys(names, 64)
    for seed in range(100):
        received = {}
        for i, name in enumerate(names):
            values = contribution(3 * seed + i)
            true += values.double() / 3
            offered = values + sender[name]
            received[name] = codec.decode(codec.encode(offered, NUM_FINE, 4), NUM_BLOCKS, NUM_FINE, 4)
            sender[name] = offered - received[name]
        data, owner = reduce_part(received, tokens, owner, num_fine=NUM_FINE, bits=4)
        told += codec.decode(data, NUM_BLOCKS, NUM_FINE, 4).double()
    assert float((true - told).norm() / true.norm()) < 3e-3
    left = owner.double() + sum(values.double() for values in sender.values()) / 3
    assert torch.allclose(true - told, left, atol=1e-8)


def test_fp32_needs_no_feedback() -> None:
    values = {"a": contribution(0), "b": contribution(1)}
    data, left = reduce_part(values, {"a": 1, "b": 3}, torch.zeros(NUM_BLOCKS * BLOCK), num_fine=NUM_FINE, bits=32)
    assert torch.count_nonzero(left) == 0
    assert torch.equal(codec.decode(data, NUM_BLOCKS, NUM_FINE, 32), combine(values, {"a": 1, "b": 3}))


def test_the_owner_keeps_the_old_feedback_until_it_is_told_otherwise() -> None:
    """A round that comes to nothing must not have charged it."""
    feedback = contribution(9)
    before = feedback.clone()
    one = reduce_part({"a": contribution(1)}, {"a": 5}, feedback, num_fine=NUM_FINE, bits=4)
    again = reduce_part({"a": contribution(1)}, {"a": 5}, feedback, num_fine=NUM_FINE, bits=4)
    assert torch.equal(feedback, before)
    assert one[0] == again[0] and torch.equal(one[1], again[1])
