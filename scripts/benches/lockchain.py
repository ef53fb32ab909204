"""A model in stages in one process, in lock-step: real StageCompute, wire codec and inner steps, and no network.

Each stage has the same number of holders. In a step, as many origins as that each send a batch down the stages, one
microbatch after the other, each through a holder of every stage that is drawn at random; what is sent on is what the
codec makes of it, both ways. A holder's fragments take an inner step when they have their quota of tokens, and the
holders of a fragment average what they have learnt after `tokens_per_round`, as peers of the product do.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

import torch

from benches.lockstep import average
from swarm.averaging import outer, plan
from swarm.averaging.global_state import GlobalState
from swarm.averaging.ledger import Drift, Ledger
from swarm.config import RunConfig
from swarm.data.batch import Batch
from swarm.data.stream import PackedStream
from swarm.pipeline import wire
from swarm.pipeline.compute import StageCompute
from swarm.train.inner import InnerOptimizer
from swarm.train.run_source import hold
from swarm.train.serving import microbatch_sequences
from swarm.train.stage_steps import StageSteps

FP32 = 32
Weights = Mapping[int, torch.Tensor]
"""of each fragment, fp32 [numel]"""


class StageHolder:
    """A peer with one stage. To `StageSteps` it also is the averager: tells the tokens, takes what was trained."""

    def __init__(self, run: RunConfig, part: tuple[int, int], start: Weights, swarm: LockChain) -> None:
        self.held = hold(run, part=part)
        self._swarm = swarm
        self.start, self.end = part
        parameters = dict(self.held.model.named_parameters())
        states = {i: start_state(i, start[i], swarm.tokens, outer.num_buffers(run)) for i in range(*part)}
        with torch.no_grad():
            for index, state in states.items():
                for name, values in self.held.layouts[index].views(state.weights):
                    parameters[name].copy_(values)
        self.ledgers = {i: Ledger(state, Drift(self.held.layouts[i], parameters)) for i, state in states.items()}
        self.feedback: dict[tuple[int, int, int], torch.Tensor] = {}
        inner = InnerOptimizer(self.held.model, self.held.fragments, run)
        self.compute = StageCompute(self.held.stage, {f.index: f for f in self.held.fragments}, inner.parameters)
        self.steps = StageSteps(run, inner, self.compute, self)  # type: ignore[arg-type]

    def estimated_tokens(self) -> int:
        return self._swarm.tokens

    def trained_fragment(self, fragment: int, tokens: int) -> None:
        self.ledgers[fragment].trained(tokens)

    def working(self) -> dict[int, torch.Tensor]:
        parameters = dict(self.held.model.named_parameters())
        return {index: layout.flatten(parameters) for index, layout in self.held.layouts.items()}


class LockChain:
    """`edges`: where the model is cut, such as [0, 2, 4]; `bits`: of what is sent on, `back_bits` of its gradient."""

    def __init__(
        self, run: RunConfig, edges: Sequence[int], tokens: torch.Tensor, *, bits: int, back_bits: int | None = None,
        num_holders: int = 1, num_origins: int = 1, start: Weights | None = None, before: int = 0,
    ) -> None:
        """`back_bits`: as `bits` by default. `start`: weights to go on from, trained on `before` tokens; None: the
        run's own. With one holder and several origins an inner step has the batches of all of them, and there is
        nothing to average."""
        self.run, self.tokens, self._bits, self._back_bits = run, before, bits, back_bits or bits
        if start is None:
            start = {index: state.weights for index, state in hold(run).states.items()}
        batch = run.train.batch_sequences * (num_origins if num_holders == 1 else 1)
        theirs = schedule_of(run, train={"batch_sequences": batch})
        self.stages = [
            [StageHolder(theirs, (a, b), start, self) for _ in range(num_holders)]
            for a, b in zip(edges, edges[1:], strict=False)
        ]
        length = run.train.sequence_length
        self._streams = [
            PackedStream(tokens, sequence_length=length, seed=run.seed, reader=f"origin-{before}-{number}")
            for number in range(num_origins)
        ]
        self._dice = random.Random(run.seed)
        self._number = 0
        self._averages = num_holders > 1
        self._arriving: list[tuple[int, str, GlobalState]] = []

    def step(self) -> float:
        """A batch of every origin, and the rounds that are due; returns the mean loss."""
        self._apply()
        batches = [stream.next_batch(self.run.train.batch_sequences) for stream in self._streams]
        pieces = zip(*(batch.split(microbatch_sequences(self.run)) for batch in batches), strict=True)
        losses = [self.microbatch(piece) for together in pieces for piece in together]
        self.tokens += sum(batch.numel() for batch in batches)
        complete = self.tokens >= self.run.train.total_tokens
        if complete:
            for stage in self.stages:
                for holder in stage:
                    holder.steps.take_rest()
        if self._averages:
            for index in range(self.run.fragments):
                self._round_if_due(index, last=complete)
        return sum(losses) / len(losses)

    def microbatch(self, batch: Batch) -> float:
        """Down the stages and back, added up at each; returns the mean loss."""
        key, self._number = self._number, self._number + 1
        path = [self._dice.choice(stage) for stage in self.stages]
        values, segments = batch.tokens, batch.segments
        for here in path[:-1]:
            left = here.compute.forward(
                key, values, start=here.start, end=here.end, tokens=batch.numel(), segments=segments
            )
            values = sent(left, self._bits)
        last = path[-1]
        loss, gradient = last.compute.loss(key, values, batch.tokens, start=last.start, end=last.end, segments=segments)
        for here in reversed(path[:-1]):
            assert gradient is not None
            gradient = here.compute.backward(key, sent(gradient, self._back_bits))
        for here in path:
            here.compute.commit(key)
            here.steps.take_due()
        return loss

    def _holders(self, index: int) -> list[StageHolder]:
        return [holder for stage in self.stages for holder in stage if holder.start <= index < holder.end]

    def _round_if_due(self, index: int, *, last: bool) -> None:
        holders = self._holders(index)
        state = holders[0].ledgers[index].state
        target = plan.target_tokens(
            self.run, fragment=index, version=state.version, tokens=state.tokens, staggered=True
        )
        if last or sum(holder.ledgers[index].pending_tokens for holder in holders) >= target:
            names = {
                f"peer-{number}": holder for number, holder in enumerate(holders)
                if holder.ledgers[index].pending_tokens  # others have no say
            }
            opening, state, _ = average(self.run, index, list(names.values()), names=list(names))
            self._arriving.append((index, opening, state))

    def _apply(self) -> None:
        for index, opening, state in self._arriving:
            for holder in self._holders(index):
                holder.ledgers[index].apply(state, opening, included=True)
        self._arriving = []

    def weights(self) -> dict[int, torch.Tensor]:
        """Of each fragment: the global ones after rounds, or else the only holder's working ones."""
        self._apply()
        found: dict[int, torch.Tensor] = {}
        for stage in self.stages:
            found |= stage[0].working()
        return found


def sent(values: torch.Tensor, bits: int) -> torch.Tensor:
    """What the receiver sees."""
    return wire.decode_values(wire.encode_values(values, bits), tuple(values.shape), bits)


def start_state(index: int, weights: torch.Tensor, tokens: int, num_buffers: int) -> GlobalState:
    return GlobalState(index, 0, tokens, weights.clone(), tuple(torch.zeros_like(weights) for _ in range(num_buffers)))


def schedule_of(run: RunConfig, **changes: dict[str, object]) -> RunConfig:
    """The run with other `train` and `averaging` settings."""
    sections = {name: dataclasses.replace(getattr(run, name), **values) for name, values in changes.items()}
    return dataclasses.replace(run, **sections)
