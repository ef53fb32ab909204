"""The inner optimizers of the fragments that a peer holds, whose states are never averaged.

Which ones those are may change while it trains. The learning rate follows the tokens of the whole swarm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from swarm.config import RunConfig
from swarm.model.fragments import FragmentSpec
from swarm.train.adamw import FragmentAdamW


class Optimizers:
    """On the training thread, or while it stands still. `warn` is called with what a person should know."""

    def __init__(
        self, run: RunConfig, *, warn: Callable[[str], None] = lambda text: None, bits: int = 32
    ) -> None:
        """`bits` of AdamW's moments: 32 or 8."""
        self._train, self._warn = run.train, warn
        # a sync run takes no inner steps, and its gradients are clipped as everybody's are
        self._bits = 32 if run.averaging.mode == "sync" else bits
        self._optimizers: dict[int, FragmentAdamW] = {}
        self._names: dict[int, list[str]] = {}
        """fragment -> its parameters' names, in its optimizer's order"""
        self.parameters: dict[str, torch.nn.Parameter] = {}
        """of the fragments held, by name in the whole model"""

    def add(self, fragment: FragmentSpec, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """A fragment more, whose moments begin at nothing. `parameters`: at least its own, by name."""
        held = {tensor.name: parameters[tensor.name] for tensor in fragment.tensors}
        self._optimizers[fragment.index] = FragmentAdamW(list(held.values()), self._train, bits=self._bits)
        self._names[fragment.index] = list(held)
        self.parameters.update(held)

    def remove(self, fragment: FragmentSpec) -> None:
        """Its moments and gradients are gone."""
        del self._optimizers[fragment.index], self._names[fragment.index]
        for tensor in fragment.tensors:
            self.parameters.pop(tensor.name).grad = None

    def step(self, learning_rate: float) -> bool:
        """Clip and take one AdamW step with the gradients at hand. False: they are not finite, so nothing was done; one
        such step would make this peer's weights useless until it starts again."""
        if not self.clip():
            return False
        for optimizer in self._optimizers.values():
            optimizer.step(learning_rate)
        return True

    def step_fragment(self, index: int, gradients: Mapping[str, torch.Tensor], learning_rate: float) -> bool:
        """The same for one fragment, with these mean gradients (name -> fp32): a stage's fragments each take a step
        after their own quota of tokens. What was in its parameters' gradients is gone."""
        optimizer = self._optimizers[index]
        optimizer.give([gradients.get(name) for name in self._names[index]])
        if not self.clip([index]):
            return False
        optimizer.step(learning_rate)
        optimizer.zero_grad()
        return True

    def clip(self, indices: Sequence[int] | None = None) -> bool:
        """Clip each fragment's gradient (all, or these); False where one is not finite."""
        chosen = self._optimizers if indices is None else indices
        norms = [self._optimizers[index].clip() for index in chosen]
        finite = all(math.isfinite(norm) for norm in norms)
        if not finite:
            self._warn("a gradient was not finite: left that step out")
        return finite

    def zero_grad(self) -> None:
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()
