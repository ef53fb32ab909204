"""Tiny models of several families, and the whole one to compare parts with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.model.skeleton import tensors
from swarm.model.stage import Stage

BLOCKS = 4
_SMALL = {"num_hidden_layers": BLOCKS, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 260}
_GPT = {"n_layer": BLOCKS, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 260}
FAMILIES: dict[str, dict[str, Any]] = {
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt2": _GPT,
    "llama": {**_SMALL, "num_key_value_heads": 1, "intermediate_size": 32},
    "gpt_neox": {**_SMALL, "intermediate_size": 32},
    "opt": {**_SMALL, "ffn_dim": 32, "word_embed_proj_dim": 8, "max_position_embeddings": 64},
    "qwen3": {**_SMALL, "num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8},
    "mixtral": {**_SMALL, "num_key_value_heads": 1, "intermediate_size": 32, "num_local_experts": 3},
}
"""opt: projections beside a narrower embedding; mixtral: its files hold each expert on its own, the model all in one"""
CUTS = [(0, 1), (1, 3), (3, 4), (0, 4)]


def family(name: str, **changes: Any) -> dict[str, Any]:
    tokens = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 0}
    return {"model_type": name, **tokens, **FAMILIES[name], **changes}


def run_with(config: dict[str, Any] | None = None, source: Path | str | None = None, **more: Any) -> RunConfig:
    model = ModelConfig(config=config, source=None if source is None else str(source))
    return RunConfig(name="test", model=model, data=DataConfig(stdlib=True), **{"fragments": 2, **more})


def trained(name: str, **changes: Any) -> Any:
    """A model as transformers makes it, every value moved, so that nothing is zero or one by luck."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family(name, **changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_part_of(stage: Stage, whole: Any) -> None:
    """Each parameter and buffer of the stage is that of the whole model, bit for bit, and real."""
    wanted = dict(tensors(whole))
    found = dict(tensors(stage.model))
    assert found
    for name, tensor in found.items():
        assert tensor.device.type == "cpu" and tensor.dtype == wanted[name].dtype, name
        assert tensor.requires_grad == wanted[name].requires_grad, name
        assert torch.equal(tensor, wanted[name]), name
