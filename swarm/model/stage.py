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

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from swarm.errors import ConfigError
from swarm.model.fragments import find_blocks, runs_after
from swarm.model.prefix import takes_positions


class Stage(nn.Module):
    """Blocks [start, end) of a model. Parameters keep the names that they have in the whole model."""

    def __init__(self, model: PreTrainedModel, start: int, end: int) -> None:
        """Cuts `model`, which becomes the stage. Raises ConfigError where there are no such blocks."""
        super().__init__()
        prefix, num_blocks = find_blocks(model)
        if not 0 <= start < end <= num_blocks:
            raise ConfigError(f"there are no blocks {start} to {end}", why=f"the model has {num_blocks}")
        self.start, self.end, self.num_blocks = start, end, num_blocks
        blocks: Any = model.get_submodule(prefix)
        before, after = _around(model, prefix)
        self._skipped = [_Swap(blocks, str(index), _Skipped(blocks[index])) for index in range(num_blocks)]
        self._no_embedding = [swap for name in before for swap in _swaps(model, name)]
        self._no_head = [swap for name in after for swap in _swaps(model, name)]
        for swap in self._left_out(start, end):
            swap.table[swap.key] = swap.stand_in
        for index in range(start, end):  # any of them may be the first of a call
            blocks[index].register_forward_pre_hook(_unwrap_input, with_kwargs=True)
        self._takes_positions = takes_positions(model)
        self.model = model

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.num_blocks

    def forward(
        self, values: torch.Tensor, *, start: int | None = None, end: int | None = None,
        attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`values`: token ids [batch, length] where block 0 is the first, else hidden states [batch, length, hidden].
        Returns hidden states, or logits [batch, length, vocabulary] where the model's last block is the last.

        `start`, `end`: only blocks [start, end) of those held, as a stage of these would (all held by default). The
        modules are swapped during the call: one call at a time.
        `attention_mask`: [batch, length], or [batch, 1, length, length] for what is not causal; `position_ids`: [batch,
        length], left out where the model takes none. The same in all stages.
        Raises ValueError where the blocks are not held.
        """
        start, end = self.start if start is None else start, self.end if end is None else end
        if not self.start <= start < end <= self.end:
            raise ValueError(f"blocks {start} to {end} are not all held: this stage has {self.start} to {self.end}")
        inputs = {"input_ids" if start == 0 else "inputs_embeds": values}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if position_ids is not None and self._takes_positions:
            inputs["position_ids"] = position_ids
        is_last = end == self.num_blocks
        whole: Any = self.model if is_last else self.model.base_model
        with _swapped(self._left_out(start, end)):
            found = whole(**inputs, use_cache=False, return_dict=True)
        return _first(found.logits if is_last else found[0])

    def mean_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean over a batch of what each token says of the next one, nats: as the library's own `labels` do.
        `logits`: [batch, length, vocabulary]; `targets`: the token ids that made them [batch, length]."""
        model: Any = self.model
        loss = model.loss_function(logits=logits, labels=targets, vocab_size=model.config.get_text_config().vocab_size)
        assert isinstance(loss, torch.Tensor)
        return loss

    def held(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(name in the whole model, parameter)"""
        return self.model.named_parameters()

    def _left_out(self, start: int, end: int) -> list[_Swap]:
        """What to replace so that the model is blocks [start, end)."""
        blocks = [swap for index, swap in enumerate(self._skipped) if not start <= index < end]
        before = self._no_embedding if start > 0 else []
        return blocks + before + (self._no_head if end < self.num_blocks else [])


class _Swap:
    """A place in a model, by module and key, and what stands there where a stage does not hold what belongs there."""

    def __init__(self, parent: nn.Module, key: str, stand_in: nn.Module | None) -> None:
        self.parent, self.key, self.stand_in = parent, key, stand_in

    @property
    def table(self) -> dict[str, Any]:
        """Where the parent keeps it. A parameter of the parent's own has None as stand-in."""
        modules: dict[str, Any] = self.parent._modules
        return self.parent._parameters if self.stand_in is None else modules


@contextmanager
def _swapped(swaps: Iterable[_Swap]) -> Iterator[None]:
    """Other modules in these places for a while. The dictionaries are written to, and not the attributes: so it also
    works within functional_call, whose parameters are plain tensors, and no name or order changes."""
    before = [(swap, swap.table[swap.key]) for swap in swaps]
    try:
        for swap, _ in before:
            swap.table[swap.key] = swap.stand_in
        yield
    finally:
        for swap, held in before:
            swap.table[swap.key] = held


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


def _swaps(model: PreTrainedModel, name: str) -> list[_Swap]:
    """What takes the place of a module outside the blocks in a stage that does not hold it."""
    module = model.get_submodule(name)
    if any(True for _ in module.children()):  # those are replaced one by one
        return [_Swap(module, key, None) for key, _ in module.named_parameters(recurse=False)]
    parent, _, key = name.rpartition(".")
    adds = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    return [_Swap(model.get_submodule(parent), key, _Nothing() if adds else _PassOn())]


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
