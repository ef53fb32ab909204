"""The median by a sorting network: of each coordinate, for any number of rows, with nothing left out that counts."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging.median import Exchange, median_, network

numbers = st.floats(-(2.0**99), 2.0**99, width=32)


def median_of(rows: torch.Tensor) -> torch.Tensor:
    copy = rows.clone()
    return median_(list(copy), torch.empty(rows.shape[1]), out=torch.empty(rows.shape[1]))


@pytest.mark.parametrize("count", range(1, 12))
def test_every_order_of_zeros_and_ones_ends_in_the_right_middle(count: int) -> None:
    """The 0-1 principle: a network that is right for these is right for all values."""
    rows = torch.tensor(list(itertools.product([0.0, 1.0], repeat=count))).t().contiguous()
    expected = torch.tensor([statistics.median(column) for column in rows.t().tolist()])
    assert torch.equal(median_of(rows), expected)


@pytest.mark.parametrize("count", [12, 16, 17, 31, 33, 63, 64])
def test_many_rows(count: int) -> None:
    rows = torch.randn(count, 500, generator=torch.Generator().manual_seed(count))
    ordered = rows.sort(dim=0).values
    assert torch.equal(median_of(rows), (ordered[(count - 1) // 2] + ordered[count // 2]) * 0.5)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_it_is_one_of_the_middle_and_knows_no_order(values: list[float], random) -> None:  # type: ignore[no-untyped-def]
    rows = torch.tensor(values).unsqueeze(1)
    middle = median_of(rows)
    ordered = sorted(rows.squeeze(1).tolist())
    assert ordered[(len(values) - 1) // 2] <= float(middle) <= ordered[len(values) // 2]
    random.shuffle(values)
    assert torch.equal(median_of(torch.tensor(values).unsqueeze(1)), middle)
    assert torch.equal(median_of(-rows), -middle), "neither side is preferred"


def test_what_the_middle_does_not_depend_on_is_left_out() -> None:
    assert network(1) == ()
    assert network(2) == (Exchange(0, 1, True, True),) and len(network(3)) == 3
    assert all(exchange.keep_smaller or exchange.keep_larger for count in range(65) for exchange in network(count))
    one_sided = [exchange for exchange in network(8) if not (exchange.keep_smaller and exchange.keep_larger)]
    assert len(network(8)) <= 19 and one_sided
    assert len(network(64)) < 543, "Batcher's for all of the order"
    assert all(isinstance(exchange, Exchange) and exchange.low < exchange.high < 64 for exchange in network(64))


def test_it_works_in_the_memory_it_is_given() -> None:
    """Rows may lie in one tensor with the scratch, and the result in a view of another."""
    room = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    expected = room[:5].median(dim=0).values
    whole = torch.zeros(96)
    found = median_(list(room[:5]), room[5], out=whole[32:64])
    assert torch.equal(found, expected) and torch.equal(whole[32:64], expected)
    assert torch.count_nonzero(whole[:32]) == torch.count_nonzero(whole[64:]) == 0
