"""Forward and backward of microbatches on this peer's stage, and the gradients that they leave. On one thread only.

A microbatch's backward uses the weights of its forward, whatever inner steps and rounds come between: graphs are built
on aliases of the working weights, and who is about to write calls `before_write`, which gives the working weights new
memory where a graph still needs the old one. That costs a copy of a fragment for each of its steps with microbatches in
flight, and no recomputing.

Where memory runs out, sequences are computed in pieces from then on, half as many at a time. Then nothing is kept but
what came in: each piece goes forward once more in its backward, so that only one piece's graph is ever there. The
gradients are the same (with dropout, another one is drawn).

Gradients wait, apart from each other, until the microbatch's origin has said which of the peers that worked on it count
(chain.py): only then they are added up, so each enters each fragment once (I2). Each counts by the targets that its
mean loss is of, so that a step has the gradient of the mean over all its targets; the books count tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call

from swarm.data.batch import num_targets
from swarm.errors import PeerRefused
from swarm.model.fragments import FragmentSpec
from swarm.model.prefix import Segments, attention, targets_of
from swarm.model.stage import Stage
from swarm.pipeline.pieces import Pieces, spans


@dataclass
class _Weights:
    """A stage and its weights as graphs use them: leaves that share memory with the working weights, until those
    move."""

    stage: Stage
    leaves: dict[str, torch.Tensor]
    """by name in the whole model"""
    users: int = 0
    """microbatches that still need them"""


@dataclass
class _Graph:
    """A microbatch between its forward and its backward."""

    fragments: dict[int, FragmentSpec]
    """that are computed, in their order"""
    entered: torch.Tensor
    """token ids at fragment 0, else hidden states, on the stage's device"""
    targets: torch.Tensor | None
    """token ids (or IGNORED), where the loss is computed here"""
    segments: Segments | None
    """None: each sequence is a causal one"""
    weights: _Weights
    tokens: int
    left: torch.Tensor | None = None
    """what `entered` led to, with its graph; None: it is computed again, piece by piece"""

    @property
    def begins(self) -> bool:
        """It takes token ids, which have no gradient."""
        return 0 in self.fragments

    def num_targets(self, span: slice = slice(None)) -> int:
        """In these sequences."""
        if self.segments is None:
            sequences, length = self.entered[span].shape[:2]
            return sequences * (length - 1)
        return sum(num_targets(row) for row in self.segments[span])

    def share(self, span: slice) -> float:
        """These sequences' part of the mean loss."""
        return self.num_targets(span) / max(1, self.num_targets())


@dataclass
class _Found:
    """By a backward, or the pieces of one that are done."""

    loss: float = 0.0
    entered: list[torch.Tensor] = field(default_factory=list, repr=False)
    """gradients of what came in, fp32 on the CPU"""
    gradients: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)


@dataclass
class _Pending:
    """Gradients of one microbatch whose origin has not spoken yet."""

    tokens: int
    targets: int
    gradients: dict[int, dict[str, torch.Tensor]] = field(repr=False)
    """fragment -> name -> gradient of the microbatch's mean loss"""


@dataclass
class _Sum:
    """Gradients of one parameter: a single one as it is, since most runs of little memory have no second; several added
    up in fp32, each times its targets."""

    values: torch.Tensor
    targets: int
    several: bool = False

    def plus(self, values: torch.Tensor, targets: int) -> _Sum:
        total = self.values if self.several else self.values.to(torch.float32) * self.targets
        return _Sum(total.add_(values, alpha=targets), self.targets + targets, several=True)

    def mean(self, all_targets: int) -> torch.Tensor:
        """Over `all_targets`, of which some had no gradient here."""
        if self.several:
            return self.values.div_(all_targets)
        return self.values if self.targets == all_targets else self.values * (self.targets / all_targets)


class StageCompute:
    """The stage may be exchanged for another one that shares what stays, and fragments may be held that are in no stage
    (yet, or any more)."""

    def __init__(
        self, stage: Stage, fragments: dict[int, FragmentSpec], parameters: Mapping[str, torch.nn.Parameter]
    ) -> None:
        """`fragments`: all that are held, by index, with their working weights in `parameters`, by name in the whole
        model. Both may change between two calls."""
        self._stage, self.fragments, self._parameters = stage, fragments, parameters
        self._weights: _Weights | None = None
        self._aliased: list[_Weights] = []
        """all that share memory with the working weights, of earlier stages too"""
        self._graphs: dict[Hashable, _Graph] = {}
        self._pending: dict[Hashable, _Pending] = {}
        self._sums: dict[int, dict[str, _Sum]] = {}
        self._tokens: dict[int, int] = {}
        self._targets: dict[int, int] = {}
        any_parameter = next(iter(parameters.values()))
        self.device, self._dtype = any_parameter.device, any_parameter.dtype
        self.pieces = Pieces()

    @property
    def in_flight(self) -> int:
        """graphs and gradients in memory"""
        return len(self._graphs) + len(self._pending)

    # -- microbatches -----------------------------------------------------------------------------------------------

    def forward(
        self, key: Hashable, values: torch.Tensor, *, start: int, end: int, tokens: int, keep: bool = True,
        segments: Segments | None = None,
    ) -> torch.Tensor:
        """Hidden states [sequences, length, hidden] after fragments [start, end), fp32 on the stage's device.

        `values`: token ids [sequences, length] at fragment 0, else hidden states. `keep`: there will be a backward.
        `segments`: of each sequence; None: each is a causal one.
        """
        graph = self._graph(start, end, values, None, segments, tokens=tokens)

        def compute(at_once: int) -> torch.Tensor:
            graph.left, parts = None, spans(len(values), at_once)
            if keep and len(parts) == 1:
                graph.entered = _leaf(graph.entered, graph)
                graph.left = self._run(graph, parts[0], graph.entered, learns=True)
                return graph.left.detach().to(torch.float32)
            left = (self._run(graph, span, graph.entered[span], learns=keep, grad=False) for span in parts)
            return torch.cat([piece.to(torch.float32) for piece in left])

        found = self.pieces.as_it_fits(len(values), compute)
        if keep:
            graph.weights.users += 1
            self._graphs[key] = graph
        return found

    def loss(
        self, key: Hashable, values: torch.Tensor, ids: torch.Tensor, *, start: int, end: int, keep: bool = True,
        segments: Segments | None = None,
    ) -> tuple[float, torch.Tensor | None]:
        """(mean loss in nats a target, gradient of what came in, fp32 on the stage's device): the last stage's forward
        and backward at once. `ids`: the microbatch's token ids [sequences, length]; `segments` say which are targets.
        The gradient is None at fragment 0 and without `keep`. A loss over no target is 0."""
        graph = self._graph(start, end, values, targets_of(ids, segments), segments, tokens=ids.numel())
        if keep:
            graph.weights.users += 1
            found = self._back(key, graph, None)
            return found.loss, torch.cat(found.entered) if start else None

        def compute(at_once: int) -> float:
            total = 0.0
            for span in spans(len(values), at_once):
                loss = self._run(graph, span, graph.entered[span], learns=False, grad=False)
                total += float(loss) * graph.share(span)
            return total

        return self.pieces.as_it_fits(len(values), compute), None

    def logits(
        self, values: torch.Tensor, *, start: int, end: int, positions: int, segments: Segments | None = None
    ) -> torch.Tensor:
        """The last stage's logits of so many last positions of each sequence [sequences, positions, vocabulary], fp32
        on the CPU. Nothing is kept."""
        graph = self._graph(start, end, values, None, segments, tokens=0)

        def compute(at_once: int) -> torch.Tensor:
            parts = spans(len(values), at_once)
            left = (self._run(graph, span, graph.entered[span], learns=False, grad=False) for span in parts)
            return torch.cat([piece[:, -positions:].to("cpu", torch.float32) for piece in left])

        return self.pieces.as_it_fits(len(values), compute)

    def backward(self, key: Hashable, gradient: torch.Tensor) -> torch.Tensor | None:
        """The gradient of what came in [sequences, length, hidden], fp32 on the stage's device; None at fragment 0.
        `gradient`: of what `forward` returned. The weights' own gradients wait for a verdict."""
        graph = self._graphs.pop(key)
        found = self._back(key, graph, gradient)
        return None if graph.begins else torch.cat(found.entered)

    def commit(self, key: Hashable) -> None:
        """The microbatch is done: its gradients count."""
        pending = self._pending.pop(key)
        for fragment, gradients in pending.gradients.items():
            if fragment not in self.fragments:  # let go of meanwhile, and nobody has spoken for long
                continue
            sums = self._sums.setdefault(fragment, {})
            for name in list(gradients):
                values = gradients.pop(name)  # one after the other: there are never two of all
                sums[name] = sums[name].plus(values, pending.targets) if name in sums else _Sum(values, pending.targets)
            self._tokens[fragment] = self.tokens(fragment) + pending.tokens
            self._targets[fragment] = self.targets(fragment) + pending.targets

    def forget(self, key: Hashable) -> None:
        """The microbatch is done by others, or its origin is gone. Nothing of it stays."""
        self._pending.pop(key, None)
        graph = self._graphs.pop(key, None)
        if graph is not None:
            graph.weights.users -= 1

    # -- what they leave --------------------------------------------------------------------------------------------

    def tokens(self, fragment: int) -> int:
        """whose gradients are added up and not taken yet"""
        return self._tokens.get(fragment, 0)

    def targets(self, fragment: int) -> int:
        """in these tokens"""
        return self._targets.get(fragment, 0)

    def take(self, fragment: int) -> tuple[dict[str, torch.Tensor], int]:
        """(name -> gradient of the mean over all targets, fp32, or as it was where one microbatch made it; tokens) of
        what has been added up; the next sum begins."""
        targets, sums = self._targets.pop(fragment, 0), self._sums.pop(fragment, {})
        return {name: found.mean(max(1, targets)) for name, found in sums.items()}, self._tokens.pop(fragment, 0)

    def before_write(self, fragment: int | None = None) -> None:
        """Somebody is about to change the working weights, of this fragment or all: graphs in flight keep those that
        they were built on."""
        live = [weights for weights in self._aliased if weights.users]
        if not live:
            return
        indices = self.fragments if fragment is None else self.fragments.keys() & {fragment}
        specs = [self.fragments[index] for index in indices]
        for parameter_name in [tensor.name for spec in specs for tensor in spec.tensors]:
            parameter = self._parameters[parameter_name]
            place = parameter.data_ptr()
            if any(w.leaves[parameter_name].data_ptr() == place for w in live if parameter_name in w.leaves):
                parameter.data = parameter.data.clone()
        self._weights = None

    def restage(self, stage: Stage) -> None:
        """Another stage from now on. Graphs under way keep what they were built on, and their gradients count."""
        self._stage, self._weights = stage, None

    # ---------------------------------------------------------------------------------------------------------------

    def _graph(
        self, start: int, end: int, values: torch.Tensor, targets: torch.Tensor | None,
        segments: Segments | None, *, tokens: int,
    ) -> _Graph:
        """Raises PeerRefused where the stage has changed since the microbatch came."""
        fragments = {index: self.fragments[index] for index in range(start, end) if index in self.fragments}
        blocks = [fragment.blocks for fragment in fragments.values()]
        if len(blocks) < end - start or blocks[0][0] < self._stage.start or blocks[-1][1] > self._stage.end:
            raise PeerRefused(f"fragments {start}:{end} are not served here any more")
        return _Graph(
            fragments, self._here(values), None if targets is None else targets.to(self.device),
            segments, self._current(), tokens,
        )

    def _back(self, key: Hashable, graph: _Graph, gradient: torch.Tensor | None) -> _Found:
        """Backward of a microbatch, which is `key`'s from now on. `gradient`: of what left; None: that was the loss."""
        if gradient is not None:
            gradient = gradient.to(self.device)

        def compute(at_once: int) -> _Found:
            found, (left, graph.left) = _Found(), (graph.left, None)  # after a failure it is of no use any more
            if left is not None and at_once == len(graph.entered):
                self._add(found, graph, graph.entered, left, gradient)
                return found
            for span in spans(len(graph.entered), at_once):
                entered = _leaf(graph.entered[span], graph)
                left = self._run(graph, span, entered, learns=True)
                if gradient is None:
                    of_all = graph.share(span)
                    self._add(found, graph, entered, left, torch.tensor(of_all, device=self.device))
                    found.loss += float(left.detach()) * of_all
                else:
                    self._add(found, graph, entered, left, gradient[span])
            return found

        try:
            found = self.pieces.as_it_fits(len(graph.entered), compute)
        finally:
            graph.weights.users -= 1
        self._pending[key] = _Pending(graph.tokens, graph.num_targets(), found.gradients)
        return found

    def _add(
        self, found: _Found, graph: _Graph, entered: torch.Tensor, left: torch.Tensor, gradient: torch.Tensor | None
    ) -> None:
        """One backward, added to what others have found."""
        names = [(f, t.name) for f, fragment in graph.fragments.items() for t in fragment.tensors]
        wanted = [graph.weights.leaves[name] for _, name in names]
        inputs = wanted if graph.begins else [entered, *wanted]
        if gradient is not None:
            gradient = gradient.to(left.dtype)
        gradients = list(torch.autograd.grad(left, inputs, gradient, allow_unused=True))
        if not graph.begins:
            found.entered.append(gradients.pop(0).to(torch.float32))
        for fragment in graph.fragments:
            found.gradients.setdefault(fragment, {})
        for (fragment, name), values in zip(names, gradients, strict=True):
            if values is not None:
                sums = found.gradients[fragment]
                sums[name] = sums[name].add_(values) if name in sums else values

    def _run(
        self, graph: _Graph, span: slice, entered: torch.Tensor, *, learns: bool, grad: bool = True
    ) -> torch.Tensor:
        """What the stage makes of these sequences of a microbatch, which came in as `entered`; where there are targets,
        their mean loss. Without `learns` there is no dropout."""
        stage, held = graph.weights.stage, list(graph.fragments.values())
        how: dict[str, Any] = {"start": held[0].blocks[0], "end": held[-1].blocks[1]}
        inside = {f"model.{name}": leaf for name, leaf in graph.weights.leaves.items()}
        if graph.segments is not None:
            how |= attention(graph.segments[span], dtype=self._dtype, device=self.device)
        with torch.set_grad_enabled(grad), _dropout(stage, learns):
            left: torch.Tensor = functional_call(stage, inside, (entered,), how)
            if graph.targets is None:
                return left
            return stage.mean_loss(left, graph.targets[span]) if graph.num_targets(span) else left.sum() * 0.0

    def _here(self, values: torch.Tensor) -> torch.Tensor:
        """On the stage's device, hidden states in its weights' type."""
        return values.to(self.device, self._dtype if values.is_floating_point() else values.dtype)

    def _current(self) -> _Weights:
        if self._weights is None:
            # not detach(): it would share the counter by which autograd sees writes, also with memory of their own
            names = [name for name, _ in self._stage.held() if name in self._parameters]  # others are not trained
            leaves = {name: self._parameters[name].data.requires_grad_() for name in names}
            self._weights = _Weights(self._stage, leaves)
            self._aliased = [*(weights for weights in self._aliased if weights.users), self._weights]
        return self._weights


def _leaf(values: torch.Tensor, graph: _Graph) -> torch.Tensor:
    """What comes in, such that its gradient can be asked for. Token ids have none."""
    return values if graph.begins else values.detach().requires_grad_()


@contextmanager
def _dropout(stage: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """None where nothing is learnt; else as the stage is."""
    leave_out = stage.training and not wanted
    if leave_out:
        stage.train(False)
    try:
        yield
    finally:
        if leave_out:
            stage.train(True)
