"""Inner steps: this peer's own text, this peer's own optimizer.

AdamW (https://arxiv.org/abs/1711.05101) whose state is never averaged; the learning rate follows the tokens of the
whole swarm. The gradient is clipped per fragment, so that the cut into stages does not change the arithmetic (I6).
Out of memory halves the microbatch and tries again: the inner step stays the same, it only takes more pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

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
        """`between` is called between microbatches; `warn` with what a person should know."""
        self._model, self._run, self._between, self._warn = model, run, between, warn
        parameters = dict(model.named_parameters())
        self._by_fragment = [[parameters[t.name] for t in fragment.tensors] for fragment in fragments]
        self.parameters: Mapping[str, torch.nn.Parameter] = parameters
        held = [p for group in self._by_fragment for p in group]
        train = run.train
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for p in held if p.dim() >= 2], "weight_decay": train.weight_decay},
                {"params": [p for p in held if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=train.learning_rate, betas=train.betas, fused=held[0].device.type in ("cpu", "cuda"),
        )
        self._steps = 0
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
        if not self.clip():
            return False
        self._steps += 1
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * min(1.0, self._steps / RAMP_STEPS)
        self._adamw.step()
        return True

    def clip(self) -> bool:
        """Clip each fragment's gradient; False where one is not finite."""
        limit = self._run.train.clip_norm or math.inf
        norms = [torch.nn.utils.clip_grad_norm_(parameters, limit) for parameters in self._by_fragment]
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
