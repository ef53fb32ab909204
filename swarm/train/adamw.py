"""AdamW (https://arxiv.org/abs/1711.05101) of one fragment, clipping included.

One a fragment, so that a peer can take one more or let one go while it trains, and so that the cut into stages does not
change the arithmetic (I6): each fragment's gradient is clipped by its own norm.

torch's own where weights and moments are fp32. For 8-bit moments (moments.py) and for bfloat16 weights with further
bits (swarm/model/working.py) the same step, through each parameter in strides: fp32 from reading to writing, no copy of
a parameter beside it. Which of them a peer takes is its own choice: no other peer ever sees an inner optimizer's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from swarm.config import TrainConfig
from swarm.model import working
from swarm.train.moments import Moments, moments_of

RAMP_STEPS = 20
"""a new optimizer knows no second moments yet: its first steps are as long as the learning rate allows, so they start
shorter"""
EPS = 1e-8


def adamw(parameters: Sequence[torch.nn.Parameter], train: TrainConfig) -> torch.optim.AdamW:
    """As the run says; matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate, betas=train.betas, eps=EPS, fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def step(optimizer: torch.optim.Optimizer, learning_rate: float, *, number: int) -> None:
    """Its step of this number, from 1 on: the first ones are a ramp."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * _ramp(number)
    optimizer.step()


class FragmentAdamW:
    """Of these parameters, with the gradients that they have, or with those that it is given."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], train: TrainConfig, *, bits: int = 32) -> None:
        """`bits` of the two moments: 32 or 8."""
        self._parameters, self._clip_norm = list(parameters), train.clip_norm or math.inf
        exact = bits == 32 and all(p.dtype == torch.float32 for p in self._parameters)
        self._adamw = adamw(self._parameters, train) if exact else None
        self._strided = None if exact else StridedAdamW(self._parameters, train, bits=bits)
        self._given: list[torch.Tensor | None] | None = None
        self._scale = 1.0
        self._steps = 0

    def zero_grad(self) -> None:
        self._given = None
        for parameter in self._parameters:
            parameter.grad = None

    def give(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """fp32 gradients, one a parameter, in place of those that the parameters have: theirs are of their own type,
        and a sum of many would lose by it."""
        self.zero_grad()
        if self._adamw is None:
            self._given = list(gradients)
            return
        for parameter, values in zip(self._parameters, gradients, strict=True):
            parameter.grad = values

    def clip(self) -> float:
        """Clip the gradient to the run's norm. Returns the norm that it had: not finite where the gradient is not."""
        if self._adamw is not None:
            return float(torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm))
        found = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in self._gradients() if g is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(found))) if found else 0.0
        self._scale = min(1.0, self._clip_norm / (norm + 1e-6))  # with the step: nothing is rounded once more
        return norm

    def step(self, learning_rate: float) -> None:
        self._steps += 1
        if self._adamw is not None:
            step(self._adamw, learning_rate, number=self._steps)
            return
        assert self._strided is not None
        self._strided.step(self._gradients(), learning_rate * _ramp(self._steps), scale=self._scale)
        self._scale = 1.0

    def _gradients(self) -> list[torch.Tensor | None]:
        return self._given if self._given is not None else [parameter.grad for parameter in self._parameters]


class StridedAdamW:
    """Parameters: fp32, or bfloat16 with further bits. Rounding at random begins the same in each process, so that a
    run can be repeated."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], train: TrainConfig, *, bits: int) -> None:
        self._parameters, self._betas, self._bits = list(parameters), train.betas, bits
        self._decay = train.weight_decay
        self._moments: dict[int, Moments] = {}
        self._random = torch.Generator(self._parameters[0].device).manual_seed(0)
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor | None], learning_rate: float, *, scale: float = 1.0) -> None:
        """One step with these gradients, any floating type, times `scale`. Those without one stay."""
        self._steps += 1
        for index, (parameter, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            if gradient is None:
                continue
            if index not in self._moments:
                self._moments[index] = moments_of(parameter, self._bits)
            change = self._change(learning_rate, decay=self._decay if parameter.dim() >= 2 else 0.0)
            flat, moments = gradient.reshape(-1), self._moments[index]
            for start, end in working.strides(parameter.numel()):
                weights, (first, second) = working.read(parameter, start, end), moments.read(start, end)
                change(weights, flat[start:end].to(torch.float32) * scale, first, second)
                working.write(parameter, start, weights, random_from=self._random)
                moments.write(start, first, second)

    def _change(self, learning_rate: float, *, decay: float) -> Callable[..., None]:
        beta1, beta2 = self._betas
        length = learning_rate / (1 - beta1**self._steps)
        root = math.sqrt(1 - beta2**self._steps)

        def change(
            weights: torch.Tensor, gradient: torch.Tensor, first: torch.Tensor, second: torch.Tensor
        ) -> None:
            """All fp32 [count]; `weights` and the moments in place."""
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            weights.mul_(1 - learning_rate * decay)
            weights.addcdiv_(first, second.sqrt().div_(root).add_(EPS), value=-length)

        return change


def _ramp(number: int) -> float:
    return min(1.0, number / RAMP_STEPS)
