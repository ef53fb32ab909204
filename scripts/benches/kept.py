"""What a long benchmark has found so far, in a folder beside its JSON file: asked for again after it was interrupted,
it goes on where it was. One file a result, named by a hash of all that the result depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from swarm.host.home import atomic_write


class Kept:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def figures(self, key: str) -> dict[str, Any] | None:
        """What `keep` was given under this key; None: nothing yet."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self._file(key, "json").read_text())
            return dict(found["figures"]) if found["key"] == key else None
        return None

    def keep(self, key: str, figures: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": key, "figures": figures}, indent=1)
        atomic_write(self._file(key, "json"), text.encode())

    def weights(self, key: str) -> dict[int, torch.Tensor] | None:
        """fragment -> fp32 [numel], as `keep_weights` was given them."""
        with contextlib.suppress(OSError, SafetensorError):
            return {int(name): values for name, values in load_file(self._file(key, "safetensors")).items()}
        return None

    def keep_weights(self, key: str, weights: dict[int, torch.Tensor]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._file(key, "partial")
        save_file({f"{index}": values for index, values in weights.items()}, partial)
        partial.rename(self._file(key, "safetensors"))

    def _file(self, key: str, ending: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.{ending}"
