"""Error feedback: what quantising loses in one round is said in the next, so nothing is lost over many."""

from __future__ import annotations

import pytest
import torch

from swarm.averaging.packed import Packed
from swarm.averaging.reduction import combine, reduce_part
from swarm.network import codec
from swarm.network.codec import BLOCK

NUM_BLOCKS, NUM_FINE = 3, 1


def contribution(seed: int, *, scale: float = 1e-4) -> torch.Tensor:
    """Drift points the same way round after round, with noise: the case in which a biased codec would show."""
    direction = torch.randn(NUM_BLOCKS * BLOCK, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(NUM_BLOCKS * BLOCK, generator=torch.Generator().manual_seed(seed))
    return (direction + 0.3 * noise) * scale


def most_left(bits: int, scale: float = 1e-4) -> float:
    """What one value may lack at any time. A contribution is at most 5 of `scale`; with 2 bits what is offered has
    its own feedback in it, which is as large again."""
    return scale * {2: 1.5 * 5, 4: 5 / 7, 8: 5 / 127 + 0.3}[bits]


@pytest.mark.parametrize("bits", [2, 4, 8])
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
    assert max(residuals[75:]) <= most_left(bits), "the residual does not grow"
    assert torch.allclose(true - told, feedback.double(), atol=1e-9), "what is missing is what feedback holds"
    assert float((true - told).norm() / true.norm()) < (6e-3 if bits == 2 else 3e-3)


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


@pytest.mark.parametrize("bits", [2, 4, 8])
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
        assert float((true - told).abs().max()) <= most_left(bits)
    assert torch.allclose(true - told, feedback.double(), atol=1e-9)
    assert float((true - told).norm() / true.norm()) < (9e-3 if bits == 2 else 3e-3)


@pytest.mark.parametrize("bits", [2, 4])
def test_both_sides_together(bits: int) -> None:
    """Three senders and an owner, few bits each way, as in a round: the sum of the averages is the true one."""
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
            received[name] = codec.decode(codec.encode(offered, NUM_FINE, bits), NUM_BLOCKS, NUM_FINE, bits)
            sender[name] = offered - received[name]
        data, owner = reduce_part(received, tokens, owner, num_fine=NUM_FINE, bits=bits)
        told += codec.decode(data, NUM_BLOCKS, NUM_FINE, bits).double()
    assert float((true - told).norm() / true.norm()) < (2e-2 if bits == 2 else 3e-3)
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


def test_two_bits_both_ways_with_feedback_as_it_is_kept() -> None:
    """In a byte a value, at both sides (packed.py). Of blocks of very different size, in a part with fine ones: what
    the averages say in all is within a round's worth of the truth after few rounds, and no further after many."""
    scales = torch.tensor([1e-5, 1e-4, 3e-7]).repeat_interleave(BLOCK)
    sender = {name: Packed.of(torch.zeros(NUM_BLOCKS * BLOCK)) for name in "abcd"}
    owner = Packed.of(torch.zeros(NUM_BLOCKS * BLOCK))
    told, true = torch.zeros(2, NUM_BLOCKS * BLOCK, dtype=torch.float64)
    tokens = {"a": 100, "b": 100, "c": 150, "d": 80}
    missing = []
    for seed in range(60):
        values = {name: contribution(4 * seed + i, scale=1.0) * scales for i, name in enumerate("abcd")}
        received = {}
        for name in values:
            offered = values[name] + sender[name].read()
            data, said = codec.encode_and_read(offered, NUM_FINE, 2)
            received[name] = codec.decode(data, NUM_BLOCKS, NUM_FINE, 2)
            sender[name] = Packed.of(offered - said)
        true += combine(values, tokens).double()
        data, left = reduce_part(received, tokens, owner.read(), num_fine=NUM_FINE, bits=2)
        owner = Packed.of(left)
        told += codec.decode(data, NUM_BLOCKS, NUM_FINE, 2).double()
        each = true.view(NUM_BLOCKS, BLOCK).norm(dim=1) / (seed + 1)
        missing.append((told - true).view(NUM_BLOCKS, BLOCK).norm(dim=1) / each)
    assert max(float(now.max()) for now in missing[10:]) < 2.0, "rounds' worth"
    assert float(torch.stack(missing[40:]).mean()) < 1.25 * float(torch.stack(missing[10:30]).mean())
