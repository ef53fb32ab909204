"""Random weights that do not depend on what else is drawn: a part of a model starts as it would in the whole.

Each module's values come from a generator of its own, seeded by the run's seed and the module's name, through the
library's own initialisation. So a peer that holds two blocks draws those two, and a fragment's digest at version 0 is
the same at everybody, however the model is cut.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, initialization


def draw(model: PreTrainedModel, seed: int) -> None:
    """Set all parameters and buffers of `model` that have memory, except what `skeleton.put` put there.

    The others may be on the meta device, but they must be there: some rules of the library are about a whole list of
    blocks. torch's own random state is as before. Tables that depend on nothing learnt, such as rotary ones, are made
    here too: they are in no file.
    """
    # devices=[] and the CPU's own generator: torch.manual_seed would also reseed every GPU, for good
    with torch.random.fork_rng(devices=[]), torch.no_grad(), initialization.guard_torch_init_functions():
        _draw_below(model, "", model, seed)


def module_seed(seed: int, name: str) -> int:
    """63 bits that follow from the run's seed and a module's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def _draw_below(module: nn.Module, name: str, owner: Any, seed: int) -> None:
    """First what is inside: a block's own rule, such as GPT-2's for its output projections, comes after."""
    if not any(_to_draw(tensor) for table in (module.parameters(), module.buffers()) for tensor in table):
        return
    for key, child in module.named_children():
        inner = child if isinstance(child, PreTrainedModel) else owner
        _draw_below(child, f"{name}.{key}" if name else key, inner, seed)
    torch.default_generator.manual_seed(module_seed(seed, name))
    owner._init_weights(module)


def _to_draw(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)
