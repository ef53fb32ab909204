"""Reading a part of a checkpoint: the tensors that a peer holds, and no other byte.

A checkpoint is safetensors in Hugging Face layout, in one file or several with an index, in a folder or on the hub.
Its names are not always the model's (GPT-NeoX: `embed_out` is the head), and some families store a tensor in pieces
(each expert on its own): both follow the library's own conversion mapping, as its loader applies it. From the hub come
only the files that hold something needed. All that is read ends as fp32.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from swarm.errors import ConfigError
from swarm.model.architecture import do_not_fit, hub_error, is_folder, one_line

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """Where each tensor of a checkpoint is. Nothing is read but the names, nothing downloaded but the index."""

    def __init__(self, source: str, *, revision: str | None = None) -> None:
        """`source`: a folder or a hub id. Raises ConfigError where there are no safetensors, or they are broken."""
        self.source = source
        self._folder = Path(source).expanduser() if is_folder(source) else None
        self._revision = revision
        self.file_of: dict[str, str] = {}
        """name in the file -> name of the file"""
        self._unreachable: Exception | None = None
        if (one := self._find(ONE)) is not None:  # the library's order
            with self._open(one) as file:
                self.file_of = dict.fromkeys(file.keys(), ONE)
        elif (index := self._find(INDEX)) is not None:
            self.file_of = _read_index(index)
        else:
            raise self._not_found(
                f"{source} cannot be read in parts", why=f"it has neither {ONE} nor {INDEX}",
                do="convert it: load it with transformers once, and save_pretrained it",
            )  # fmt: skip

    def open(self, name: str, stack: ExitStack) -> Any:
        """The open file `name`, downloaded first where it is on the hub. Raises ConfigError."""
        path = self._find(name)
        if path is None:
            raise self._not_found(
                f"cannot load the weights of {self.source}", why=f"{name} is in its index and not there",
                do="download the model again",
            )  # fmt: skip
        return stack.enter_context(self._open(path))

    def _open(self, path: Path) -> Any:
        try:
            # pread: memory of our own, and no page of the file that was not asked for
            return safe_open(path, framework="pt", device="cpu", backend="pread")
        except (OSError, SafetensorError) as error:
            raise _broken(self.source, error) from None

    def _find(self, name: str) -> Path | None:
        if self._folder is not None:
            return self._folder / name if (self._folder / name).is_file() else None
        try:
            return Path(hf_hub_download(self.source, name, revision=self._revision))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # not in the cache, and the hub cannot be asked
                self._unreachable = error
            return None
        except (OSError, ValueError) as error:
            raise hub_error(self.source, error) from None


    def _not_found(self, what: str, *, why: str, do: str) -> ConfigError:
        if self._unreachable is not None:
            return hub_error(self.source, self._unreachable)
        return ConfigError(what, why=why, do=do)


class _Part(NamedTuple):
    """What one or several tensors of the model are made of."""

    converter: Any
    """None: stored as it is"""
    keys: list[tuple[str, str]]
    """(name in the file, the converter's pattern that it matched)"""


def read(
    checkpoint: Checkpoint, whole: PreTrainedModel, names: Collection[str], *, tied: tuple[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """The values of these tensors of a model, fp32 (what is not floating point as it is), by name.

    `whole`: the model's skeleton, not cut. `tied`: see `Skeleton`; either is read for the other where it is missing.
    Buffers that the library keeps in no file are left out, like all that it says may be missing.
    Raises ConfigError: a tensor is missing or has another shape, broken files, a family that cannot be read in parts.
    """
    stored: dict[str, torch.Tensor] = whole.state_dict(keep_vars=True)
    aliases = _aliases(stored, tied)
    part_of = _parts(checkpoint.file_of, whole, stored)
    may_miss = [re.compile(pattern) for pattern in whole._keys_to_ignore_on_load_missing or ()]
    found: dict[str, torch.Tensor] = {}
    wrong = []
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for name in sorted(set(names) & stored.keys(), key=dot_natural_key):
            if name in found:
                continue
            at = next((alias for alias in [name, *aliases[name]] if alias in part_of), None)
            if at is not None:
                part = part_of[at]
                for file in {checkpoint.file_of[key] for key, _ in part.keys} - files.keys():
                    files[file] = checkpoint.open(file, stack)
                values = _values(part, at, files, checkpoint, whole)
                found |= {key: tensor for key, tensor in values.items() if key in names and key != at}
                if at in values and values[at].shape == stored[name].shape:
                    found[name] = values[at]
                    continue
            elif any(pattern.search(name) for pattern in may_miss):
                continue
            wrong.append(name)
    wrong += [name for name, tensor in found.items() if tensor.shape != stored[name].shape]
    if wrong:
        raise do_not_fit(checkpoint.source, wrong)
    return found


def _values(
    part: _Part, name: str, files: dict[str, Any], checkpoint: Checkpoint, whole: PreTrainedModel
) -> dict[str, torch.Tensor]:
    def fetch(key: str) -> torch.Tensor:
        tensor: torch.Tensor = files[checkpoint.file_of[key]].get_tensor(key)
        return tensor.float() if tensor.is_floating_point() else tensor

    try:
        if part.converter is None:
            return {name: fetch(part.keys[0][0])}
        converter = copy.deepcopy(part.converter)
        for key, pattern in part.keys:
            converter.add_tensor(name, key, pattern, fetch(key))
        made = converter.convert(name, model=whole, config=whole.config)
    except (OSError, SafetensorError) as error:
        raise _broken(checkpoint.source, error) from None
    except Exception as error:  # the library's conversions raise whatever comes up
        raise ConfigError(
            f"a {whole.config.model_type} checkpoint cannot be read in parts",
            why=f"{name} is made of several tensors in a way that needs more than those: {one_line(error)}",
            do="hold the whole model (--fragments with all of them), or use another family",
        ) from None
    return {key: values[0] if isinstance(values, list) else values for key, values in made.items()}


def _parts(keys: Iterable[str], whole: PreTrainedModel, stored: dict[str, torch.Tensor]) -> dict[str, _Part]:
    """Name in the model -> what it is made of. As in the library's convert_and_load_state_dict_in_model."""
    mapping = get_model_conversion_mapping(whole)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = whole.base_model_prefix
    parts: dict[str, _Part] = {}
    for key in sorted(keys, key=dot_natural_key):  # the order matters to renamings that depend on each other
        name, pattern = rename_source_key(key, renamings, converters, prefix, stored)
        if name not in stored and key in stored:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=stored)
        if name not in stored:
            continue
        if pattern is None:
            parts.setdefault(name, _Part(None, [(key, key)]))
            continue
        converter = converter_of[pattern]
        part = parts.setdefault(name, _Part(converter, []))
        part.keys.append((key, pattern))
        for target in converter.target_patterns[1:]:  # one stored tensor that becomes several
            parts.setdefault(name.replace(converter.target_patterns[0], target), part)
    return parts


def _aliases(stored: dict[str, torch.Tensor], tied: tuple[str, str] | None) -> dict[str, list[str]]:
    """For each name the others under which a file may hold the same values."""
    names: dict[torch.Tensor, list[str]] = {}
    for name, tensor in stored.items():
        names.setdefault(tensor, []).append(name)
    if tied is not None:
        both = names[stored[tied[0]]] + names[stored[tied[1]]]
        names[stored[tied[0]]] = names[stored[tied[1]]] = both
    return {name: [other for other in names[tensor] if other != name] for name, tensor in stored.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
            raise ValueError("a file outside the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no index of weights", why=one_line(error), do="download the model again"
        ) from None
    return dict(weight_map)


def _broken(source: str, error: Exception) -> ConfigError:
    return ConfigError(f"cannot load the weights of {source}", why=one_line(error), do="check the files")
