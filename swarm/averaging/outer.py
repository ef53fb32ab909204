"""The outer step: one update of the global weights from the averaged pseudo-gradient.

`local` runs: Nesterov SGD as in DiLoCo (https://arxiv.org/abs/2311.08105); one buffer, the momentum, if there is any.
`sync` runs: what is averaged is the gradient itself, and the step is AdamW (https://arxiv.org/abs/1711.05101); two
buffers. Written in separately rounded elementary operations, each rounded as IEEE 754 says (add, multiply, divide,
square root; never addcmul, lerp or `alpha=`, whose kernels may fuse), so every machine gets the same bits (I1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from swarm.averaging import roll
from swarm.averaging.global_state import GlobalState
from swarm.averaging.outer_settings import outer_settings
from swarm.config import RunConfig


@dataclass(frozen=True)
class OuterStep:
    """What all peers agree on for the step to one version: derived from the run config and the commit alone."""

    run: RunConfig
    version: int
    """the one that this step makes"""
    tokens_before: int
    tokens_after: int

    restart: bool = False
    """the swarm that the momentum is of is not there any more (roll.py)"""

    @property
    def last(self) -> bool:
        """The round in which the run's tokens are complete is a plain average: 0.5 % better on short runs. Tokens that
        are still on their way are only estimated, so a round may end just before: an eighth of one is near enough, and
        the few that are left are averaged plainly too."""
        total = self.run.train.total_tokens
        near = self.run.averaging.tokens_per_round // 8 if self.run.averaging.mode == "local" else 0
        return self.tokens_before < total <= self.tokens_after + near


def num_buffers(run: RunConfig) -> int:
    """Flat vectors of optimizer state beside the weights. A run without outer momentum keeps none."""
    if run.averaging.mode == "sync":
        return 2
    return 1 if outer_settings(run)[1] > 0 else 0


def learning_rate(run: RunConfig, swarm_tokens: int) -> float:
    """Linear warm-up, then a cosine to a fraction, by tokens of the whole swarm: who joins or leaves is no matter."""
    train = run.train
    if swarm_tokens < train.warmup_tokens:
        return train.learning_rate * (swarm_tokens + 1) / (train.warmup_tokens + 1)
    span = max(1, train.total_tokens - train.warmup_tokens)
    done = min(1.0, (swarm_tokens - train.warmup_tokens) / span)
    floor = train.final_learning_rate
    return train.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def advance(
    run: RunConfig, state: GlobalState, contributions: Mapping[str, int], average: torch.Tensor, decay: torch.Tensor
) -> GlobalState:
    """The next version. `contributions`: peer id -> tokens, of those in the commit; `average`, `decay`: see `apply`."""
    version, tokens = state.version + 1, state.tokens + sum(contributions.values())
    listed = roll.after(state.roll, version, contributions) if run.averaging.mode == "local" else ()
    shock = roll.is_shock(state.roll, listed, version=version, limit=run.averaging.momentum_restart)
    step = OuterStep(run, version, state.tokens, tokens, restart=shock)
    weights, buffers = apply(step, state.weights, list(state.buffers), average, decay)
    return GlobalState(state.fragment, version, tokens, weights, tuple(buffers), listed)


def apply(
    step: OuterStep, weights: torch.Tensor, buffers: list[torch.Tensor], average: torch.Tensor, decay: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """New (weights, buffers) as new tensors; all fp32 [numel]. `decay`: 1 where weight decay applies, else 0."""
    if step.run.averaging.mode == "sync":
        return _adamw(step, weights, buffers, average, decay)
    if step.last:
        return weights - average, [torch.zeros_like(buffer) for buffer in buffers]
    rate, beta = outer_settings(step.run)
    if not buffers:
        change = torch.mul(average, rate)
        return torch.sub(weights, change, out=change), []
    momentum = torch.mul(buffers[0], 0.0 if step.restart else beta)
    momentum.add_(average)
    change = torch.mul(momentum, beta)
    change.add_(average)
    change.mul_(rate)
    return torch.sub(weights, change, out=change), [momentum]  # no more new memory than is kept: it is what takes long


def _adamw(
    step: OuterStep, weights: torch.Tensor, buffers: list[torch.Tensor], gradient: torch.Tensor, decay: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    train = step.run.train
    rate = learning_rate(step.run, step.tokens_before)
    beta1, beta2 = train.betas
    first = torch.add(torch.mul(buffers[0], beta1), torch.mul(gradient, 1 - beta1))
    second = torch.add(torch.mul(buffers[1], beta2), torch.mul(torch.mul(gradient, gradient), 1 - beta2))
    # torch's fp32 square root is MKL's on some machines, and not always the nearest value there (seen on an EPYC);
    # through fp64 it is, since the root of an fp32 number is never that close to the middle between two others
    root = torch.sqrt(second.to(torch.float64)).to(torch.float32)
    denominator = torch.add(torch.div(root, math.sqrt(1 - beta2**step.version)), 1e-8)
    change = torch.div(torch.mul(first, rate / (1 - beta1**step.version)), denominator)
    shrink = torch.sub(torch.ones_like(weights), torch.mul(decay, rate * train.weight_decay))
    return torch.sub(torch.mul(weights, shrink), change), [first, second]
