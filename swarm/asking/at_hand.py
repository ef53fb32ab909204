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
from torch.nn import functional
from transformers import PreTrainedModel

from swarm.data.batch import Batch, Segment
from swarm.model.evaluate import mean_loss
from swarm.model.prefix import IGNORED, prefix_mask

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

    @torch.no_grad()
    def loss(
        self, batch: Batch, *, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[float, int]:
        parts, done = [], 0
        for part in batch.split(SEQUENCES_AT_ONCE):
            if part.num_targets:
                parts.append((self._loss(part), part.num_targets))
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
            prefixes = torch.tensor([prefix], device=inputs.device)
            how["attention_mask"] = prefix_mask(prefixes, len(ids), dtype=self._model.dtype)
        self._cache = None  # it is written to: gone, should the call be interrupted
        found = self._model(input_ids=inputs, use_cache=True, **how)
        self._asked, self._prefix, self._cache = ids, prefix, getattr(found, self._cache_name, None)
        logits: torch.Tensor = found.logits[0, -1].float().cpu()
        return logits

    def _loss(self, batch: Batch) -> float:
        """Mean over the targets of a part."""
        tokens, how = batch.tokens.to(self._model.device), {}
        targets = tokens.clone()
        if batch.segments is not None:
            length = tokens.shape[1]
            masks = [segment_mask(row, length, dtype=self._model.dtype) for row in batch.segments]
            how["attention_mask"] = torch.stack(masks)[:, None].to(tokens.device)
            how["position_ids"] = torch.stack([positions(row) for row in batch.segments]).to(tokens.device)
            targets[~torch.stack([is_target(row) for row in batch.segments]).to(tokens.device)] = IGNORED
        logits = self._model(input_ids=tokens, use_cache=False, **how).logits[:, :-1].float()
        return functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED).item()


def segment_mask(row: Sequence[Segment], length: int, *, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the attention scores [length, length] of a row with these segments."""
    mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype)
    start = 0
    for prefix, size in row:
        end = start + size
        mask[start:end, start:end] = prefix_mask(torch.tensor([prefix]), size, dtype=dtype)[0, 0]
        start = end
    return mask


def positions(row: Sequence[Segment]) -> torch.Tensor:
    """int64 [length]: from 0 in each segment."""
    return torch.cat([torch.arange(size) for _, size in row])


def is_target(row: Sequence[Segment]) -> torch.Tensor:
    """bool [length]: whether a loss is taken of a token."""
    return torch.cat([torch.arange(size) >= max(1, prefix) for prefix, size in row])
