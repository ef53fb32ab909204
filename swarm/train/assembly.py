"""A trainer and what belongs to it, put together: of the whole model, or of a part of it that may change."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch

from swarm.averaging.averager import Averager
from swarm.config import RunConfig
from swarm.data.text_stream import TextStream
from swarm.events import Event, Warning
from swarm.network.network import Network
from swarm.pipeline.snapshot import Stage
from swarm.train.boundary import Boundary
from swarm.train.inner import InnerOptimizer
from swarm.train.mover import Mover, Parts
from swarm.train.optimizers import Optimizers
from swarm.train.pieces import split
from swarm.train.place import Place
from swarm.train.run_source import Held
from swarm.train.serving import Serving, serve
from swarm.train.stage_trainer import StageTrainer
from swarm.train.trainer import Trainer


@dataclass(frozen=True)
class Assembly:
    trainer: Trainer | StageTrainer
    mover: Mover | None
    """None: the whole model is held"""


def assemble(
    run: RunConfig, held: Held, place: Place, averager: Averager, network: Network, boundary: Boundary, *,
    device: torch.device, stream: TextStream | None, load_stream: Callable[[], Awaitable[TextStream]],
    may_move: bool, emit: Callable[[Event], None],
) -> Assembly:
    """`held`: what was built and brought level, all of the target or the first fragment of it; of a part, it keeps
    nothing in memory that is let go of later, so the caller should not either. `may_move`: to where the swarm needs it
    more."""
    def warn(text: str) -> None:
        emit(Warning(text))

    bits = place.planner.settings.optimizer_bits
    if len(held.fragments) == run.fragments:
        assert stream is not None
        serving: Serving
        inner = InnerOptimizer(
            held.model, held.fragments, run, between=lambda: serving.pause(), warn=warn, optimizer_bits=bits
        )
        serving = network.run(serve(run, held, inner, averager, network, boundary, in_flight=place.in_flight))
        return Assembly(Trainer(run, inner, stream, averager, network, boundary, serving), None)
    optimizers, pieces = Optimizers(run, warn=warn, bits=bits), split(held)
    for piece in pieces:
        optimizers.add(piece.spec, piece.parameters)
    serving = network.run(serve(run, held, optimizers, averager, network, boundary, in_flight=place.in_flight))
    trainer = StageTrainer(run, serving, averager, network, stream=stream)
    parts = Parts(
        run, device, place.planner, averager, optimizers, serving, trainer, network.directory, load_stream, emit
    )
    now: Stage = held.fragments[0].index, held.fragments[-1].index + 1
    mover = Mover(network.peer_id, parts, pieces, serving=now, target=place.part, may_move=may_move)
    return Assembly(trainer, mover)
