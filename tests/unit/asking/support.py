"""Tiny runs with a checkpoint on disk, made without a peer: what is asked in these tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.asking.states import Weights
from swarm.averaging.global_state import GlobalState, initial_state
from swarm.config import RunConfig
from swarm.data.tokenizer import byte_tokenizer
from swarm.host.home import Home
from swarm.train import checkpoint, run_source

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "
GPTJ: dict[str, Any] = {
    "model_type": "gptj", "n_layer": 2, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 128,
    "vocab_size": 300, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 256,
    "eos_token_id": 256,
}


def make_run(folder: Path, **changes: Any) -> tuple[RunConfig, run_source.Held]:
    """A complete run, as the peer that starts it has it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("".join(f"{number}. {TEXT}\n" for number in range(200)))
    document: dict[str, Any] = {
        "name": "tiny", "model": {"config": GPTJ}, "fragments": 2, "data": {"files": [str(text)]},
        "train": {"sequence_length": 32, "batch_sequences": 4, "total_tokens": 100_000},
    }
    for key, value in changes.items():
        old = document.get(key)
        document[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    (folder / "run.yaml").write_text(yaml.safe_dump(document))
    return run_source.new_run(str(folder / "run.yaml"))


def adapted(folder: Path) -> dict[str, Any]:
    """A run of adapters on an nf4 base, which is a model folder of plain transformers: to be given to `make_run`."""
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GPTJ))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return {"model": {"config": None, "source": str(folder), "lora": {"rank": 2}}, "name": "adapters"}


def recipe(folder: Path, *, last: str = "prefix") -> dict[str, Any]:
    """Sources and phases as GPT-JT has them, tiny: to be given to `make_run`. The tasks: which letter comes first."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(one, two) for one in "abcdefgh" for two in "abcdefgh" if one != two]
    rows = [{"inputs": f"{one} or {two}? ", "targets": min(one, two)} for one, two in pairs]
    (folder / "p3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pile.txt").write_text("".join(f"{number}. {TEXT}\n" for number in range(200)))
    return {
        "data": None, "name": "recipe",
        "sources": {
            "pile": {"files": [str(folder / "pile.txt")]},
            "p3": {"format": "p3", "files": [str(folder / "p3.jsonl")], "shots": 1, "held_out_percent": 20.0},
        },
        "phases": [
            {"tokens": 1000, "objective": "ul2r", "mixture": {"pile": 1.0}},
            {"objective": last, "mixture": {"p3": 0.25, "pile": 0.75}},
        ],
        "train": {"sequence_length": 64, "batch_sequences": 4, "total_tokens": 100_000},
    }


def moved(state: GlobalState, *, tokens: int) -> GlobalState:
    """As after some rounds."""
    dice = torch.Generator().manual_seed(state.fragment)
    weights = state.weights + 0.05 * torch.randn(state.weights.shape, generator=dice)
    fresh = initial_state(state.fragment, weights, len(state.buffers))
    return dataclasses.replace(fresh, version=3, tokens=tokens)


def make_weights(folder: Path, *, tokens: int = 1234, **changes: Any) -> Weights:
    run, held = make_run(folder, **changes)
    states = [moved(state, tokens=tokens + index) for index, state in held.states.items()]
    return Weights(run, held, states, ["Ada", "Grace"])


def make_home(folder: Path, found: Weights, *, fragments: int | None = None) -> Path:
    """A home folder with one checkpoint, of the first so many fragments or all; returns the run's folder in it."""
    with Home.open(folder) as home:
        run_folder = run_source.remember(found.run, home)
    kept = checkpoint.Checkpoint(found.states[:fragments])
    checkpoint.write(run_folder / "checkpoints", kept, num_fragments=found.run.fragments)
    return run_folder
