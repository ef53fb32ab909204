"""Inner steps: this peer's own text, this peer's own optimizer.

AdamW (https://arxiv.org/abs/1711.05101) whose state is never averaged; the learning rate follows the tokens of the
whole swarm. The gradient is clipped per fragment, so that the cut into stages does not change the arithmetic (I6).
Out of memory halves the microbatch and tries again: the inner step stays the same, it only takes more pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from swarm.config import RunConfig
from swarm.model.build import Model
from swarm.model.fragments import FragmentSpec

RAMP_STEPS = 20
"""a new optimizer knows no second moments yet: its first steps are as long as the learning rate allows, so they start
shorter"""


class InnerOptimizer:
    def __init__(
        self, model: Model, fragments: Sequence[FragmentSpec], run: RunConfig, *,
        between: Callable[[], None] = lambda: None, warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`fragments`: those that `model` holds. `between` is called between microbatches; `warn` with what a person
        should know."""
        self._model, self._run, self._between, self._warn = model, run, between, warn
        parameters = dict(model.named_parameters())
        self._by_fragment = {f.index: [parameters[t.name] for t in f.tensors] for f in fragments}
        self.parameters: Mapping[str, torch.nn.Parameter] = parameters
        train = run.train
        groups: list[dict[str, Any]] = []
        for index, held in self._by_fragment.items():
            decayed, bare = [p for p in held if p.dim() >= 2], [p for p in held if p.dim() < 2]
            groups.append({"params": decayed, "weight_decay": train.weight_decay, "fragment": index})
            groups.append({"params": bare, "weight_decay": 0.0, "fragment": index})
        device = next(iter(parameters.values())).device.type
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=train.learning_rate, betas=train.betas, fused=device in ("cpu", "cuda"),
        )
        self._steps = dict.fromkeys(self._by_fragment, 0)
        self._microbatch = train.batch_sequences

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
        return self._step(list(self._by_fragment), learning_rate)

    def step_fragment(self, index: int, gradients: Mapping[str, torch.Tensor], learning_rate: float) -> bool:
        """The same for one fragment, with these mean gradients (name -> fp32): a stage's fragments each take a step
        after their own quota of tokens. What `gradients` has left in the parameters is gone."""
        self._adamw.zero_grad(set_to_none=True)
        for name, values in gradients.items():
            parameter = self.parameters[name]
            parameter.grad = values.to(parameter.dtype)
        return self._step([index], learning_rate)

    def _step(self, indices: Sequence[int], learning_rate: float) -> bool:
        if not self.clip(indices):
            return False
        for index in indices:
            self._steps[index] += 1
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * min(1.0, self._steps[group["fragment"]] / RAMP_STEPS)
        self._adamw.step()
        return True

    def clip(self, indices: Sequence[int] | None = None) -> bool:
        """Clip each fragment's gradient (all, or these); False where one is not finite."""
        limit = self._run.train.clip_norm or math.inf
        chosen = self._by_fragment if indices is None else indices
        norms = [torch.nn.utils.clip_grad_norm_(self._by_fragment[index], limit) for index in chosen]
        finite = all(math.isfinite(float(norm)) for norm in norms)
        if not finite:
            self._warn("a gradient was not finite: left that step out")
        return finite

    def _gradients(self, batch: torch.Tensor) -> float:
        self._adamw.zero_grad(set_to_none=True)
        total = 0.0
        for piece in torch.split(batch, self._microbatch):
            self._between()
            piece = piece.to(self._model.device)
            share = len(piece) / len(batch)
            loss = self._model(input_ids=piece, labels=piece).loss * share
            loss.backward()
            total += float(loss.detach())
        return total
