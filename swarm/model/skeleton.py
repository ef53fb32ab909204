"""A model without weights: every module and name on the meta device, where a tensor is a shape and takes no memory.

A peer that holds a part of a model gives memory to that part only, and cuts off the rest (`swarm/model/partial.py`,
DESIGN 6). The head is untied as in the real model: names, shapes and cuts are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from swarm.config import RunConfig
from swarm.model.architecture import INVALID, architecture, not_valid
from swarm.model.lora import adapt

_auto: Any = AutoModelForCausalLM  # its methods have no types


class Skeleton(NamedTuple):
    model: PreTrainedModel
    tied: tuple[str, str] | None
    """names of the head's and the embedding's weights where the architecture has one tensor for both: they start as
    equals, and a file may hold either"""


def skeleton(run: RunConfig) -> PreTrainedModel:
    """The run's model on the meta device, in train mode, its head untied, adapters included. Raises ConfigError as
    `architecture` does, and where adapters cannot be."""
    model = skeleton_of(architecture(run)).model
    if run.model.lora is not None:
        adapt(model, run.model.lora, run.seed)
    return model


def skeleton_of(config: PreTrainedConfig) -> Skeleton:
    """A model of this architecture on the meta device. Raises ConfigError for sizes that cannot be."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = _auto.from_config(config, dtype=torch.float32)
    except INVALID as error:
        raise not_valid(error) from None
    ready_to_train(model)
    return Skeleton(model, untie(model))


def ready_to_train(model: PreTrainedModel) -> None:
    """Sets fp32, train mode, and no cache."""
    nn.Module.to(model, dtype=torch.float32)
    model.config.use_cache = False  # a cache of keys and values is memory that training never reads
    model.train()


def untie(model: PreTrainedModel) -> tuple[str, str] | None:
    """Give the head weights of its own. Equal ones, so that nothing changes until it is trained.

    Returns the names of the head's and the embedding's weights where they were one tensor.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        return None
    embedding: Any = model.get_input_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone())
    # both, or save_pretrained and generate would tie it again
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    names = {module: name for name, module in model.named_modules()}
    return (f"{names[head]}.weight", f"{names[embedding]}.weight") if tied else None


def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, parameter or buffer), by each of its names where a tensor has several."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def put(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put values where parameters and buffers of these names are, on the meta device until now; `draw` will leave them
    as they are. Whether something is trained stays as it is, and one tensor with several names stays one.

    Raises KeyError: no such tensor.
    """
    old = dict(tensors(model))
    new = {old[name]: _like(old[name], found) for name, found in values.items()}
    for tensor in new.values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    _replace(model, new)


def adopt(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put these very parameters and buffers where the model, on the meta device until now, has these names. What is
    trained goes on being trained, in both models. Names that the model does not have are left out."""
    _replace(model, {old: values[name] for name, old in tensors(model) if old.is_meta and name in values})


def allocate(model: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Give the tensors of these names (all by default) memory on the CPU if they are on the meta device.

    Returns the names of those. They are filled with NaN: what nobody sets afterwards cannot pass for a weight.
    """
    found = [(name, old) for name, old in tensors(model) if old.is_meta and (names is None or name in names)]
    made: dict[torch.Tensor, torch.Tensor] = {}
    for _, old in found:
        if old not in made:
            made[old] = _like(old, torch.full_like(old, torch.nan if old.is_floating_point() else 0, device="cpu"))
    _replace(model, made)
    return [name for name, _ in found]


def never_set(model: nn.Module, names: Collection[str]) -> list[str]:
    """Those of these names whose tensor still has NaN from `allocate` somewhere."""
    found = ((name, tensor) for name, tensor in tensors(model) if name in names and tensor.is_floating_point())
    return [name for name, tensor in found if bool(torch.isnan(tensor.detach().sum()))]


def _like(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values


def _replace(model: nn.Module, new_for_old: dict[torch.Tensor, torch.Tensor]) -> None:
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None and tensor in new_for_old:
                    table[key] = new_for_old[tensor]  # type: ignore[assignment]
