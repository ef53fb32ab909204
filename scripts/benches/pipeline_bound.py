"""What a chain of stages could do at best, and a hub: arithmetic on activations, links and computing. Pure.

Of S stages the chain sends each activation once up the links and its gradient once back: 2(S-1) in all, at most 2 from
one machine. A hub sends 3(S-1) and gets 2(S-1), and its stages compute the forward twice (systems/hub.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benches.systems.stages import BACKWARD_SHARE, StageSpec
from swarm.pipeline import wire

PACKET_OVER_PAYLOAD = 1500 / 1448
"""TCP and IP headers: no program can do without"""
BITS = 8


@dataclass(frozen=True)
class Bound:
    compute_tokens_per_s: float
    link_tokens_per_s: float

    @property
    def tokens_per_s(self) -> float:
        return min(self.compute_tokens_per_s, self.link_tokens_per_s)

    @property
    def by(self) -> str:
        return "compute" if self.compute_tokens_per_s <= self.link_tokens_per_s else "link"

    def figures(self) -> dict[str, float]:
        return {
            "bound_tokens_per_s": self.tokens_per_s, "compute_bound_tokens_per_s": self.compute_tokens_per_s,
            "link_bound_tokens_per_s": self.link_tokens_per_s,
        }


def stages_of(specs: Sequence[StageSpec]) -> list[tuple[tuple[int, int], int, float]]:
    """(fragments, number of peers, microbatches a second of all of them), in order. A stage may have several peers, but
    stages must not overlap."""
    counts = Counter(spec.part for spec in specs)
    return [
        (part, count, sum(1 / spec.service_s for spec in specs if spec.part == part))
        for part, count in sorted(counts.items())
    ]


def activations_up(num_stages: int, *, hub: bool) -> list[int]:
    """Activations and gradients that each stage sends for one microbatch, and the hub, which is the first."""
    others = num_stages - 1
    if hub:
        return [3 * others] + [2] * others
    return [1 if index in (0, others) else 2 for index in range(num_stages)]


def activations_down(num_stages: int, *, hub: bool) -> list[int]:
    others = num_stages - 1
    if hub:
        return [2 * others] + [3] * others
    return [1 if index in (0, others) else 2 for index in range(num_stages)]


def bound(
    specs: Sequence[StageSpec], *, tokens: int, hidden: int, up_bytes_per_s: float, down_bytes_per_s: float, hub: bool
) -> Bound:
    """`tokens` of a microbatch; the rates are those of every peer's line."""
    stages = stages_of(specs)
    again = 1 + (1 - BACKWARD_SHARE) * hub  # a hub's stage computes the forward twice
    per_s = [rate / (again if index else 1) for index, (_, _, rate) in enumerate(stages)]
    one = wire.values_bytes((tokens, hidden), BITS) * PACKET_OVER_PAYLOAD
    links = []
    for line_bytes_per_s, activations in (
        (up_bytes_per_s, activations_up(len(stages), hub=hub)),
        (down_bytes_per_s, activations_down(len(stages), hub=hub)),
    ):
        for (_, count, _), number in zip(stages, activations, strict=True):
            if line_bytes_per_s and number:
                links.append(count * line_bytes_per_s / (number * one))
    return Bound(tokens * min(per_s), tokens * min(links, default=float("inf")))


def rate_of(done: Sequence[float], *, began: float, ended: float) -> float:
    """Microbatches a second of those that were done at these times, in the window."""
    inside = sorted(at for at in done if began <= at <= ended)
    return (len(inside) - 1) / (inside[-1] - inside[0]) if len(inside) > 1 and inside[-1] > inside[0] else 0.0


def best_in_flight(lines: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """(microbatches under way, a second) of the hub's best number. `lines`: its "done", whose `credit` says how many
    there were meant to be when it began. The first third of each is left out: pipes fill. All those done in the rest
    count, over its whole length: a hub's come in bursts, and from one burst to its end they would look too quick."""
    best = (0, 0.0)
    numbers = {line["credit"] for line in lines}
    starts = sorted((min(line["at"] for line in lines if line["credit"] == number), number) for number in numbers)
    ends = [at for at, _ in starts[1:]] + [max((line["at"] for line in lines), default=0.0)]
    for (start, number), ended in zip(starts, ends, strict=False):
        began = start + (ended - start) / 3
        if ended > began:
            per_s = sum(began <= line["at"] < ended for line in lines) / (ended - began)
            best = max(best, (number, per_s), key=lambda found: found[1])
    return best
