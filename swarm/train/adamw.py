"""AdamW (https://arxiv.org/abs/1711.05101) of one fragment, clipping included.

One a fragment, so that a peer can take one more or let one go while it trains, and so that the cut into stages does not
change the arithmetic (I6): each fragment's gradient is clipped by its own norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from swarm.config import TrainConfig

RAMP_STEPS = 20
"""a new optimizer knows no second moments yet: its first steps are as long as the learning rate allows, so they start
shorter"""


def adamw(parameters: Sequence[torch.nn.Parameter], train: TrainConfig) -> torch.optim.AdamW:
    """As the run says; matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate, betas=train.betas, fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def step(optimizer: torch.optim.Optimizer, learning_rate: float, *, number: int) -> None:
    """Its step of this number, from 1 on: the first ones are a ramp."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * min(1.0, number / RAMP_STEPS)
    optimizer.step()


class FragmentAdamW:
    """Of these parameters, with the gradients that they have."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], train: TrainConfig) -> None:
        self._parameters, self._clip_norm = list(parameters), train.clip_norm or math.inf
        self._adamw = adamw(self._parameters, train)
        self._steps = 0

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Clip the gradient to the run's norm. Returns the norm that it had: not finite where the gradient is not."""
        return float(torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm))

    def step(self, learning_rate: float) -> None:
        self._steps += 1
        step(self._adamw, learning_rate, number=self._steps)
