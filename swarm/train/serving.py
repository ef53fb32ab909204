"""A peer's place in the chain, put together: what others may send it, and what it sends on.

Peers that hold the whole model serve as well: between two microbatches of their own they do what others have sent, so
that whoever holds only the first fragments has somebody to go on with.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from swarm.averaging.averager import Averager
from swarm.config import RunConfig
from swarm.data.text_stream import TextStream, drawn
from swarm.events import Warning
from swarm.network.network import Network
from swarm.pipeline import calls, wire
from swarm.pipeline.chain import Chain
from swarm.pipeline.compute import StageCompute
from swarm.pipeline.onward import Shape
from swarm.pipeline.origin import Origin
from swarm.pipeline.routing import Router
from swarm.pipeline.work import WorkQueue
from swarm.train.boundary import Boundary
from swarm.train.optimizers import Optimizers
from swarm.train.run_source import Held
from swarm.train.stage_steps import StageSteps

PIECES = 4
"""microbatches in the batch of one inner step"""
CREDIT = 32
"""own microbatches under way, at most"""
FORGET_EVERY_S = 10.0
NUMBERS_A_MS = 1000
"""microbatches are numbered from the clock on, so that a peer that starts again uses none twice"""


@dataclass
class Serving:
    """On the training thread: `work`, `compute`, `steps`; on the network's: `chain`, `new_origin`."""

    work: WorkQueue
    compute: StageCompute
    steps: StageSteps
    chain: Chain
    new_origin: Callable[[TextStream, Callable[[float, int], None]], Origin]
    """of own microbatches, drawn from a stream, for a peer that has come to serve the first fragment; it is told their
    loss and tokens as they are done"""
    boundary: Boundary

    def pause(self) -> None:
        """Between two microbatches of a whole peer: rounds get at the weights, and what others have sent is done, as
        much as is there now, so that nobody can stop this peer's own training."""
        self.boundary.pass_by()
        self.work.run_waiting(self.boundary.pass_by)
        if self.steps.sync:  # others wait for what they sent; the gradient of this peer's own batch is not touched
            self.steps.take_due()


async def serve(
    run: RunConfig, held: Held, inner: Optimizers, averager: Averager, network: Network, boundary: Boundary, *,
    in_flight: int,
) -> Serving:
    """On the network's thread. From now on others may send microbatches here. `in_flight`: microbatches that there is
    room for at once."""
    first, end = held.fragments[0].index, held.fragments[-1].index + 1
    work = WorkQueue()
    compute = StageCompute(held.stage, {f.index: f for f in held.fragments}, inner.parameters)
    averager.context.before_write = compute.before_write
    compute.pieces.warn = lambda text: averager.context.emit(Warning(text))
    link_calls = calls.LinkCalls(network.endpoint, network.directory)
    config = held.model.config.get_text_config()
    bits, back_bits = wire.bits_of(run)

    def is_ready(start: int, end: int, version: int) -> bool:
        return all(s.version >= version for s in averager.states() if start <= s.fragment < end)

    chain = Chain(
        network.peer_id, link_calls, work, compute,
        Router(clock=asyncio.get_running_loop().time, rng=random.Random()),
        shape=Shape.of(run, hidden=config.hidden_size, vocabulary=config.vocab_size), first=first, end=end,
        max_in_flight=in_flight, holders=lambda: calls.holders(network.directory.alive()), bits=bits,
        back_bits=back_bits, is_ready=is_ready,
        is_alive=lambda peer_id: peer_id in network.directory.alive(),
    )

    def new_origin(stream: TextStream, on_done: Callable[[float, int], None]) -> Origin:
        return Origin(
            network.peer_id, chain, link_calls, draw=lambda: drawn(stream, microbatch_sequences(run)),
            first_number=int(time.time() * 1000) * NUMBERS_A_MS, largest_credit=chain.max_in_flight, on_done=on_done,
        )

    steps = StageSteps(
        run, inner, compute, averager, announce=lambda: network.submit(averager.announce())
    )
    calls.serve(chain, network.endpoint)
    averager.context.spawn(_tidy_forever(chain))  # ends with the averager, as the peer does
    return Serving(work, compute, steps, chain, new_origin, boundary)


async def _tidy_forever(chain: Chain) -> None:
    """Of whole peers as well: what dead origins have left would fill a peer until it took nothing more."""
    while True:
        await asyncio.sleep(FORGET_EVERY_S)
        await chain.forget_old()


def microbatch_sequences(run: RunConfig) -> int:
    return max(1, run.train.batch_sequences // PIECES)
