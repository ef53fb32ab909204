"""A trained model as a plain Hugging Face folder, to be used without any code of ours.

Written beside its place and then renamed: a crash or a full disk never leaves half a model under the name that
somebody will load. An earlier export is replaced; anything else is not touched.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from swarm.errors import ConfigError, HomeError

MARKER = ".swarm-export"
"""lists the files we wrote: what makes a folder ours to replace"""
RUN_FILE = "run.json"
MAX_SHARD_BYTES = 5_000_000_000


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES,
    more_files: Mapping[str, bytes] = {},
) -> None:
    """Write config.json, the weights, generation_config.json and the tokenizer's files to `folder`.

    The weights are model.safetensors, or, of more than `max_shard_bytes`, model-00001-of-0000N.safetensors with index.
    `AutoModelForCausalLM.from_pretrained(folder)` then gives bit-identical logits. The model must not be trained
    meanwhile. `more_files`: name -> content, such as the model card.
    Raises ConfigError where `folder` holds anything but an earlier export, HomeError where it cannot be written.
    """
    folder = folder.expanduser().resolve()
    check_replaceable(folder)
    fresh, old = (folder.parent / f".{folder.name}.{word}-{os.getpid()}" for word in ("new", "old"))
    try:
        _remove(fresh)
        fresh.mkdir(parents=True)
        model.save_pretrained(fresh, max_shard_size=max_shard_bytes)
        tokenizer.save_pretrained(fresh)
        _for_use(fresh, tokenizer)
        for name, content in more_files.items():
            (fresh / name).write_bytes(content)
        names = sorted(path.name for path in fresh.iterdir())
        (fresh / MARKER).write_text("\n".join(names) + "\n", encoding="utf-8")
        if folder.exists():
            _remove(old)
            folder.rename(old)
        fresh.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise HomeError(
            f"cannot write the model to {folder}",
            why=str(error.strerror or error),
            do="check permissions and free space",
        ) from None
    finally:
        _remove(fresh)
    _remove(old)


def check_replaceable(folder: Path) -> None:
    """Raises ConfigError where `folder` holds anything but an earlier export. Worth asking before a long download."""
    if not folder.exists():
        return
    what, do = f"{folder} is not an earlier export: not overwritten", "choose another folder, or empty this one first"
    if not folder.is_dir():
        raise ConfigError(what, why="it is a file", do=do)
    present = {path.name for path in folder.iterdir()}
    if not present:
        return
    if MARKER not in present:
        raise ConfigError(what, why=f"it holds {', '.join(sorted(present)[:3])}", do=do)
    ours = {MARKER, *(folder / MARKER).read_text(encoding="utf-8").splitlines()}
    if present - ours:
        raise ConfigError(
            f"{folder} holds files that were added after its export: not overwritten",
            why=", ".join(sorted(present - ours)[:3]),
            do="move them elsewhere, or choose another folder",
        )


def with_names(tokenizer: PreTrainedTokenizerBase, names: Mapping[int, str]) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` in which these tokens have names: rows of the model's vocabulary that no text uses, which
    the run has taken for marks of its own (UL2's modes and sentinels). Tokens that have a name already keep it, and
    so do those that do not follow on what the tokenizer has: no library gives out ids with holes between them."""
    named = copy.deepcopy(tokenizer)
    for token in sorted(names):
        if token == len(named):
            named.add_tokens([AddedToken(names[token], special=True, normalized=False)], special_tokens=True)
    return named


def _for_use(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Undo what is right in training only, in the files and not in the live model."""
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    for path in (folder / "config.json", folder / "generation_config.json"):
        if not path.exists():
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        values["use_cache"] = True
        # documents were parted by the tokenizer's token; a class default (50256 for GPT-J, whatever the vocabulary)
        # would let generate() run on for ever. A list is somebody's choice: chat models stop at several tokens
        for key, token in (("eos_token_id", eos), ("bos_token_id", bos)):
            if not isinstance(values.get(key), list):
                values[key] = token
        if path.name == "generation_config.json" and values.get("pad_token_id") is None:
            values["pad_token_id"] = eos  # else generate() says on every call that it does the same
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
