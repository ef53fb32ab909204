"""A fragment as one flat vector: where each tensor lies, and how it is cut into blocks and parts.

Blocks of 256 values are the unit of quantisation. Norms, biases and embeddings lie first, in blocks that always travel
with at least 8 bits ("fine"); all other weights follow in "coarse" blocks. A part is a run of whole blocks that one
peer reduces. Everybody derives the same layout from the run config, so shapes never travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from swarm.model import working
from swarm.model.fragments import FragmentSpec
from swarm.network.codec import BLOCK


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in the flat vector: `start` and `numel` in values."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """`num_fine_blocks` of the `num_blocks` come first and keep at least 8 bits."""

    slots: tuple[Slot, ...]
    num_fine_blocks: int
    num_blocks: int

    @property
    def numel(self) -> int:
        """values in the flat vector, the padding of the fine and of the coarse blocks included"""
        return self.num_blocks * BLOCK

    @property
    def num_parameters(self) -> int:
        return sum(slot.numel for slot in self.slots)

    def fine_in(self, start: int, end: int) -> int:
        """Fine blocks among the blocks start..end (they come first)."""
        return max(0, min(self.num_fine_blocks, end) - start)

    def flatten(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Copy named tensors into a new flat fp32 CPU vector [numel]; padding is zero."""
        flat = torch.zeros(self.numel, dtype=torch.float32)
        for slot in self.slots:
            working.read_all(tensors[slot.name], flat[slot.start:slot.start + slot.numel])
        return flat

    def decay_mask(self) -> torch.Tensor:
        """1 where weight decay applies (tensors of two and more dimensions), else 0; fp32 [numel]."""
        mask = torch.zeros(self.numel)
        for slot in self.slots:
            if len(slot.shape) >= 2:
                mask[slot.start:slot.start + slot.numel] = 1.0
        return mask

    def views(self, flat: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """Each tensor's view into a flat vector [numel]."""
        for slot in self.slots:
            yield slot.name, flat[slot.start:slot.start + slot.numel].view(slot.shape)


def layout_of(fragment: FragmentSpec) -> Layout:
    slots, start = [], 0
    fine_blocks = 0
    for fine in (True, False):
        for tensor in fragment.tensors:
            if tensor.fine == fine:
                numel = 1
                for size in tensor.shape:
                    numel *= size
                slots.append(Slot(tensor.name, tensor.shape, start, numel))
                start += numel
        start = -(-start // BLOCK) * BLOCK
        if fine:
            fine_blocks = start // BLOCK
    return Layout(tuple(slots), fine_blocks, start // BLOCK)
