"""Inner steps of a stage's fragments, from the gradients that microbatches have left there.

A fragment takes a step after its own quota of tokens, whoever sent them: as many as an inner step of a whole peer has.
Its gradient is that of the mean over all targets in them. In `sync` runs there is no inner step, and what was learnt
goes on to averaging as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from swarm.averaging.averager import Averager
from swarm.averaging.outer import learning_rate
from swarm.config import RunConfig
from swarm.pipeline.compute import StageCompute
from swarm.train.optimizers import Optimizers


class StageSteps:
    """On the training thread only."""

    def __init__(
        self, run: RunConfig, inner: Optimizers, compute: StageCompute, averager: Averager, *,
        announce: Callable[[], object] = lambda: None,
    ) -> None:
        """`announce`: says to the others that there is something to average (`sync` runs: they wait for it)."""
        self._run, self._inner, self._compute, self._averager = run, inner, compute, averager
        self._announce = announce
        self.sync = run.averaging.mode == "sync"
        self._length = run.train.sequence_length
        self._quota = 1 if self.sync else run.train.batch_sequences * self._length
        self.shares = 0.0
        """tokens trained here, each counted by the share of the fragments that were: over all peers of a microbatch
        they add up to its tokens"""

    def take_due(self) -> None:
        """A step of each fragment that has its quota."""
        self._take(self._quota)

    def take_rest(self, fragment: int | None = None) -> None:
        """A step from whatever there is: this peer leaves, or lets go of that fragment."""
        self._take(1, None if fragment is None else [fragment])

    def _take(self, quota: int, fragments: Collection[int] | None = None) -> None:
        for fragment in fragments or self._compute.fragments:
            if self._compute.tokens(fragment) < quota:
                continue
            targets = self._compute.targets(fragment)
            gradients, tokens = self._compute.take(fragment)
            if self.sync:
                weigh(gradients, density(targets, tokens=tokens, length=self._length))
                self._averager.trained_fragment(fragment, tokens, gradients)
                self._announce()
            else:
                self._compute.before_write(fragment)
                rate = learning_rate(self._run, self._averager.estimated_tokens())
                if not self._inner.step_fragment(fragment, gradients, rate):
                    continue
                self._averager.trained_fragment(fragment, tokens)
            self.shares += tokens / self._run.fragments


def density(targets: int, *, tokens: int, length: int) -> float:
    """Targets in rows of this length, as a share of those in plain rows: 1 there, less with prefixes or padding."""
    return targets / (tokens // length * (length - 1))


def weigh(gradients: Mapping[str, torch.Tensor], density: float) -> None:
    """`sync` runs average what peers have learnt by its tokens. So that the sum is still that over all their targets, a
    mean over few of them counts less."""
    if density != 1:
        for values in gradients.values():
            values.mul_(density)
