"""A round of one fragment among peers of one process: the product's own ledger, codec, reduction and outer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from swarm.averaging import outer, plan, robust
from swarm.averaging.global_state import GlobalState
from swarm.averaging.layout import Layout
from swarm.averaging.ledger import Ledger
from swarm.averaging.packed import Packed
from swarm.averaging.reduction import reduce_part
from swarm.config import RunConfig
from swarm.network import codec
from swarm.train.run_source import Held


class Holder(Protocol):
    """A peer that holds the fragment."""

    held: Held
    ledgers: Mapping[int, Ledger] | list[Ledger]
    """by fragment"""
    feedback: dict[tuple[int, int, int], torch.Tensor]
    """of the parts that it has owned: (fragment, first block, end)"""


def average(run: RunConfig, index: int, holders: Sequence[Holder]) -> tuple[str, GlobalState, int]:
    """(opening, next state, bytes of the contributions) of a round of fragment `index`. Nothing is applied yet: each
    ledger's `apply(state, opening, included=True)` does that, when the result has arrived."""
    bits, layout = run.averaging.bits, holders[0].held.layouts[index]
    state = holders[0].ledgers[index].state
    opening = f"{index}/{state.version + 1}"
    names = [f"peer-{number}" for number in range(len(holders))]
    parts = [(start, end, names.index(owner)) for start, end, owner in plan.split(layout.num_blocks, names)]
    decoded: list[dict[str, torch.Tensor]] = [{} for _ in parts]
    counts, sent = {}, 0
    for name, holder in zip(names, holders, strict=True):
        contribution = holder.ledgers[index].contribute(opening, state.version + 1)
        counts[name] = contribution.tokens
        said = []
        for part, (start, end, _) in enumerate(parts):
            values = contribution.offered[start * codec.BLOCK:end * codec.BLOCK]
            data = codec.encode(values, layout.fine_in(start, end), bits)
            sent += len(data)
            decoded[part][name] = codec.decode(data, end - start, layout.fine_in(start, end), bits)
            said.append(decoded[part][name])
        contribution.lost = Packed.of(contribution.offered - torch.cat(said))
    results = [
        _reduce(run, index, layout, (start, end), holders[owner], decoded[part], counts)
        for part, (start, end, owner) in enumerate(parts)
    ]
    tokens = state.tokens + sum(counts.values())
    step = outer.OuterStep(run, state.version + 1, state.tokens, tokens)
    weights, buffers = outer.apply(step, state.weights, list(state.buffers), torch.cat(results), layout.decay_mask())
    return opening, GlobalState(index, step.version, tokens, weights, tuple(buffers)), sent


def _reduce(
    run: RunConfig, index: int, layout: Layout, part: tuple[int, int], owner: Holder,
    values: dict[str, torch.Tensor], counts: dict[str, int],
) -> torch.Tensor:
    (start, end), bits = part, run.averaging.bits
    feedback = owner.feedback.get((index, start, end), torch.zeros((end - start) * codec.BLOCK))
    fine = layout.fine_in(start, end)
    verdict = robust.judge_for(run.averaging, values, counts, plan.weights(counts))
    data, owner.feedback[index, start, end] = reduce_part(
        values, counts, feedback, num_fine=fine, bits=bits, verdict=verdict
    )
    return codec.decode(data, end - start, fine, bits)
