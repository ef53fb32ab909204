"""How far a contribution is believed: what less than half of the contributors cannot do to an average.

Nobody can recompute what a peer says it has learnt, but the others have learnt the same thing from other text. So each
contribution is held against all others, four times over (notes on averaging, 2.7):

    scale      one whose norm is out of all proportion to its tokens is left out: an accident, or a crude attack
    side       so is one that points away from most of the others, further than chance would have it
    norm       one that is too long is scaled down to 1.5 times the median norm
    direction  of four and more: what it has beside the coordinate-wise median is cut down to the median of what all
               have beside it (centred clipping: Karimireddy, He, Jaggi 2021; one iteration, from the median)

Directions are compared at equal length, so that a fast peer, whose drift is longer because it has trained more, loses
nothing where it agrees with the others. In high dimensions honest peers are about equally far from the middle, so that
without attackers next to nothing is cut off.

What it cannot do: of one or two contributions there is no middle. Three have a median norm and a majority against what
is turned round, but what merely goes elsewhere has its share. Nor is it of use where half of the contributors are one
person's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from swarm.averaging.median import median_
from swarm.config import AveragingConfig

MIN_FOR_NORM, MIN_FOR_DIRECTION = 3, 4
"""contributors"""
SCALE_LIMIT = 8.0
"""times the median norm per square root of tokens, or one over that. Drift grows between the root of the tokens (all
noise) and the tokens (all signal): 8 is a peer with 64 times the tokens of the others whose drift is all signal"""
CHANCE = 3.0
"""times what the cosine of two vectors is that have nothing to do with each other: one over the root of their values"""
NORM_LIMIT = 1.5
"""times the median norm"""
GROWTH_LIMIT = 3.0
"""a contribution of more tokens may be longer, by their root, but no more than by this (9 times the tokens): that they
were trained is only what its peer says"""
STRIDE, MIN_STRIDE = 1 << 16, 4096
"""values of all rows that are worked on together: a quarter of a megabyte, which a core's second cache holds. Of a row
no fewer than the other, or calls cost more than arithmetic"""


@dataclass(frozen=True)
class Verdict:
    """The average is the sum of contributions times `factors`, and of `centre` times `centre_factor`."""

    factors: dict[str, float]
    """by peer"""
    kept: dict[str, float]
    """by peer: how much of the contribution itself is in the average, of what its tokens would give it; 0 to 1"""
    centre: torch.Tensor | None = field(default=None, repr=False)
    """fp32 [numel], of contributions at length 1"""
    centre_factor: float = 0.0
    too_large: frozenset[str] = frozenset()
    """peers that are left out, because what they send is out of all proportion"""


def judge_for(
    averaging: AveragingConfig, contributions: Mapping[str, torch.Tensor], tokens: Mapping[str, int],
    shares: Mapping[str, float],
) -> Verdict:
    """As the run wants it; see `judge`."""
    if not averaging.robust:
        return plain(shares)
    return judge(contributions, tokens, shares, exact=averaging.mode == "sync")


def plain(shares: Mapping[str, float]) -> Verdict:
    """Everybody is believed."""
    return Verdict(dict(shares), dict.fromkeys(shares, 1.0))


def judge(
    contributions: Mapping[str, torch.Tensor], tokens: Mapping[str, int], shares: Mapping[str, float], *,
    exact: bool = False,
) -> Verdict:
    """`contributions`: fp32 [numel], finite, by peer; `tokens`: what each is believed to have trained; `shares`: of
    each in the average (`plan.weights`). `exact`: mean gradients (`sync` runs), of which the exact mean is wanted,
    without what is out of all proportion."""
    if len(contributions) < MIN_FOR_NORM:
        return plain(shares)
    products = _products(contributions)
    norms = {peer_id: math.sqrt(row[peer_id]) for peer_id, row in products.items()}
    power = -0.5 if exact else 0.5  # more tokens make a mean gradient less noisy, and a drift longer
    sizes = {peer_id: norm / tokens[peer_id] ** power for peer_id, norm in norms.items()}
    typical = statistics.median_low(sizes.values())  # where two halves differ, to do too little is safer
    too_large = frozenset(peer_id for peer_id, size in sizes.items() if size > SCALE_LIMIT * typical > 0)
    if exact:
        return _verdict(shares, kept={p: 1.0 for p in norms if p not in too_large}, too_large=too_large)
    if not 0 < typical < math.inf:  # most have learnt nothing, or send nonsense: then nothing is learnt here
        return _verdict(shares, kept={})
    likely = [p for p, size in sizes.items() if size >= typical / SCALE_LIMIT and p not in too_large]
    against = [p for p in likely if _usual_cosine(p, likely, products) < -_chance(contributions[p])]
    majority = len(likely) - len(against) > len(norms) / 2  # or there are two sides, and nobody knows which is right
    heard = [p for p in likely if p not in against] if majority else likely
    usual = statistics.median(tokens.values())
    lengths = {}
    for peer_id in heard:
        growth = min(tokens[peer_id] ** 0.5, GROWTH_LIMIT * usual ** 0.5)
        lengths[peer_id] = min(norms[peer_id], NORM_LIMIT * typical * growth)
    if len(heard) < MIN_FOR_DIRECTION:
        kept = {peer_id: lengths[peer_id] / norms[peer_id] for peer_id in heard}
        return _verdict(shares, kept=kept, too_large=too_large)
    centre, beside = _centre({peer_id: (contributions[peer_id], norms[peer_id]) for peer_id in heard})
    radius = statistics.median(beside.values())
    directed = {peer_id: radius / distance if distance > radius else 1.0 for peer_id, distance in beside.items()}
    return _verdict(
        shares, kept={peer_id: directed[peer_id] * lengths[peer_id] / norms[peer_id] for peer_id in heard},
        centre=centre, along={peer_id: lengths[peer_id] * (1 - directed[peer_id]) for peer_id in heard},
        too_large=too_large,
    )


def _usual_cosine(peer_id: str, likely: Sequence[str], products: Mapping[str, Mapping[str, float]]) -> float:
    """The median of those with the others."""
    norm = math.sqrt(products[peer_id][peer_id])
    others = [other for other in likely if other != peer_id]
    cosines = [products[peer_id][other] / norm / math.sqrt(products[other][other]) for other in others]
    return statistics.median(cosines) if cosines else 1.0


def _verdict(
    shares: Mapping[str, float], *, kept: Mapping[str, float], centre: torch.Tensor | None = None,
    along: Mapping[str, float] | None = None, too_large: frozenset[str] = frozenset(),
) -> Verdict:
    """Who is not in `kept` is left out, and the others make up for its share. `along`: what each gets of the centre for
    what it has lost."""
    total = math.fsum(shares[peer_id] for peer_id in kept) or 1.0
    factors = {peer_id: shares[peer_id] * kept.get(peer_id, 0.0) / total for peer_id in shares}
    return Verdict(
        factors, {peer_id: kept.get(peer_id, 0.0) for peer_id in shares}, centre,
        math.fsum(shares[peer_id] * length / total for peer_id, length in (along or {}).items()), too_large,
    )


def strides(numel: int, rows: int) -> Iterator[slice]:
    """Of vectors of which so many rows are worked on together."""
    step = max(MIN_STRIDE, STRIDE // rows)
    for start in range(0, numel, step):
        yield slice(start, min(start + step, numel))


def _chance(values: torch.Tensor) -> float:
    """Which cosine says nothing. Of values that are not zero: padding and what is seldom used says nothing either."""
    return CHANCE / math.sqrt(max(1, int(torch.count_nonzero(values))))


def _products(contributions: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Inner product of each two. A square that is too large for fp32 is infinite, and then others may be no numbers."""
    names, numel = sorted(contributions), next(iter(contributions.values())).numel()
    total = torch.zeros(len(names), len(names), dtype=torch.float64)
    for span in strides(numel, len(names)):
        rows = torch.stack([contributions[peer_id][span] for peer_id in names])
        total += rows @ rows.t()
    return {peer_id: dict(zip(names, row, strict=True)) for peer_id, row in zip(names, total.tolist(), strict=True)}


def _square(values: torch.Tensor) -> float:
    return float(values.dot(values))


def _centre(lines: Mapping[str, tuple[torch.Tensor, float]]) -> tuple[torch.Tensor, dict[str, float]]:
    """(coordinate-wise median [numel] of vectors scaled to length 1, how far each is from it). `lines`: (vector, norm).

    The second pass over a stride finds it in the cache; its scaled copies are spoilt by then and made again.
    """
    numel, count = next(iter(lines.values()))[0].numel(), len(lines)
    centre = torch.empty(numel)
    squares: dict[str, list[float]] = {peer_id: [] for peer_id in lines}
    for span in strides(numel, count):
        room = torch.empty(count + 1, span.stop - span.start)
        rows = [torch.mul(values[span], 1 / norm, out=room[i]) for i, (values, norm) in enumerate(lines.values())]
        middle = median_(rows, room[count], out=centre[span])
        for peer_id, (values, norm) in lines.items():
            squares[peer_id].append(_square(torch.add(middle, values[span], alpha=-1 / norm, out=room[0])))
    return centre, {peer_id: math.sqrt(math.fsum(parts)) for peer_id, parts in squares.items()}
