"""Blocks that are computed again for their backward: the same gradients bit for bit, and little kept meanwhile."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from swarm.host.memory import INPUTS_PER_BLOCK
from swarm.model.build import build_model
from swarm.model.partial import build_stage
from swarm.model.recompute import recompute_blocks
from tests.unit.model.parts_support import BLOCKS, FAMILIES, family, run_with

IDS = torch.arange(24).reshape(2, 12)


def gradients(model: Any, *, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_same_gradients_bit_for_bit(name: str) -> None:
    """With dropout as well, where the family has it: the second forward throws the same dice."""
    run = run_with(family(name))
    wanted = gradients(build_model(run))
    again = build_model(run)
    recompute_blocks(again)
    recompute_blocks(again)
    found = gradients(again)
    assert wanted.keys() == found.keys() and len(wanted) > BLOCKS
    for key, values in wanted.items():
        assert torch.equal(found[key], values), key


def test_without_gradients_or_training_it_is_as_before() -> None:
    model = build_model(run_with(family("gptj")))
    plain = model.eval()(input_ids=IDS).logits.detach()
    recompute_blocks(model)
    assert torch.equal(model(input_ids=IDS).logits.detach(), plain)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain)


def test_names_of_parameters_stay() -> None:
    model = build_model(run_with(family("llama")))
    before = [name for name, _ in model.named_parameters()]
    recompute_blocks(model)
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize("name", ["gptj", "llama"])
def test_a_block_keeps_what_came_in(name: str) -> None:
    """The constant of the memory plan: of each block more, one set of hidden states stays until the backward."""
    def kept(num_blocks: int) -> int:
        alive: list[weakref.ref[torch.UntypedStorage]] = []
        sizes: dict[int, int] = {}
        config = {"n_layer": num_blocks} if name == "gptj" else {"num_hidden_layers": num_blocks}
        model = build_model(run_with(family(name, **config)))
        recompute_blocks(model)
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = function(*args, **(kwargs or {}))
                for tensor in result if isinstance(result, (tuple, list)) else [result]:
                    if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in own:
                        storage = tensor.untyped_storage()
                        sizes[id(storage)] = storage.nbytes()
                        alive.append(weakref.ref(storage))
                return result

        with Watch():
            logits = model(input_ids=IDS, use_cache=False).logits
        storages = {storage.data_ptr(): storage.nbytes() for ref in alive if (storage := ref()) is not None}
        assert logits.requires_grad
        return sum(storages.values())

    a_block = (kept(5) - kept(2)) / 3
    assert a_block == INPUTS_PER_BLOCK * IDS.numel() * 16 * 4


def test_stand_ins_of_a_stage_are_left_alone() -> None:
    stage = build_stage(run_with(family("gptj")), (1, 3))
    recompute_blocks(stage.model)
    blocks: Any = stage.model.get_submodule("transformer.h")
    assert ["forward" in vars(block) for block in blocks] == [False, True, True, False]
    values = torch.randn(2, 5, 16, requires_grad=True)
    stage(values).sum().backward()
    assert values.grad is not None and float(values.grad.norm()) > 0
