"""One fragment's global state in one safetensors file: weights, buffer-0, ...; fp32. Checkpoints and spares are made
of these.

    {"__metadata__": {"fragment": "3", "version": "42", "tokens": "1200000", "digest": "9f86d0...", "roll": "[...]"},
     "weights": ...}

It is written tensor by tensor, so that writing needs no memory, and read through the page cache: a state that was read
takes memory only for what is computed from it. The digest is computed from what was read, and compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from swarm.averaging import roll
from swarm.averaging.global_state import GlobalState
from swarm.errors import BadMessage, StateError
from swarm.host.home import atomic_write
from swarm.network import records
from swarm.network.records import Head

MAX_HEADER_BYTES = 64 * 1024


def file_bytes(numel: int, num_buffers: int) -> int:
    """The most that the file of a state with vectors of `numel` values takes."""
    return 4 * numel * (1 + num_buffers) + MAX_HEADER_BYTES


def write(path: Path, state: GlobalState) -> str:
    """Write a state, whole or not at all; returns the SHA-256 of the file. Raises HomeError."""
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for piece in _pieces(state):
            digest.update(piece)
            yield piece

    atomic_write(path, hashed())
    return digest.hexdigest()


def read(path: Path, *, fragment: int, head: Head, numel: int, num_buffers: int) -> GlobalState:
    """The state in a file, which must be the one with this head and of this shape. Raises StateError, OSError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name}")
    with contextlib.suppress(SafetensorError, OverflowError, MemoryError), safe_open(path, framework="pt") as file:
        names, found = ["weights", *(f"buffer-{i}" for i in range(num_buffers))], set(file.keys())
        if found.issuperset(names):
            weights, *buffers = (file.get_tensor(name) for name in names)
            if all(str(t.dtype) == "torch.float32" and tuple(t.shape) == (numel,) for t in (weights, *buffers)):
                said = (file.metadata() or {}).get("roll", "[]")
                with contextlib.suppress(ValueError, RecursionError, BadMessage):
                    listed = roll.from_json(json.loads(said))
                    state = GlobalState(fragment, head.version, head.tokens, weights, tuple(buffers), listed)
                    if state.digest == head.digest:
                        return state
    raise StateError(f"{path.name} does not hold the state that it should")


def sha256(path: Path) -> str:
    """Of a file's content. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1024 * 1024):
            digest.update(piece)
    return digest.hexdigest()


def head_in(path: Path) -> tuple[int, Head]:
    """(fragment, head) that a file says it holds; reads its first bytes only. Raises StateError, OSError."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, MAX_HEADER_BYTES))
    try:
        said = json.loads(text)["__metadata__"]
        fragment = int(said["fragment"])
        head = {"version": int(said["version"]), "tokens": int(said["tokens"]), "digest": said["digest"]}
        return fragment, records.parse(Head, head)
    except (ValueError, KeyError, TypeError, RecursionError, BadMessage):
        raise StateError(f"{path.name} does not say which state it holds") from None


def _pieces(state: GlobalState) -> Iterator[bytes | memoryview]:
    """The file's content (https://huggingface.co/docs/safetensors: length of the header, header, tensors)."""
    tensors = {"weights": state.weights, **{f"buffer-{i}": buffer for i, buffer in enumerate(state.buffers)}}
    said = {
        "fragment": f"{state.fragment}", "version": f"{state.version}", "tokens": f"{state.tokens}",
        "digest": state.digest,
    }
    if state.roll:
        said["roll"] = roll.canonical(state.roll).decode()
    header: dict[str, object] = {"__metadata__": said}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.detach().contiguous().numpy().data.cast("B")


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder is on, for this user."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
