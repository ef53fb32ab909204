"""LoRA (https://arxiv.org/abs/2106.09685): a frozen base, and small adapters, which alone are trained.

Each linear layer of the blocks keeps its matrix W as `frozen.py` has it, and those that are targets compute

    y = W x + bias + alpha / rank * B A x        A [rank, in] drawn from the run's seed, B [out, rank] zero at first

So at the start the model is its base. All else (embeddings, norms, biases, the head) is frozen, too. What is not
frozen is what a fragment consists of for everybody else: A and B are placed, averaged, hashed, checkpointed and
downloaded; of the base each peer reads its part from the source, and its digest must be the one in the run config.

The values of the base are agreed (rounded to bfloat16 unless it is fp32); in which precision a peer computes with them
is its own choice.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from swarm.config import LoraConfig
from swarm.errors import ConfigError
from swarm.model import frozen
from swarm.model.draw import module_seed
from swarm.model.fragments import find_blocks
from swarm.model.frozen import Matrix


class Adapted(nn.Module):
    """A linear layer with a frozen matrix, with or without an adapter."""

    def __init__(self, layer: nn.Linear, lora: LoraConfig, *, rank: int) -> None:
        """`rank` 0: no adapter. Its values are still to be drawn (`draw_adapter`)."""
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.scale = lora.alpha / rank if rank else 0.0
        matrix = frozen.keep(layer.weight, lora.base)
        self.register_buffer("base", matrix.values)
        self.register_buffer("base_scales", matrix.scales)
        self.bias = layer.bias
        device = layer.weight.device
        self.lora_a = nn.Parameter(torch.zeros(rank, self.in_features, device=device)) if rank else None
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device)) if rank else None

    @property
    def matrix(self) -> Matrix:
        values, scales = self.base, self.base_scales
        assert isinstance(values, torch.Tensor) and (scales is None or isinstance(scales, torch.Tensor))
        return Matrix(values, scales, (self.out_features, self.in_features))

    @property
    def num_frozen(self) -> int:
        """weights of the matrix; `fragments.cut` asks for it"""
        return self.out_features * self.in_features

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = frozen.linear(inputs, self.matrix, self.bias)
        if self.lora_a is None or self.lora_b is None:
            return found
        low = functional.linear(inputs, self.lora_a.to(inputs.dtype))
        return found + functional.linear(low, self.lora_b.to(inputs.dtype)) * self.scale

    def draw_adapter(self, seed: int) -> None:
        """A uniform within 1 / sqrt(in) (what PyTorch gives a linear layer), B zero."""
        if self.lora_a is None:
            return
        bound = 1 / math.sqrt(self.in_features)
        with torch.no_grad():
            self.lora_a.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))

    def merged(self) -> torch.Tensor:
        """W + alpha / rank * B A, fp32 on the CPU."""
        values = frozen.values_of(self.matrix, torch.float32).to("cpu")
        if self.lora_a is None or self.lora_b is None:
            return values
        a, b = (parameter.detach().to("cpu", torch.float32) for parameter in (self.lora_a, self.lora_b))
        return values + (b @ a) * self.scale


def adapt(model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Freeze `model` (fp32, or on the meta device; a stage's model, too) and give it adapters, in place.

    Raises ConfigError where a target is not there, or a block would have nothing to train.
    """
    prefix, _ = find_blocks(model)
    layers = dict(_linears(model, prefix))
    targets = set(lora.targets) or {name.rpartition(".")[2] for name in layers}
    found = {name.rpartition(".")[2] for name in layers}
    if not targets or targets - found:
        raise ConfigError(
            f"no linear layer {', '.join(sorted(targets - found)) or 'at all'} in the blocks of this "
            f"{model.config.model_type} model",
            why=f"there are: {', '.join(sorted(found))}" if found else "its blocks have no torch.nn.Linear",
            do="change model.lora.targets in the run config" if found else "train all weights: leave out model.lora",
        )
    for name, layer in layers.items():
        parent, _, key = name.rpartition(".")
        rank = lora.rank if key in targets else 0
        adapted = Adapted(layer, lora, rank=rank)
        if not layer.weight.is_meta:
            adapted.draw_adapter(module_seed(seed, f"{name}.lora_a"))
        adapted.train(layer.training)
        setattr(model.get_submodule(parent), key, adapted)
    for parameter in _frozen_parameters(model):
        parameter.requires_grad_(False)
        if lora.base != "fp32" and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)


def is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, Adapted) for module in model.modules())


def is_matrix(name: str) -> bool:
    """Of a frozen tensor: is it (a part of) a matrix, in as few bits as the run says?"""
    return name.rpartition(".")[2] in ("base", "base_scales")


def largest_matrix(model: nn.Module) -> int:
    """Weights of the largest one whose values are made anew for each product; 0: there is none."""
    return max((module.num_frozen for module in model.modules() if isinstance(module, Adapted)), default=0)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """What is frozen beside the matrices, in the type that this peer computes with."""
    for parameter in _frozen_parameters(model):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def base_digest(held: Iterable[tuple[str, torch.Tensor]]) -> str:
    """32 hex digits that name these frozen tensors of a fragment (name, tensor on the CPU, before `compute_in`)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(held, key=lambda named: named[0]):
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {kind} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a base: all parameters that are not trained, and the matrices."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield from ((f"{name}.{key}", buffer) for key, buffer in module.named_buffers())


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without adapters, plain Hugging Face modules with fp32 weights on the CPU, for export.

    A model without adapters is returned as it is. Needs memory for all weights in fp32.
    """
    if not is_adapted(model):
        return model
    places = [(name, module) for name, module in model.named_modules() if isinstance(module, Adapted)]
    # what is copied must not be twice in memory: the matrices stay out of it
    memo = {id(module): nn.Identity() for _, module in places}
    plain: PreTrainedModel = copy.deepcopy(model, memo)
    for name, module in places:
        layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        layer.weight = nn.Parameter(module.merged())
        if module.bias is not None:
            layer.bias = nn.Parameter(module.bias.detach().to("cpu", torch.float32))
        parent, _, key = name.rpartition(".")
        setattr(plain.get_submodule(parent), key, layer)
    nn.Module.to(plain, device="cpu", dtype=torch.float32)
    plain.requires_grad_(True)
    plain.train(model.training)
    return plain


def _linears(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of those inside blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(prefix + "."):
            yield name, module


def _frozen_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    adapters = {
        id(parameter) for module in model.modules() if isinstance(module, Adapted)
        for parameter in (module.lora_a, module.lora_b)
    }
    return (parameter for parameter in model.parameters() if id(parameter) not in adapters)
