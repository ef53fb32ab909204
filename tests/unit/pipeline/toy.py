"""A model small enough to train thousands of microbatches in a test: what a stage needs, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from swarm.model.fragments import FragmentSpec, TensorSpec

HIDDEN, VOCABULARY, LENGTH = 8, 11, 6


class Toy(nn.Module):
    """An embedding, blocks, a head: one block a fragment. `forward` has the shape of a `Stage`'s."""

    def __init__(self, num_blocks: int, *, seed: int = 0) -> None:
        super().__init__()
        self.start, self.end = 0, num_blocks
        self.model = nn.Module()
        self.model.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(num_blocks))
        self.model.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.model.head = nn.Linear(HIDDEN, VOCABULARY)
        dice = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=dice))

    def forward(self, values: torch.Tensor, *, start: int, end: int) -> torch.Tensor:
        hidden = self.model.embedding(values) if start == 0 else values
        for block in self.model.blocks[start:end]:
            hidden = hidden + torch.tanh(block(hidden))
        return self.model.head(hidden) if end == len(self.model.blocks) else hidden

    def held(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def mean_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), targets[:, 1:].reshape(-1))


def fragments_of(num_blocks: int) -> dict[int, FragmentSpec]:
    names = {name: tuple(p.shape) for name, p in Toy(num_blocks).model.named_parameters()}

    def belongs(name: str, index: int) -> bool:
        if name.startswith("blocks."):
            return name.startswith(f"blocks.{index}.")
        return index == (0 if name.startswith("embedding") else num_blocks - 1)

    return {
        index: FragmentSpec(index, (index, index + 1), tuple(
            TensorSpec(name, shape, False) for name, shape in sorted(names.items()) if belongs(name, index)
        )) for index in range(num_blocks)
    }


def microbatches(count: int, *, seed: int, sequences: int = 2) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (sequences, LENGTH), generator=dice) for _ in range(count)]


def in_one_process(num_blocks: int, texts: Iterable[torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """(sum over all microbatches of the mean gradient times tokens, losses), by plain torch."""
    whole = Toy(num_blocks)
    losses = []
    for tokens in texts:
        loss = whole.mean_loss(whole(tokens, start=0, end=num_blocks), tokens)
        (loss * tokens.numel()).backward()
        losses.append(float(loss.detach()))
    return {name: p.grad for name, p in whole.model.named_parameters() if p.grad is not None}, losses
