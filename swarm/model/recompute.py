"""Blocks that keep nothing for their backward but what came in, and go forward once more in it.

Activation recomputation (Chen et al. 2016, https://arxiv.org/abs/1604.06174) through torch.utils.checkpoint: the same
operations on the same values, so the same gradients bit for bit, for a third more arithmetic; of all that a block
computes there is only ever one block's at a time.

A stage's graphs are built on aliases of its weights (pipeline/compute.py), which are in the modules during the forward
only: each call remembers those that it saw, and its second forward has them, too, whatever was written meanwhile.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from swarm.model.fragments import find_blocks


def recompute_blocks(model: PreTrainedModel) -> None:
    """From now on, in training, each block of this model (or of a stage's) that is held does so. Twice is once."""
    prefix, _ = find_blocks(model)
    blocks: Any = model.get_submodule(prefix)
    for block in blocks:
        if "forward" not in vars(block) and any(True for _ in block.parameters()):  # without parameters: a stand-in
            block.forward = functools.partial(_forward, block)


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    once: Any = type(block).forward
    if not (block.training and torch.is_grad_enabled()):
        return once(block, *args, **kwargs)
    seen = dict(block.named_parameters())

    def again(*inputs: Any, **more: Any) -> Any:
        return functional_call(_Plain(block), {f"block.{name}": tensor for name, tensor in seen.items()}, inputs, more)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)


class _Plain(nn.Module):
    """A block whose own forward is called, without its hooks, which have run by then."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        once: Any = type(self.block).forward
        return once(self.block, *args, **kwargs)
