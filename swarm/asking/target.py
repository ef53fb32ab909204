"""TARGET of `python -m swarm.evaluate` and `swarm.chat`: what somebody names on the command line, ready to be asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from swarm.asking import states
from swarm.asking.answerer import Answerer, Manner
from swarm.asking.at_hand import AtHand
from swarm.asking.live import Live
from swarm.asking.manner import CAUSAL, manner_of, run_manner
from swarm.config import RunConfig, run_from_json
from swarm.data.tokenizer import load_tokenizer
from swarm.errors import ConfigError
from swarm.host.device import choose_device
from swarm.model.architecture import architecture
from swarm.model.export import RUN_FILE
from swarm.model.fragments import embedding_rows
from swarm.observer import Observer

SEQUENCE_LENGTH_DEFAULT = 1024
"""of a model that says nothing of its positions"""


@dataclass(frozen=True)
class Target:
    what: str
    """one line for people"""
    answerer: Answerer
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    """rows of its embedding"""
    manner: Manner
    run: RunConfig | None = None
    """None: a model of which nobody says what it was trained on"""
    tokens: int | None = None
    """swarm tokens that it was trained for, where known"""
    folder: Path | None = None
    """of an export"""
    facts: dict[str, Any] = field(default_factory=dict)
    """for --json"""


@contextlib.contextmanager
def opened(
    path: Path | None, *, initial_peers: list[str] | None = None, run_id: str | None = None, base: str | None = None,
    device: str = "auto", join_timeout_s: float = 20.0, say: Callable[[str], None],
) -> Iterator[Target]:
    """`path`: an export (or any model folder in Hugging Face layout), a home, a run's folder or a checkpoint; or else
    `initial_peers` of a live swarm. `device` is for a model at hand; `base` is the folder of the frozen base of a
    checkpoint of adapters. Raises SwarmError."""
    if initial_peers:
        with Observer(initial_peers, run_id=run_id, join_timeout_s=join_timeout_s) as observer:
            yield _live(observer)
        return
    assert path is not None
    folder = path.expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}", why="TARGET is an export, a home folder or a checkpoint",
            do="check the path, or give --initial-peers to ask a live swarm",
        )
    chosen, _ = choose_device(device, 0)
    if not (folder / "config.json").is_file():
        yield _checkpoint(folder, run_id, base, chosen, say)
        return
    if base is not None:
        raise ConfigError(
            "--base is for a home folder or a checkpoint", why=f"{folder} is a model that has its base in it",
            do="leave it out",
        )
    yield _export(folder, chosen)


def _live(observer: Observer) -> Target:
    run = observer.run
    tokenizer, vocabulary = load_tokenizer(run), architecture(run).get_text_config().vocab_size
    return Target(
        f"the live swarm of {run.run_id}", Live(observer), tokenizer, vocabulary,
        run_manner(run, tokenizer, vocabulary), run, facts={"run_id": run.run_id},
    )


def _checkpoint(
    folder: Path, run_id: str | None, base: str | None, device: torch.device, say: Callable[[str], None]
) -> Target:
    found = states.from_folder(folder, run_id=run_id, base=base, say=say)
    run, model = found.run, _on(found.model(), device)
    tokenizer, vocabulary = load_tokenizer(run), embedding_rows(model)
    return Target(
        f"a checkpoint of {run.run_id} after {found.tokens:,} tokens", AtHand(model), tokenizer, vocabulary,
        run_manner(run, tokenizer, vocabulary), run, found.tokens,
        facts={"run_id": run.run_id, "trained_tokens": found.tokens, "digests": [s.digest for s in found.states]},
    )


def _export(folder: Path, device: torch.device) -> Target:
    model, tokenizer = load_export(folder)
    vocabulary, run = embedding_rows(model), run_of_export(folder)
    if run is None:
        config = model.config.get_text_config()
        length = getattr(config, "max_position_embeddings", None) or SEQUENCE_LENGTH_DEFAULT
        manner = manner_of(tokenizer, sequence_length=length, objective=CAUSAL, vocabulary=vocabulary)
    else:
        manner = run_manner(run, tokenizer, vocabulary)
    return Target(
        f"the model in {folder}", AtHand(_on(model, device)), tokenizer, vocabulary, manner, run, folder=folder,
        facts={"folder": str(folder.resolve()), **({} if run is None else {"run_id": run.run_id})},
    )


def _on(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    moved: Any = model
    found: PreTrainedModel = moved.to(device)
    return found


def load_export(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As anybody would load it, without any code of ours. Raises ConfigError."""
    path = str(folder.expanduser())
    try:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        if len(tokenizer) < 2 or tokenizer.eos_token_id is None:  # what transformers makes where there are no files
            raise ValueError("there is no tokenizer in it that has an end-of-text token")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"cannot load the model in {folder}", why=(str(error) or type(error).__name__).splitlines()[0],
            do="give a folder that scripts/export.py or save_pretrained has written, the tokenizer's files in it too",
        ) from None
    return model, tokenizer


def run_of_export(folder: Path) -> RunConfig | None:
    """None: it was not exported by us, or before run configs were put beside the model. Raises ConfigError."""
    file = folder / RUN_FILE
    return run_from_json(file.read_bytes()) if file.is_file() else None
