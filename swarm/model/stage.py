"""A stage: consecutive blocks of a Hugging Face model as one module, hidden states in, hidden states or logits out.

Its own forward is kept and what the stage does not hold is replaced by something that passes values on, so masks,
rotary tables, window patterns and scalings are the library's, and a chain of stages computes what the whole model does
to the last bit. FAMILIES.md says for which families; `scripts/families.py` finds out.

    embedding   first stage only; the others get hidden states as `inputs_embeds`
    blocks      those held; the others pass on what they get, under their own numbers, since layers differ by number
    final norm, head   last stage only

Works on the meta device: a stage that is cut there and filled later never holds what it drops (DESIGN 6).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from swarm.errors import ConfigError
from swarm.model.fragments import find_blocks, runs_after


class Stage(nn.Module):
    """Blocks [start, end) of a model. Parameters keep the names that they have in the whole model."""

    def __init__(self, model: PreTrainedModel, start: int, end: int) -> None:
        """Cuts `model`, which becomes the stage. Raises ConfigError where there are no such blocks."""
        super().__init__()
        prefix, num_blocks = find_blocks(model)
        if not 0 <= start < end <= num_blocks:
            raise ConfigError(f"there are no blocks {start} to {end}", why=f"the model has {num_blocks}")
        self.start, self.end, self.num_blocks = start, end, num_blocks
        _drop_around(model, prefix, first=self.is_first, last=self.is_last)
        blocks: Any = model.get_submodule(prefix)
        for index in range(num_blocks):
            if not start <= index < end:
                blocks[index] = _Skipped(blocks[index])
        blocks[start].register_forward_pre_hook(_unwrap_input, with_kwargs=True)
        self.model = model

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.num_blocks

    def forward(
        self, values: torch.Tensor, *, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`values`: token ids [batch, length] for the first stage, else hidden states [batch, length, hidden].
        Returns hidden states, or logits [batch, length, vocabulary] from the last stage.

        `attention_mask`: [batch, length], or [batch, 1, length, length] for what is not causal; the same in all stages.
        """
        inputs = {"input_ids" if self.is_first else "inputs_embeds": values}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        whole: Any = self.model if self.is_last else self.model.base_model
        found = whole(**inputs, use_cache=False, return_dict=True)
        return _first(found.logits if self.is_last else found[0])

    def held(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(name in the whole model, parameter)"""
        return self.model.named_parameters()


class _Skipped(nn.Module):
    """In place of a block that another stage holds. Some models take a block's result as it is, some the first of a
    tuple: a tuple of one suits both, and whatever comes next opens it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, value in vars(block).items():  # what kind of layer it is, which some loops ask for
            if isinstance(value, (str, int, float)) and name != "training" and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, hidden_states: Any, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return hidden_states if isinstance(hidden_states, tuple) else (hidden_states,)


class _PassOn(nn.Module):
    """In place of a norm, projection or head that another stage holds."""

    def forward(self, hidden_states: Any, *_: Any, **__: Any) -> torch.Tensor:
        return _first(hidden_states)


class _Nothing(nn.Module):
    """In place of a table that was added to the hidden states in the first stage: positions, kinds of tokens."""

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros(())


def _drop_around(model: PreTrainedModel, prefix: str, *, first: bool, last: bool) -> None:
    """Replace what comes before the blocks, and what comes after, where the stage does not hold it."""
    before, after = _around(model, prefix)
    embedding = model.get_input_embeddings()
    for name in before if not first else []:
        module = model.get_submodule(name)
        adds = isinstance(module, nn.Embedding) and module is not embedding
        _replace(model, name, _Nothing() if adds else _PassOn())
    for name in after if not last else []:
        _replace(model, name, _PassOn())


def _around(model: PreTrainedModel, prefix: str) -> tuple[list[str], list[str]]:
    """Names of the modules outside the blocks that change values: (those that run before them, those that run after).

    Tables that depend on nothing learnt, such as rotary ones, are in neither: every stage keeps them."""
    before: list[str] = []
    after: list[str] = []
    seen_blocks = False
    for name, module in model.named_modules():
        if name == prefix:
            seen_blocks = True
        if not name or (prefix + ".").startswith(name + ".") or name.startswith(prefix + "."):
            continue
        is_norm = "norm" in type(module).__name__.lower()  # some have no parameters
        if is_norm or isinstance(module, nn.Dropout) or any(True for _ in module.parameters(recurse=False)):
            (after if runs_after(name, seen_blocks=seen_blocks) else before).append(name)
    return before, after


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    dropped = model.get_submodule(name)
    if any(True for _ in dropped.children()):  # those are replaced one by one
        for key, _ in list(dropped.named_parameters(recurse=False)):
            setattr(dropped, key, None)
        return
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _unwrap_input(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (_first(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _first(kwargs["hidden_states"])}


def _first(values: Any) -> torch.Tensor:
    found = values[0] if isinstance(values, tuple) else values
    assert isinstance(found, torch.Tensor)
    return found
