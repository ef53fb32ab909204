"""What a set of stages can do: microbatches/s through every fragment, and the one figure that placement raises.

A microbatch may enter and leave a stage at any fragment boundary, so a peer divides its time over the fragments of its
stage as it likes. `flow` is the most that the whole model can do then: the linear program

    max F  with  sum_p y[p, f] = F * work[f],  sum_f y[p, f] <= speed[p],  y[p, f] = 0 outside p's stage

solved by its dual, which is a cut: F = min over sets S of fragments of (speed of the peers with a fragment in S) /
(work of S), and stages being consecutive, the worst S is found by a dynamic program over boundaries. Exact, and quick
for ten thousand peers.

F alone is a bad guide: it does not see a second bottleneck, nor that a fragment hangs on one peer. Placement looks at
the fair rates instead: what each fragment gets when time is divided so that the poorest get most (`fair_rates`,
Sinkhorn's scaling, one price a fragment: a peer divides its time in proportion to the prices, and dear are the
fragments that lack rate). Their soft minimum, less a share of each fragment's largest holder, is the `worth` of a
placement. Counting each peer as equally divided over its stage instead (as Petals counts) underrates the large ones.

Shapes: F fragments, S stages (of one or more peers each), K candidates (one more peer, K places to put it).
Speeds are in work/s, work in any unit a microbatch, so rates are in microbatches/s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

POWER = 8.0
"""of the soft minimum: at 8, a fragment with 1.5 times the poorest's rate weighs a twenty-fifth of it"""
DISCOUNT = 0.4
"""share of a fragment's largest holder that does not count, because it may leave: two holders are worth more"""
NOTHING = 1e-3
"""rate of a fragment that nobody holds, as a share of the average: not 0, so that two gaps are worse than one"""
CHEAPEST = 1e-6
"""least price, as a share of the average one"""


@dataclass(frozen=True)
class Stages:
    """Peers with the same stage are one row."""

    mask: Floats
    """(S, F): 1 where the stage has the fragment"""
    speed: Floats
    """(S,): of its peers together, work/s"""
    largest: Floats
    """(S,): of its fastest peer"""


def stages_of(firsts: Ints, ends: Ints, speeds: Floats, *, num_fragments: int) -> Stages:
    """Stages [first, end) of peers, put together where they are the same; empty ones are left out."""
    kept = ends > firsts
    keys, place = np.unique(firsts[kept] * (num_fragments + 1) + ends[kept], return_inverse=True)
    speed, largest = np.zeros(len(keys)), np.zeros(len(keys))
    np.add.at(speed, place, speeds[kept])
    np.maximum.at(largest, place, speeds[kept])
    return Stages(masks_of(keys // (num_fragments + 1), keys % (num_fragments + 1), num_fragments), speed, largest)


def masks_of(firsts: Ints, ends: Ints, num_fragments: int) -> Floats:
    """(n, F): 1 inside [first, end)."""
    place = np.arange(num_fragments)
    return ((place >= firsts[:, None]) & (place < ends[:, None])).astype(np.float64)


def fair_rates(
    stages: Stages, work: Floats, *, own: Floats, own_speed: float, prices: Floats, sweeps: int
) -> tuple[Floats, Floats, Floats]:
    """Rates of each fragment when one more peer takes each of K stages: (rates, of which the largest holder's, prices),
    each (K, F).

    `own` (K, F) is the mask of its stage, all 0 for none; `prices` (F,) or (K, F) to begin with, from a similar
    placement or `work`; the more sweeps, the closer to the fairest.
    """
    v = np.broadcast_to(prices, own.shape).copy()
    density = rates = v
    share = own_share = v
    for sweep in range(sweeps + 1):
        share = stages.speed / (v @ stages.mask.T)
        own_share = own_speed / np.maximum((v * own).sum(axis=1, keepdims=True), 1e-300) * own
        density = share @ stages.mask + own_share
        rates = v * density / work
        if sweep < sweeps:
            mean = rates.mean(axis=1, keepdims=True)
            v = v * np.clip(mean / np.maximum(rates, 1e-300), 0.1, 10.0)
            v = np.maximum(v / v.mean(axis=1, keepdims=True), CHEAPEST)
    largest = own_share
    alone = stages.largest / stages.speed
    if len(alone):
        largest = np.maximum(own_share, ((share * alone)[:, :, None] * stages.mask).max(axis=1))
    return rates, largest * v / work, v


def worth(rates: Floats, largest: Floats, work: Floats, *, scale: float) -> Floats:
    """(K,): soft minimum of the fragments' rates, microbatches/s, less what hangs on their largest holders.

    `scale`: the rate if all that there is were evenly spread; it fixes what a gap counts.
    """
    steady = np.maximum(rates - DISCOUNT * largest, NOTHING * scale)
    least = steady.min(axis=1, keepdims=True)
    soft: Floats = ((steady / least) ** -POWER @ (work / work.sum())) ** (-1 / POWER) * least[:, 0]
    return soft


def flow(stages: Stages, work: Floats) -> float:
    """The most microbatches/s that all fragments can do together; 0 where one is held by nobody.

    Dinkelbach's method on the cut: F is too high as long as some set of fragments has less speed than F asks of it.
    """
    num_fragments = len(work)
    inside = _inside(stages, num_fragments)
    total = float(stages.speed.sum())
    rate = total / float(work.sum())
    while rate > 0:
        best, chosen = [0.0], [np.zeros(num_fragments, dtype=bool)]
        for end in range(1, num_fragments + 1):
            costs = np.asarray(best) - inside[:end, end]
            start = int(costs.argmin())
            inside_cut = best[-1] - rate * work[end - 1]
            if inside_cut < costs[start]:
                cut = chosen[-1].copy()
                cut[end - 1] = True
                best.append(inside_cut)
            else:
                cut = chosen[start]
                best.append(float(costs[start]))
            chosen.append(cut)
        cut = chosen[-1]
        if best[-1] + total > -1e-9 * total or not cut.any():
            return rate
        able = float(stages.speed[(stages.mask[:, cut] > 0).any(axis=1)].sum())
        lower = able / float(work[cut].sum())
        if lower >= rate:
            return rate
        rate = lower
    return 0.0


def _inside(stages: Stages, num_fragments: int) -> Floats:
    """[i, j]: speed of the stages that lie within fragments i to j."""
    exact = np.zeros((num_fragments + 1, num_fragments + 1))
    if len(stages.speed):
        first = stages.mask.argmax(axis=1)
        np.add.at(exact, (first, first + stages.mask.sum(axis=1).astype(np.int64)), stages.speed)
    within: Floats = np.cumsum(np.cumsum(exact[::-1], axis=0)[::-1], axis=1)
    return within
