"""The coordinate-wise median of a few long vectors: the centre that less than half of them cannot move far.

By a sorting network (Batcher's merge exchange; Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M): a fixed
list of "put the smaller one here and the larger one there", each of which is one minimum and one maximum of whole
vectors. What the middle does not depend on is left out. In strides that fit the cache, with no copy but the one that is
sorted: torch's and numpy's own medians look at one coordinate after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Exchange:
    """Of rows `low` and `high`, the smaller value goes to `low` and the larger one to `high`; only what is asked for
    again is written."""

    low: int
    high: int
    keep_smaller: bool
    keep_larger: bool


@lru_cache(maxsize=64)
def network(count: int) -> tuple[Exchange, ...]:
    """Exchanges after which the middle row (the two middle ones, if `count` is even) is what it is in sorted order."""
    needed = set(_middle(count))
    kept: list[Exchange] = []
    for low, high in reversed(_merge_exchange(count)):
        if low in needed or high in needed:
            kept.append(Exchange(low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))


def median_(rows: Sequence[torch.Tensor], scratch: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Of fp32 `rows` [n] each, into `out` [n]: the middle one of each coordinate, or the mean of the two middle ones.

    Spoils the rows and `scratch` [n]. Not a number anywhere is a bug of ours: the codec lets none in.
    """
    rows = list(rows)
    for exchange in network(len(rows)):
        low, high = rows[exchange.low], rows[exchange.high]
        if exchange.keep_smaller and exchange.keep_larger:
            torch.minimum(low, high, out=scratch)
            torch.maximum(low, high, out=high)
            rows[exchange.low], scratch = scratch, low
        elif exchange.keep_smaller:
            torch.minimum(low, high, out=low)
        else:
            torch.maximum(low, high, out=high)
    first, second = _middle(len(rows))
    return out.copy_(rows[first]) if first == second else torch.add(rows[first], rows[second], out=out).mul_(0.5)


def _middle(count: int) -> tuple[int, int]:
    return (count - 1) // 2, count // 2


def _merge_exchange(count: int) -> list[tuple[int, int]]:
    """Pairs (low, high) that sort any `count` values, in the order in which they are to be compared."""
    pairs: list[tuple[int, int]] = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    step = top if count > 1 else 0
    while step:
        reach, offset, distance = top, 0, step
        while True:
            pairs += [(i, i + distance) for i in range(count - distance) if i & step == offset]
            if reach == step:
                break
            distance, reach, offset = reach - step, reach >> 1, step
        step >>= 1
    return pairs
