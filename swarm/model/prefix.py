"""Rows cut into segments, and prefixes whose tokens see each other: what a model must be told to compute them.

A segment is (prefix, length): its first `prefix` tokens see each other, as in prefix-LM, UL2R
(https://arxiv.org/abs/2210.11399) and GPT-JT; what comes after is causal. No token sees another segment, each row has
its own, and positions count from 0 in each, so that packed texts are computed as they would be alone. Where each row is
one causal segment nothing is made: models do that by themselves, and faster. FAMILIES.md says who heeds the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch

IGNORED = -100
"""a target that no loss is taken of: transformers' and torch's own mark"""

Segments = Sequence[Sequence[tuple[int, int]]]
"""of each row; their lengths add up to the row's"""


class Rows(Protocol):
    """What swarm.data makes of texts (batch.py), as siblings see it."""

    @property
    def tokens(self) -> torch.Tensor: ...

    @property
    def segments(self) -> Segments | None: ...


def are_causal(segments: Segments | None) -> bool:
    """Each row is one causal segment: what a model does without being told."""
    return segments is None or all(len(row) == 1 and row[0][0] <= 1 for row in segments)


def attention(segments: Segments | None, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Any]:
    """`attention_mask` and `position_ids` for a forward in this dtype; nothing where all is causal."""
    if segments is None or are_causal(segments):
        return {}
    return {
        "attention_mask": segment_mask(segments, dtype=dtype, device=device),
        "position_ids": _Places(segments, device).offsets,
    }


def model_inputs(model: Any, segments: Segments | None) -> dict[str, Any]:
    """The same, as a whole Hugging Face model takes it beside its token ids."""
    if are_causal(segments):
        return {}
    found = attention(segments, dtype=model.dtype, device=model.device)
    if not takes_positions(model):
        del found["position_ids"]
    return found


def takes_positions(model: Any) -> bool:
    """Some have none to tell: what they add to scores depends on distances only (MPT)."""
    forwards = (model.forward, model.base_model.forward)
    return all("position_ids" in inspect.signature(forward).parameters for forward in forwards)


def segment_mask(
    segments: Segments, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """What to add to attention scores [rows, 1, length, length]: 0 where a query (the third dimension) may look at a
    key (the fourth), else the smallest number of `dtype`, which must be that of the hidden states."""
    places = _Places(segments, device)
    length = places.numbers.shape[1]
    order = torch.arange(length, device=device)
    sees = (order[None, :] <= order[:, None])[None] | places.given[:, None, :]
    sees &= places.numbers[:, :, None] == places.numbers[:, None, :]
    return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def targets_of(tokens: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    """What a loss is taken of [rows, length]: the token ids, and IGNORED in prefixes and where a segment begins, which
    nothing foretells. Without segments the ids as they are: losses leave out a row's first themselves."""
    if segments is None:
        return tokens
    places = _Places(segments, tokens.device)
    return tokens.masked_fill(places.given | (places.offsets == 0), IGNORED)


def num_targets(targets: torch.Tensor) -> int:
    """Of which a loss is taken: all but each row's first, and the IGNORED."""
    return int((targets[:, 1:] != IGNORED).sum())


class _Places:
    """Of each token of each row, [rows, length]: its segment's number, its place in it, and whether it is given."""

    def __init__(self, segments: Segments, device: torch.device | str) -> None:
        flat = torch.tensor([segment for row in segments for segment in row], device=device)  # [segments, 2]
        prefixes, lengths = flat[:, 0], flat[:, 1]
        numbers = torch.repeat_interleave(torch.arange(len(flat), device=device), lengths)
        offsets = torch.arange(len(numbers), device=device) - (lengths.cumsum(0) - lengths)[numbers]
        shape = len(segments), -1
        self.numbers, self.offsets = numbers.view(shape), offsets.view(shape)
        self.given = (offsets < prefixes[numbers]).view(shape)
