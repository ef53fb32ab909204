"""Cutting a model into fragments: which tensors are placed, averaged, hashed and downloaded together.

A fragment is one or more consecutive blocks; the first also holds what comes before the blocks (embeddings), the last
what comes after (final norm, head). Cuts depend on the architecture alone, so all peers of a run make the same ones.
Works on names and shapes: a model on the meta device can be cut as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from transformers import PreTrainedModel

from swarm.errors import ConfigError

AFTER_BLOCKS = ("final", "out")
"""words in the names of modules that run after the blocks though made before (OPT: final_layer_norm, project_out)"""


@dataclass(frozen=True)
class TensorSpec:
    name: str
    """as in `model.named_parameters()`"""
    shape: tuple[int, ...]
    fine: bool
    """needs at least 8 bits on the wire: norms, biases (fewer than 2 dimensions) and embeddings, not the head"""


@dataclass(frozen=True)
class FragmentSpec:
    index: int
    blocks: tuple[int, int]
    """first, one past the last"""
    tensors: tuple[TensorSpec, ...]
    """sorted by name"""


def cut(model: PreTrainedModel, num_fragments: int) -> tuple[FragmentSpec, ...]:
    """The fragments, balanced by their number of parameters; every trainable parameter is in exactly one. Where a base
    is frozen (`lora.py`), it is balanced, since it is what takes room.

    Raises ConfigError where there are more fragments than blocks, or no blocks can be found.
    """
    _, num_blocks = find_blocks(model)
    if num_fragments > num_blocks:
        raise ConfigError(
            f"cannot cut the model into {num_fragments} fragments",
            why=f"it has {num_blocks} blocks, and a fragment holds at least one",
            do=f"set fragments to {num_blocks} or fewer in the run config",
        )
    block_of = block_of_each(model)
    sizes = [0] * num_blocks
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = frozen_counts(model)
    for name, count in [*((name, p.numel()) for name, p in parameters.items()), *frozen.items()]:
        sizes[block_of[name]] += count
    if frozen and (empty := set(range(num_blocks)) - {block_of[name] for name in parameters}):
        raise ConfigError(
            f"block {min(empty)} has nothing to train", why="none of model.lora.targets is in it",
            do="name layers that all blocks have, or leave out model.lora.targets",
        )
    embeddings = _embedding_names(model)
    fragments = []
    for index, (start, end) in enumerate(balance(sizes, num_fragments)):
        names = sorted(name for name in parameters if start <= block_of[name] < end)
        tensors = tuple(
            TensorSpec(name, tuple(parameters[name].shape), parameters[name].ndim < 2 or name in embeddings)
            for name in names
        )
        fragments.append(FragmentSpec(index, (start, end), tensors))
    return tuple(fragments)


def find_blocks(model: PreTrainedModel) -> tuple[str, int]:
    """(name of the list of blocks, how many): "transformer.h", 28. Raises ConfigError where the model has none."""
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():  # outermost first: a list inside a block cannot win
        if isinstance(module, nn.ModuleList) and len(module) == wanted and any(True for _ in module.parameters()):
            return name, len(module)
    raise ConfigError(
        f"cannot find the blocks of this {model.config.model_type} model",
        why=f"it has no list of {wanted} layers",
        do="use a model made of equal layers, such as gptj, gpt_neox or llama",
    )


def embedding_rows(model: PreTrainedModel) -> int:
    """Tokens the model can take: rows of its input embedding, some of which may be unused by the tokenizer."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def balance(sizes: Sequence[int], num_parts: int) -> list[tuple[int, int]]:
    """Cut `sizes` into `num_parts` consecutive, non-empty parts [start, end) whose largest sum is as small as can be.

    Among those cuts, the one with the smallest sum of squares: 10 equal sizes in 4 parts are 3 3 2 2 in some order and
    not 3 3 3 1. Sizes must not be negative; 1 <= num_parts <= len(sizes).
    """
    count = len(sizes)
    if not 1 <= num_parts <= count or min(sizes) < 0:
        raise ValueError(f"cannot cut {count} sizes into {num_parts} parts")
    sums = [0, *accumulate(sizes)]
    limit = bisect_left(range(sums[-1] + 1), True, lo=max(sizes), key=lambda largest: _fits(sums, num_parts, largest))
    # best[i]: (sum of squares, start of the last part) of the first i sizes, for the parts so far
    history: list[list[tuple[int, int] | None]] = [[(0, 0)] + [None] * count]
    for _ in range(num_parts):
        best: list[tuple[int, int] | None] = [None] * (count + 1)
        for end in range(1, count + 1):
            for start in range(end - 1, -1, -1):
                part = sums[end] - sums[start]
                if part > limit:
                    break
                before = history[-1][start]
                if before is not None:
                    candidate = (before[0] + part * part, start)
                    current = best[end]
                    best[end] = candidate if current is None else min(current, candidate)
        history.append(best)
    parts, end = [], count
    for row in reversed(history[1:]):
        choice = row[end]
        assert choice is not None
        parts.append((choice[1], end))
        end = choice[1]
    return parts[::-1]


def _fits(sums: list[int], num_parts: int, largest: int) -> bool:
    """Whether `num_parts` parts (or fewer: any part can be cut further) of at most `largest` each are enough."""
    parts, start = 0, 0
    for end in range(1, len(sums)):
        if sums[end] - sums[start] > largest:
            parts, start = parts + 1, end - 1
    return parts + 1 <= num_parts


def frozen_counts(model: nn.Module) -> dict[str, int]:
    """Values of each matrix and parameter of a frozen base, by name; none where all of the model is trained."""
    matrices = {
        f"{name}.base": module.num_frozen for name, module in model.named_modules() if hasattr(module, "num_frozen")
    }
    if not matrices:
        return {}
    return matrices | {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}


def block_of_each(model: PreTrainedModel) -> dict[str, int]:
    """Block that each parameter, and each buffer in a block, goes with: its own, 0 for what comes before the blocks,
    the last for what comes after.

    Hugging Face models make their modules in the order in which they run, with the exceptions in AFTER_BLOCKS.
    """
    prefix, num_blocks = find_blocks(model)
    buffers = model.named_buffers(remove_duplicate=False)
    inside = [name for name, _ in buffers if name.startswith(prefix + ".")]
    blocks = {name: int(name[len(prefix) + 1 :].split(".", 1)[0]) for name in inside}
    seen_blocks = False
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name.startswith(prefix + "."):
            blocks[name] = int(name[len(prefix) + 1 :].split(".", 1)[0])
            seen_blocks = True
        else:
            blocks[name] = num_blocks - 1 if runs_after(name, seen_blocks=seen_blocks) else 0
    return blocks


def runs_after(name: str, *, seen_blocks: bool) -> bool:
    """Does a module outside the blocks run after them? `seen_blocks`: it was made after them."""
    words = {word for part in name.split(".") for word in part.split("_")}
    return seen_blocks or not words.isdisjoint(AFTER_BLOCKS)


def _embedding_names(model: PreTrainedModel) -> set[str]:
    """Parameters of embedding tables: few tokens train a row, so 4 bits of its neighbours' maximum would drown it."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not head
        for name, _ in module.named_parameters(recurse=False)
    }
