"""A batch: parts of it add up, its targets are counted, segments that make no rows are refused."""

from __future__ import annotations

import pytest
import torch

from swarm.data.batch import Batch

TOKENS = torch.arange(24).view(4, 6)
SEGMENTS = (((0, 6),), ((2, 6),), ((0, 2), (3, 3), (1, 1)), ((0, 3), (2, 3)))


def test_plain_rows_have_a_target_for_each_token_but_the_first() -> None:
    batch = Batch(TOKENS)
    assert (len(batch), batch.numel(), batch.num_targets, batch.num_segments) == (4, 24, 20, 0)
    assert all(part.segments is None for part in batch.split(3))


def test_targets_come_after_the_prefix_and_never_first() -> None:
    batch = Batch(TOKENS, SEGMENTS)
    assert [part.num_targets for part in batch.split(1)] == [5, 4, 1, 3]
    assert (batch.num_targets, batch.num_segments, batch.numel()) == (13, 7, 24)


@pytest.mark.parametrize("sequences", [1, 2, 3, 4, 9])
def test_parts_are_the_whole(sequences: int) -> None:
    batch = Batch(TOKENS, SEGMENTS)
    parts = batch.split(sequences)
    assert torch.equal(torch.cat([part.tokens for part in parts]), TOKENS)
    assert sum((part.segments or () for part in parts), ()) == SEGMENTS
    assert all(len(part) == sequences for part in parts[:-1]) and len(parts) == -(-4 // sequences)
    assert sum(part.num_targets for part in parts) == batch.num_targets


@pytest.mark.parametrize("segments", [
    (((0, 6),),) * 3, (((0, 5),),) * 4, (((0, 7),),) * 4, (((7, 6),),) * 4, (((-1, 6),),) * 4,
    (((0, 6), (0, 0)),) * 4, ((),) * 4,
])
def test_segments_that_make_no_rows_are_refused(segments: tuple[tuple[tuple[int, int], ...], ...]) -> None:
    with pytest.raises(ValueError, match="row"):
        Batch(TOKENS, segments)
