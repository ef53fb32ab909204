"""Momentum and learning rate of the outer step, from the number of rounds where the run config leaves them open.

Outer momentum is a memory of rounds. One that is a third as long as the run still pushes where the weights have been
long since: 0.9 (DiLoCo, https://arxiv.org/abs/2311.08105), ten rounds, is for a run of many. So the memory is a seventh
of the run and ten rounds at most, and an average moves the weights at most seven times as far as it says, all in all,
which is what DiLoCo's 0.9 and 0.7 come to. README.md (From a checkpoint) has what was measured.

Peers must come to the same bits (I1): nothing here but divisions, sums and roundings, which have one result everywhere.
"""

from __future__ import annotations

from swarm.averaging.plan import round_tokens
from swarm.config import RunConfig

SHARE = 7
"""the memory is the run's rounds over this"""
LONGEST = 10.0
FARTHEST = 7.0


def outer_settings(run: RunConfig) -> tuple[float, float]:
    """(learning rate, momentum) of the run's outer steps."""
    averaging = run.averaging
    momentum, rate = averaging.outer_momentum, averaging.outer_learning_rate
    if momentum is None:
        momentum = momentum_of(expected_rounds(run))
    return rate_of(momentum) if rate is None else rate, momentum


def momentum_of(rounds: float) -> float:
    """For a run of so many rounds of each fragment; in hundredths, as people read it."""
    return round(1 - 1 / min(LONGEST, max(1.0, rounds / SHARE)), 2)


def rate_of(momentum: float) -> float:
    return round(min(1.0, FARTHEST * (1 - momentum)), 2)


def expected_rounds(run: RunConfig) -> float:
    """Of each fragment, if all open by their tokens; those that grow count as so many of their middle length."""
    averaging, total = run.averaging, run.train.total_tokens
    growing = min(averaging.ramp_tokens, total)
    middle = (round_tokens(averaging, 0) + round_tokens(averaging, growing)) / 2
    return growing / middle + (total - growing) / averaging.tokens_per_round
