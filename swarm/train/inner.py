"""Inner steps: this peer's own text, this peer's own optimizer.

Each fragment has an optimizer of its own (adamw.py), whose state is never averaged; the learning rate follows the
tokens of the whole swarm. Out of memory halves the microbatch and tries again: the inner step stays the same, it only
takes more pieces (whose gradients are added up in the weights' own type).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from swarm.config import RunConfig
from swarm.model.build import Model
from swarm.model.fragments import FragmentSpec
from swarm.train.adamw import FragmentAdamW


class InnerOptimizer:
    def __init__(
        self, model: Model, fragments: Sequence[FragmentSpec], run: RunConfig, *,
        between: Callable[[], None] = lambda: None, warn: Callable[[str], None] = lambda text: None,
        optimizer_bits: int = 32,
    ) -> None:
        """`fragments`: those that `model` holds. `between` is called between microbatches; `warn` with what a person
        should know. `optimizer_bits`: of AdamW's moments, 32 or 8."""
        self._model, self._run, self._between, self._warn = model, run, between, warn
        # a sync run takes no inner steps, and its gradients are clipped as everybody's are
        self._bits = 32 if run.averaging.mode == "sync" else optimizer_bits
        self._optimizers: dict[int, FragmentAdamW] = {}
        self._names: dict[int, list[str]] = {}
        """fragment -> its parameters' names, in its optimizer's order"""
        self.parameters: dict[str, torch.nn.Parameter] = {}
        """of the fragments held, by name in the whole model"""
        parameters = dict(model.named_parameters())
        for fragment in fragments:
            self.add(fragment, parameters)
        self._microbatch = run.train.batch_sequences

    def add(self, fragment: FragmentSpec, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """A fragment more, whose moments begin at nothing. `parameters`: at least its own, by name."""
        held = {tensor.name: parameters[tensor.name] for tensor in fragment.tensors}
        self._optimizers[fragment.index] = FragmentAdamW(
            list(held.values()), self._run.train, bits=self._bits
        )
        self._names[fragment.index] = list(held)
        self.parameters.update(held)

    def remove(self, fragment: FragmentSpec) -> None:
        """Its moments and gradients are gone."""
        del self._optimizers[fragment.index], self._names[fragment.index]
        for tensor in fragment.tensors:
            self.parameters.pop(tensor.name).grad = None

    def gradients(self, batch: torch.Tensor) -> float:
        """Mean loss (nats a token) of `batch` [sequences, sequence_length]; leaves its gradient in the parameters."""
        while True:
            try:
                return self._gradients(batch)
            except torch.OutOfMemoryError:
                if self._microbatch == 1:
                    raise
                self._microbatch = max(1, self._microbatch // 2)
                self._warn(f"out of memory: going on with microbatches of {self._microbatch} sequences")
                torch.cuda.empty_cache()

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

    def _gradients(self, batch: torch.Tensor) -> float:
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()
        total = 0.0
        for piece in torch.split(batch, self._microbatch):
            self._between()
            piece = piece.to(self._model.device)
            share = len(piece) / len(batch)
            loss = self._model(input_ids=piece, labels=piece).loss * share
            loss.backward()
            total += float(loss.detach())
        return total
