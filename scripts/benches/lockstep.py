"""Peers of one run that take turns in one process: the product's own model, inner optimizer, ledger, codec, reduction
and outer step, with nothing of the network. A swarm of real peers is timed by the machine it runs on, so two runs of it
never see the same rounds; these do. A round's result arrives one inner step after the contribution, as on a quick link.

Inner step by inner step, the peers together see the batches that one process sees with the same total batch (`Alone`):
what differs between their losses is the rounds, not the text.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from swarm.averaging import outer, plan, robust, roll
from swarm.averaging.global_state import GlobalState
from swarm.averaging.ledger import Drift, Ledger
from swarm.averaging.packed import Packed
from swarm.averaging.reduction import reduce_part
from swarm.config import RunConfig
from swarm.data.stream import PackedStream
from swarm.network import codec
from swarm.train.inner import InnerOptimizer
from swarm.train.run_source import Held, hold, load_states

Weights = Mapping[int, torch.Tensor]
"""fragment -> fp32 [numel]"""
CPU = torch.device("cpu")


class Holder(Protocol):
    """A peer that holds the fragment."""

    held: Held
    ledgers: Mapping[int, Ledger] | list[Ledger]
    """by fragment"""
    feedback: dict[tuple[int, int, int], torch.Tensor]
    """of the parts that it has owned: (fragment, first block, end)"""


@dataclass
class Peer:
    name: str
    held: Held
    inner: InnerOptimizer
    ledgers: list[Ledger]
    feedback: dict[tuple[int, int, int], torch.Tensor]


class Simulation:
    """K whole-model peers of one run, in lock-step."""

    def __init__(
        self, run: RunConfig, *, num_peers: int, tokens: torch.Tensor, start: Weights | None = None, before: int = 0,
        device: torch.device = CPU,
    ) -> None:
        """`tokens`: of the text; `start`: weights to go on from, trained on `before` tokens; None: the run's own. The
        models are on `device`, all else is where peers have it: in main memory."""
        self.run, self.tokens = run, before
        self.bytes_sent = 0
        """by all peers together, to others"""
        first = started(run, start, before, device)
        self.peers = [self._peer(copy.deepcopy(first), f"peer-{number}") for number in range(num_peers)]
        self._stream = stream_of(run, tokens, before)
        self._arriving: list[tuple[int, str, GlobalState]] = []

    def _peer(self, held: Held, name: str) -> Peer:
        parameters = dict(held.model.named_parameters())
        ledgers = [
            Ledger(state, Drift(held.layouts[index], parameters)) for index, state in held.states.items()
        ]
        return Peer(name, held, InnerOptimizer(held.model, held.fragments, self.run), ledgers, {})

    def step(self) -> None:
        """One inner step of every peer; then rounds that are due."""
        self.finish()
        rate = outer.learning_rate(self.run, self.tokens)
        sequences = self.run.train.batch_sequences
        batches = self._stream.next_batch(sequences * len(self.peers)).split(sequences)
        for peer, batch in zip(self.peers, batches, strict=True):
            peer.inner.gradients(batch)
            peer.inner.step(rate)
            for ledger in peer.ledgers:
                ledger.trained(batch.numel())
            self.tokens += batch.numel()
        complete = self.tokens >= self.run.train.total_tokens
        for index in range(self.run.fragments):
            pending = sum(peer.ledgers[index].pending_tokens for peer in self.peers)
            state = self.peers[0].ledgers[index].state
            target = plan.target_tokens(
                self.run, fragment=index, version=state.version, tokens=state.tokens, staggered=True
            )
            if pending >= target or complete:
                self._round(index)

    def _round(self, index: int) -> None:
        opening, state, sent = average(self.run, index, self.peers, names=[peer.name for peer in self.peers])
        self.bytes_sent += sent
        self._arriving.append((index, opening, state))

    def finish(self) -> None:
        """Apply what is on its way, so that the model is the one that a peer would export."""
        for index, opening, state in self._arriving:
            for peer in self.peers:
                peer.ledgers[index].apply(state, opening, included=True)
        self._arriving = []

    def replace(self, number: int, name: str) -> None:
        """A peer leaves, with what it had not contributed yet; another one takes its place, at the newest version."""
        states = [ledger.state for ledger in self.peers[0].ledgers]
        held = copy.deepcopy(self.peers[number].held)
        held.states = {state.fragment: state for state in states}
        load_states(held, states)
        self.peers[number] = self._peer(held, name)

    def weights(self) -> dict[int, torch.Tensor]:
        """The global ones."""
        self.finish()
        return {index: ledger.state.weights for index, ledger in enumerate(self.peers[0].ledgers)}


class Alone:
    """One process, synchronous: inner steps of the batches of `num_peers` peers together, and no rounds."""

    def __init__(
        self, run: RunConfig, *, num_peers: int, tokens: torch.Tensor, start: Weights | None = None, before: int = 0,
        device: torch.device = CPU,
    ) -> None:
        train = replace(run.train, batch_sequences=run.train.batch_sequences * num_peers)
        self.run, self.tokens = replace(run, train=train), before
        self._held = started(self.run, start, before, device)
        self._inner = InnerOptimizer(self._held.model, self._held.fragments, self.run)
        self._stream = stream_of(run, tokens, before)

    def step(self) -> None:
        batch = self._stream.next_batch(self.run.train.batch_sequences)
        self._inner.gradients(batch)
        self._inner.step(outer.learning_rate(self.run, self.tokens))
        self.tokens += batch.numel()

    def weights(self) -> dict[int, torch.Tensor]:
        parameters = dict(self._held.model.named_parameters())
        return {index: layout.flatten(parameters) for index, layout in self._held.layouts.items()}


def started(run: RunConfig, start: Weights | None, before: int, device: torch.device = CPU) -> Held:
    """The whole model, with these weights at version 0, trained on `before` tokens."""
    held = hold(run)
    torch.nn.Module.to(held.model, device)
    if start is not None:
        held.states = {
            index: replace(state, weights=start[index].clone(), tokens=before) for index, state in held.states.items()
        }
        load_states(held, held.states.values())
    return held


def stream_of(run: RunConfig, tokens: torch.Tensor, before: int) -> PackedStream:
    return PackedStream(
        tokens, sequence_length=run.train.sequence_length, seed=run.seed, reader=f"peers-after-{before}"
    )


def average(
    run: RunConfig, index: int, holders: Sequence[Holder], *, names: Sequence[str] | None = None
) -> tuple[str, GlobalState, int]:
    """(opening, next state, bytes sent to others) of a round of fragment `index`. Nothing is applied yet: each ledger's
    `apply(state, opening, included=True)` does that, when the result has arrived. Each holder owns as many parts as the
    others, and sends what it makes of them to all."""
    bits, layout = run.averaging.bits, holders[0].held.layouts[index]
    state = holders[0].ledgers[index].state
    opening = f"{index}/{state.version + 1}"
    names = names or [f"peer-{number}" for number in range(len(holders))]
    parts = [(start, end, names.index(owner)) for start, end, owner in plan.split(layout.num_blocks, names)]
    decoded: list[dict[str, torch.Tensor]] = [{} for _ in parts]
    counts, sent = {}, 0
    for number, (name, holder) in enumerate(zip(names, holders, strict=True)):
        contribution = holder.ledgers[index].contribute(opening, state.version + 1)
        counts[name] = contribution.tokens
        said = []
        for part, (start, end, owner) in enumerate(parts):
            values = contribution.offered[start * codec.BLOCK:end * codec.BLOCK]
            data, values_said = codec.encode_and_read(values, layout.fine_in(start, end), bits)
            sent += len(data) * (owner != number)
            decoded[part][name] = values_said
            said.append(values_said)
        contribution.lost = Packed.of(contribution.offered - torch.cat(said))
    warm = roll.warmth(state.roll, counts, run)
    results = []
    for part, (start, end, owner) in enumerate(parts):
        data = _reduce(run, index, (start, end), holders[owner], decoded[part], counts, warm)
        sent += len(data) * (len(holders) - 1)
        results.append(codec.decode(data, end - start, layout.fine_in(start, end), bits))
    return opening, outer.advance(run, state, counts, torch.cat(results), layout.decay_mask()), sent


def _reduce(
    run: RunConfig, index: int, part: tuple[int, int], owner: Holder, values: dict[str, torch.Tensor],
    counts: dict[str, int], warm: Mapping[str, float],
) -> bytes:
    (start, end), bits = part, run.averaging.bits
    feedback = owner.feedback.get((index, start, end), torch.zeros((end - start) * codec.BLOCK))
    fine = owner.held.layouts[index].fine_in(start, end)
    verdict = robust.judge_for(run.averaging, values, counts, plan.weights(counts, warm))
    data, owner.feedback[index, start, end] = reduce_part(
        values, counts, feedback, num_fine=fine, bits=bits, verdict=verdict
    )
    return data
