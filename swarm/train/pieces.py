"""Fragments in this peer's memory, each apart, and the stages that are made of them.

A stage shares its parameters with the pieces, so one that grows or shrinks copies nothing, and what averaging and the
inner optimizer know of a fragment stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from swarm.averaging.global_state import GlobalState
from swarm.averaging.layout import Layout
from swarm.config import RunConfig
from swarm.model.fragments import FragmentSpec, block_of_each, find_blocks, frozen_counts
from swarm.model.partial import join_stages
from swarm.model.skeleton import tensors
from swarm.model.stage import Stage
from swarm.train.run_source import Held, hold, matches_start
from swarm.train.settings import Settings


@dataclass(frozen=True)
class Piece:
    """One fragment."""

    spec: FragmentSpec
    tensors: dict[str, torch.Tensor]
    """parameters and buffers, by name in the whole model"""

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        found = {spec.name: self.tensors[spec.name] for spec in self.spec.tensors}
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.nn.Parameter)}


@dataclass(frozen=True)
class Start:
    """A fragment as this machine draws or reads it, for averaging."""

    layout: Layout
    state: GlobalState
    """at version 0"""
    is_named: bool
    """it is the start that the run config names"""


def build(run: RunConfig, index: int, *, device: torch.device, settings: Settings) -> tuple[Piece, Start]:
    """A fragment at the run's start. Raises ConfigError as `hold` does."""
    held = hold(run, part=(index, index + 1), weights_from=settings.base)
    held.model.to(device)  # type: ignore[arg-type]
    settings.prepare(held.model)
    return split(held)[0], Start(held.layouts[index], held.states[index], matches_start(run, held)[index])


def split(held: Held) -> list[Piece]:
    """What was built at once, fragment by fragment. Parameters that are not trained, and buffers, go with the block
    that they are in; an embedding or head that is frozen as one that is trained; other ones with every piece."""
    prefix, _ = find_blocks(held.model)
    block_of = block_of_each(held.model)
    frozen = frozen_counts(held.model)
    by_name = dict(tensors(held.model))
    trained = {spec.name for fragment in held.fragments for spec in fragment.tensors}
    pieces = []
    for fragment in held.fragments:
        own = {spec.name for spec in fragment.tensors}

        def belongs(name: str, fragment: FragmentSpec = fragment) -> bool:
            if name not in frozen and not name.startswith(prefix + "."):
                return True
            return fragment.blocks[0] <= block_of[name] < fragment.blocks[1]

        found = {name: t for name, t in by_name.items() if name in own or (name not in trained and belongs(name))}
        pieces.append(Piece(fragment, found))
    return pieces


def stage_of(run: RunConfig, pieces: Collection[Piece]) -> Stage:
    """Of consecutive fragments. Takes about as long as making the model's skeleton."""
    blocks = [piece.spec.blocks for piece in pieces]
    values = {name: tensor for piece in pieces for name, tensor in piece.tensors.items()}
    return join_stages(run, (min(first for first, _ in blocks), max(end for _, end in blocks)), values)
