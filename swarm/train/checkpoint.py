"""Checkpoints: global state on disk, so that a peer, or a whole swarm that was switched off, comes back.

    runs/RUN_ID/run.json                        the run config, canonical JSON
    runs/RUN_ID/checkpoints/000042/fragment-000.safetensors   weights, buffer-0...; fp32
    runs/RUN_ID/checkpoints/000042/manifest.json              version, tokens, digest of each fragment; hashes of files

A peer that holds some fragments of the run writes just those, and the manifest says which, of how many. Whoever starts
again with other ones takes what it still needs of them; the rest comes from other peers.

Written to a folder beside, synced, then renamed: there is never half a checkpoint under its name. The newest three are
kept and the newest that verifies is loaded; a full disk costs the new checkpoint only. The state's digest is computed
from what was read and compared, so a flipped bit never gets into the swarm.

It holds what is agreed, and where this peer was in its text at that moment. Who leaves has put all it learnt into a
round before, so that nothing is skipped or repeated. After a crash (a kill, the power) two stretches of this peer's
text are not as they should be, together no longer than what it draws in a round and a minute: what was drawn before
the checkpoint and got into no commit is skipped, for drift is in memory only; and what was drawn after it is drawn
again, also where a commit had it. That costs or repeats some rows in one peer's order, and nothing in the swarm's
books: tokens are counted by commits, and a contribution is in exactly one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm.averaging.global_state import GlobalState
from swarm.errors import BadMessage, HomeError, StateError
from swarm.host.home import atomic_write, sync_folder
from swarm.network import records
from swarm.network.records import Head
from swarm.train import state_file

KEPT = 3
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Checkpoint:
    states: list[GlobalState]
    """of the fragments held, in their order in the run"""
    stream: dict[str, Any] = field(default_factory=dict)
    """where this peer was in its data"""


def write(folder: Path, checkpoint: Checkpoint, *, num_fragments: int) -> Path:
    """Write a new checkpoint below `folder`; returns its path. Raises HomeError, with everything older intact.

    `num_fragments`: of the run; a checkpoint may hold fewer.
    """
    sequence = max((int(path.name) for path in _all(folder)), default=0) + 1
    target, temporary = folder / f"{sequence:06d}", folder / f".{sequence:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        manifest: dict[str, Any] = {
            "num_fragments": num_fragments, "fragments": [], "files": {}, "stream": checkpoint.stream,
        }
        for state in checkpoint.states:
            name = f"fragment-{state.fragment:03d}.safetensors"
            manifest["files"][name] = state_file.write(temporary / name, state)
            manifest["fragments"].append({
                "fragment": state.fragment, "version": state.version, "tokens": state.tokens, "digest": state.digest,
            })
        atomic_write(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        os.rename(temporary, target)
        sync_folder(folder)
    except OSError as error:
        what = f"cannot write a checkpoint to {folder}"
        raise HomeError(what, why=str(error), do="make room; training goes on") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _all(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_newest(
    folder: Path, *, numels: Mapping[int, int], num_fragments: int, num_buffers: int,
    warn: Callable[[str], None] = lambda text: None,
) -> Checkpoint | None:
    """The newest checkpoint that is undamaged, fits the run and holds any of these fragments: those of them that it
    holds. None where there is none. `warn` names each bad one.

    `numels`: fragment -> length of its flat vector, of those that this peer holds, of the run's `num_fragments`.
    """
    for path in reversed(_all(folder)):
        try:
            found = _load(path, numels, num_fragments, num_buffers)
        except (StateError, OSError) as error:
            warn(f"checkpoint {path.name} is damaged and was left out: {error}")
        else:
            if found.states:
                return found
    return None


def load(path: Path, *, numels: Mapping[int, int], num_fragments: int, num_buffers: int) -> Checkpoint:
    """This one. Arguments as in `load_newest`. Raises StateError where it is damaged or of another run."""
    try:
        return _load(path, numels, num_fragments, num_buffers)
    except (StateError, OSError) as error:
        raise StateError(f"the checkpoint {path} cannot be used", why=str(error), do="choose another one") from None


def older(
    folder: Path, *, numels: Mapping[int, int], num_fragments: int, num_buffers: int
) -> list[GlobalState]:
    """Of each of these fragments the newest state in any checkpoint, where there is one: a peer may have held other
    ones before. Damaged checkpoints are passed over. Arguments as in `load_newest`."""
    found: dict[int, GlobalState] = {}
    for path in reversed(_all(folder)):
        missing = {index: numel for index, numel in numels.items() if index not in found}
        with contextlib.suppress(StateError, OSError):
            found |= {state.fragment: state for state in _load(path, missing, num_fragments, num_buffers).states}
    return [found[index] for index in sorted(found)]


def _load(path: Path, numels: Mapping[int, int], num_fragments: int, num_buffers: int) -> Checkpoint:
    with open(path / MANIFEST, "rb") as file:
        text = file.read(MAX_MANIFEST_BYTES)
    try:
        manifest = json.loads(text)
        entries, files = manifest["fragments"], dict(manifest["files"])
        heads = [records.parse(Head, {k: e[k] for k in ("version", "tokens", "digest")}) for e in entries]
        indices = [e["fragment"] for e in entries]
        stream, written_of = dict(manifest["stream"]), manifest.get("num_fragments", len(entries))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, BadMessage) as error:
        raise StateError(f"its manifest cannot be read ({error})") from None
    if written_of != num_fragments or not _are_fragments(indices, num_fragments):  # the first ones held all, unsaid
        raise StateError("it does not hold fragments of this run")
    states = []
    for index, head in zip(indices, heads, strict=True):
        if index in numels:
            name = f"fragment-{index:03d}.safetensors"
            if state_file.sha256(path / name) != files.get(name):
                raise StateError(f"{name} does not match its hash")
            states.append(state_file.read(
                path / name, fragment=index, head=head, numel=numels[index], num_buffers=num_buffers
            ))
    return Checkpoint(states, stream)


def _are_fragments(indices: list[Any], num_fragments: int) -> bool:
    """Some of the run's, each once and in order."""
    known = all(type(index) is int and 0 <= index < num_fragments for index in indices)
    return known and len(indices) > 0 and indices == sorted(set(indices))


def _all(folder: Path) -> list[Path]:
    """Checkpoints, oldest first: whole when they were renamed, whatever may have happened to them since."""
    if not folder.is_dir():
        return []
    numbered = (path for path in folder.iterdir() if path.name.isascii() and path.name.isdigit() and path.is_dir())
    return sorted(numbered, key=lambda path: int(path.name))
