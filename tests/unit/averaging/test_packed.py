"""A vector in a byte a value: near what it was, bounded by its own block."""

from __future__ import annotations

import pytest
import torch

from swarm.averaging.packed import Packed
from swarm.errors import PeerRefused
from swarm.host.keep import AMPLE, LEVELS, LITTLE, MAX_OWN, Keep
from swarm.network.codec import BLOCK


def test_it_is_near_what_it_was_and_takes_a_byte_a_value() -> None:
    scales = torch.logspace(-3, 0, 50).repeat_interleave(BLOCK)
    values = torch.randn(50 * BLOCK, generator=torch.Generator().manual_seed(0)) * scales
    packed = Packed.of(values)
    largest = values.view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK)
    assert ((packed.read() - values).abs() <= largest / 254 * 1.3).all()
    assert len(packed.data) < 1.02 * values.numel() and "data" not in repr(packed)


def test_zero_stays_zero_and_what_is_not_finite_is_refused() -> None:
    assert not Packed.of(torch.zeros(2 * BLOCK)).read().any()
    with pytest.raises(PeerRefused):
        Packed.of(torch.full((BLOCK,), torch.nan))


def test_what_is_kept_gets_less_from_level_to_level() -> None:
    levels = list(LEVELS)
    for more, less in zip(levels, levels[1:], strict=False):
        assert more.leases >= less.leases and more.previous >= less.previous
        assert more.results_bytes > less.results_bytes and more.own(10**8) >= less.own(10**8)
        assert more.rounds > less.rounds
    assert AMPLE.previous and not LITTLE.previous and LITTLE.rounds == 1


def test_of_small_fragments_more_contributions_are_kept() -> None:
    keep = Keep(own_values=1000, own_least=2)
    assert [keep.own(numel) for numel in (1, 100, 400, 10_000)] == [MAX_OWN, 10, 2, 2]
