"""Inner steps of the whole model: this peer's own text, this peer's own optimizers.

Out of memory halves the microbatch and tries again: the inner step stays the same, it only takes more pieces
(whose gradients are added up in the weights' own type).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from swarm.config import RunConfig
from swarm.data.batch import Batch
from swarm.model.build import Model
from swarm.model.fragments import FragmentSpec
from swarm.model.prefix import model_inputs, targets_of
from swarm.train.optimizers import Optimizers


class InnerOptimizer(Optimizers):
    def __init__(
        self, model: Model, fragments: Sequence[FragmentSpec], run: RunConfig, *,
        between: Callable[[], None] = lambda: None, warn: Callable[[str], None] = lambda text: None,
        optimizer_bits: int = 32, at_once: int = 0,
    ) -> None:
        """`fragments`: those of `model`. `between` is called between microbatches; `warn` with what a person should
        know. `at_once`: sequences of a microbatch at most; 0: as many as fit."""
        super().__init__(run, warn=warn, bits=optimizer_bits)
        self._model, self._between = model, between
        parameters = dict(model.named_parameters())
        for fragment in fragments:
            self.add(fragment, parameters)
        self._microbatch = at_once or run.train.batch_sequences

    def gradients(self, batch: Batch) -> float:
        """Mean loss (nats a token) over the targets of `batch`; leaves its gradient in the parameters."""
        while True:
            try:
                return self._gradients(batch)
            except torch.OutOfMemoryError:
                if self._microbatch == 1:
                    raise
            # not above: the exception holds on to what the attempt had in memory
            self._microbatch = max(1, self._microbatch // 2)
            torch.cuda.empty_cache()
            self._warn(f"out of memory: going on with microbatches of {self._microbatch} sequences")

    def _gradients(self, batch: Batch) -> float:
        self.zero_grad()
        total = 0.0
        for piece in batch.split(self._microbatch):
            self._between()
            share = piece.num_targets / max(1, batch.num_targets)
            if not share:
                continue
            tokens = piece.tokens.to(self._model.device)
            how = model_inputs(self._model, piece.segments)
            loss = self._model(input_ids=tokens, labels=targets_of(tokens, piece.segments), **how).loss * share
            loss.backward()
            total += float(loss.detach())
        return total
