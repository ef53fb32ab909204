"""Sequences that begin with a prefix: its tokens see each other, what comes after is causal (prefix-LM).

As in UL2R (https://arxiv.org/abs/2210.11399) and GPT-JT. Each sequence has a prefix of its own, 0 tokens for none: one
mask for a batch would show the end of one sequence's text to its beginning. FAMILIES.md says which models heed it.
"""

from __future__ import annotations

import torch

IGNORED = -100
"""a target that no loss is taken of: transformers' and torch's own mark"""


def prefix_mask(prefixes: torch.Tensor, length: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What to add to attention scores [batch, 1, length, length]: 0 where a query (the third dimension) may look at a
    key (the fourth), else the smallest number of `dtype`, which must be that of the hidden states.

    `prefixes`: tokens of each sequence's prefix, int64 [batch].
    """
    places = torch.arange(length, device=prefixes.device)
    causal = places[None, :] <= places[:, None]
    sees = causal[None] | (places[None, None, :] < prefixes[:, None, None])
    return torch.zeros(sees.shape, dtype=dtype, device=prefixes.device).masked_fill_(
        ~sees, torch.finfo(dtype).min
    )[:, None]


def after_prefix(tokens: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
    """Targets [batch, length] of a loss on what comes after the prefix: the token ids, and IGNORED in the prefix."""
    return tokens.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) < prefixes[:, None], IGNORED)


def num_targets(targets: torch.Tensor) -> int:
    """Of which a loss is taken: all but each sequence's first, and the IGNORED."""
    return int((targets[:, 1:] != IGNORED).sum())
