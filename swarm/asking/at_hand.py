"""A model on this machine as an answerer: an export, or the weights of a checkpoint.

A prompt that was learnt as a prefix is computed under a mask in which its tokens see each other; each token that is
written then sees all before it through the cache. `generate` does the same where `config.is_causal` is False, but only
that: a loss over a whole text must never be taken so, for each token would see itself (notes in the model card).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from swarm.data.batch import Batch
from swarm.model.evaluate import held_out_loss, mean_loss
from swarm.model.prefix import model_inputs

SEQUENCES_AT_ONCE = 8


class AtHand:
    """Puts `model` in eval mode, and keeps the cache of the last question: asking on is cheap."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model.train(False)
        self._asked: list[int] = []
        self._prefix = 0
        self._cache: Any = None
        # transformers 5.23 has renamed it, and says so at each call with the old name
        is_renamed = "cache" in inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if is_renamed else "past_key_values"

    def loss(
        self, batch: Batch, *, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[float, int]:
        parts, done = [], 0
        for part in batch.split(SEQUENCES_AT_ONCE):
            parts.append((held_out_loss(self._model, part), part.num_targets))
            done += len(part)
            on_progress(done, len(batch))
        return mean_loss(parts), batch.num_targets

    @torch.no_grad()
    def next_logits(self, ids: Sequence[int], *, prefix: int = 0) -> torch.Tensor:
        """Where `ids` go on from those asked before, only what is new is computed."""
        ids, known = list(ids), len(self._asked)
        goes_on = 0 < known < len(ids) and self._prefix == prefix <= known and ids[:known] == self._asked
        goes_on = goes_on and self._cache is not None
        inputs = torch.tensor([ids[known:] if goes_on else ids], device=self._model.device)
        how: dict[str, Any] = {self._cache_name: self._cache} if goes_on else {}
        if prefix and not goes_on:
            how |= model_inputs(self._model, [[(prefix, len(ids))]])
        self._cache = None  # it is written to: gone, should the call be interrupted
        found = self._model(input_ids=inputs, use_cache=True, **how)
        self._asked, self._prefix, self._cache = ids, prefix, getattr(found, self._cache_name, None)
        logits: torch.Tensor = found.logits[0, -1].float().cpu()
        return logits
