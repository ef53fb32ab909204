"""Forward and backward of microbatches on this peer's stage, and the gradients that they leave. On one thread only.

A microbatch's backward uses the weights of its forward, whatever inner steps and rounds come between: graphs are built
on aliases of the working weights, and who is about to write calls `before_write`, which gives the working weights new
memory where a graph still needs the old one. That costs a copy of a fragment for each of its steps with microbatches in
flight, and no recomputing.

Gradients wait, apart from each other, until the microbatch's origin has said which of the peers that worked on it count
(chain.py): only then they are added up, so each enters each fragment once (I2).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch.func import functional_call

from swarm.errors import PeerRefused
from swarm.model.fragments import FragmentSpec
from swarm.model.stage import Stage


@dataclass
class _Weights:
    """The stage's weights as graphs use them: leaves that share memory with the working weights, until those move."""

    leaves: dict[str, torch.Tensor]
    """by name in the whole model"""
    users: int = 0
    """graphs that still need them"""


@dataclass
class _Graph:
    fragments: dict[int, FragmentSpec]
    tokens: int
    entered: torch.Tensor | None
    """hidden states that came in; None at fragment 0"""
    left: torch.Tensor
    weights: _Weights


@dataclass
class _Pending:
    """Gradients of one microbatch whose origin has not spoken yet."""

    tokens: int
    gradients: dict[int, dict[str, torch.Tensor]] = field(repr=False)
    """fragment -> name -> gradient of the microbatch's mean loss"""


@dataclass
class _Sum:
    """Gradients of one parameter: a single one as it is, since most runs of little memory have no second; several added
    up in fp32, each times its tokens."""

    values: torch.Tensor
    tokens: int
    several: bool = False

    def plus(self, values: torch.Tensor, tokens: int) -> _Sum:
        total = self.values if self.several else self.values.to(torch.float32) * self.tokens
        return _Sum(total.add_(values, alpha=tokens), self.tokens + tokens, several=True)

    def mean(self, all_tokens: int) -> torch.Tensor:
        """Over `all_tokens`, of which some had no gradient here."""
        if self.several:
            return self.values.div_(all_tokens)
        return self.values if self.tokens == all_tokens else self.values * (self.tokens / all_tokens)


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
        any_parameter = next(iter(parameters.values()))
        self._device, self._dtype = any_parameter.device, any_parameter.dtype

    @property
    def in_flight(self) -> int:
        """graphs and gradients in memory"""
        return len(self._graphs) + len(self._pending)

    # -- microbatches -----------------------------------------------------------------------------------------------

    def forward(
        self, key: Hashable, values: torch.Tensor, *, start: int, end: int, tokens: int, keep: bool = True
    ) -> torch.Tensor:
        """Hidden states [sequences, length, hidden] after fragments [start, end), fp32 on the CPU.

        `values`: token ids [sequences, length] at fragment 0, else hidden states. `keep`: there will be a backward.
        """
        left = self._run(key, values, start=start, end=end, tokens=tokens, targets=None, keep=keep)
        return left.detach().to("cpu", torch.float32)

    def loss(
        self, key: Hashable, values: torch.Tensor, targets: torch.Tensor, *, start: int, end: int, keep: bool = True
    ) -> tuple[float, torch.Tensor | None]:
        """(mean loss in nats a token, gradient of what came in, fp32 on the CPU): the last stage's forward and
        backward at once. `targets`: the microbatch's token ids [sequences, length]. The gradient is None at fragment 0
        and without `keep`."""
        left = self._run(key, values, start=start, end=end, tokens=targets.numel(), targets=targets, keep=keep)
        gradient = self.backward(key, None) if keep else None
        return float(left.detach()), gradient

    def backward(self, key: Hashable, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient of what came in [sequences, length, hidden], fp32 on the CPU; None at fragment 0. `gradient`:
        of what `forward` returned (None: that was the loss). The weights' own gradients wait for a verdict."""
        graph = self._graphs.pop(key)
        names = [(f, t.name) for f, fragment in graph.fragments.items() for t in fragment.tensors]
        wanted = [graph.weights.leaves[name] for _, name in names]
        inputs = wanted if graph.entered is None else [graph.entered, *wanted]
        if gradient is not None:
            gradient = gradient.to(graph.left.device, graph.left.dtype)
        found = list(torch.autograd.grad(graph.left, inputs, gradient, allow_unused=True))
        graph.weights.users -= 1
        entered = None if graph.entered is None else found.pop(0)
        gradients: dict[int, dict[str, torch.Tensor]] = {fragment: {} for fragment in graph.fragments}
        for (fragment, name), values in zip(names, found, strict=True):
            if values is not None:
                gradients[fragment][name] = values
        self._pending[key] = _Pending(graph.tokens, gradients)
        return None if entered is None else entered.to("cpu", torch.float32)

    def commit(self, key: Hashable) -> None:
        """The microbatch is done: its gradients count."""
        pending = self._pending.pop(key)
        for fragment, gradients in pending.gradients.items():
            if fragment not in self.fragments:  # let go of meanwhile, and nobody has spoken for long
                continue
            sums = self._sums.setdefault(fragment, {})
            for name in list(gradients):
                values = gradients.pop(name)  # one after the other: there are never two of all
                sums[name] = sums[name].plus(values, pending.tokens) if name in sums else _Sum(values, pending.tokens)
            self._tokens[fragment] = self._tokens.get(fragment, 0) + pending.tokens

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

    def take(self, fragment: int) -> tuple[dict[str, torch.Tensor], int]:
        """(name -> mean gradient, fp32, or as it was where one microbatch made it; its tokens) of what has been added
        up; the next sum begins."""
        tokens, sums = self._tokens.pop(fragment, 0), self._sums.pop(fragment, {})
        return {name: found.mean(max(1, tokens)) for name, found in sums.items()}, tokens

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

    def _run(
        self, key: Hashable, values: torch.Tensor, *, start: int, end: int, tokens: int,
        targets: torch.Tensor | None, keep: bool,
    ) -> torch.Tensor:
        """What the stage makes of `values`; with `targets`, the loss."""
        fragments = {index: self.fragments[index] for index in range(start, end) if index in self.fragments}
        first, last = fragments.get(start), fragments.get(end - 1)
        if first is None or last is None or first.blocks[0] < self._stage.start or last.blocks[1] > self._stage.end:
            raise PeerRefused(f"fragments {start}:{end} are not served here any more")
        entered = values.to(self._device, self._dtype if values.is_floating_point() else values.dtype)
        if start and keep:
            entered.requires_grad_()
        weights = self._current()
        blocks = {"start": first.blocks[0], "end": last.blocks[1]}
        inside = {f"model.{name}": leaf for name, leaf in weights.leaves.items()}
        with torch.set_grad_enabled(keep):
            left: torch.Tensor = functional_call(self._stage, inside, (entered,), blocks)
            if targets is not None:
                left = self._stage.mean_loss(left, targets.to(self._device))
        if keep:
            weights.users += 1
            self._graphs[key] = _Graph(fragments, tokens, entered if start else None, left, weights)
        return left

    def _current(self) -> _Weights:
        if self._weights is None:
            # not detach(): it would share the counter by which autograd sees writes, also with memory of their own
            names = [name for name, _ in self._stage.held() if name in self._parameters]  # others are not trained
            leaves = {name: self._parameters[name].data.requires_grad_() for name in names}
            self._weights = _Weights(leaves)
            self._aliased = [*(weights for weights in self._aliased if weights.users), self._weights]
        return self._weights
