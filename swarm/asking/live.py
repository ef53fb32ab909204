"""A live swarm as an answerer: asked through its chain, from outside.

Nobody needs to hold the model, neither who asks nor any peer: an observer asks holders of the first fragment, and they
the next ones (pipeline/guest.py). Peers answer with the weights that they are training at that moment, which have
drifted a little from the global ones that an export has. Whoever holds the first or the last fragment sees the text.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import torch

from swarm.data.batch import Batch
from swarm.model.architecture import architecture
from swarm.model.evaluate import mean_loss
from swarm.observer import Observer
from swarm.pipeline import calls, wire
from swarm.pipeline.guest import Guest
from swarm.pipeline.onward import Shape
from swarm.pipeline.routing import Router
from swarm.train.serving import microbatch_sequences

UNDER_WAY = 4
"""microbatches at once: the stages work on different ones"""


class Live:
    """The model of an observer's swarm. Its methods raise StateError where a fragment has no holder, NetworkError where
    those that there are do not answer."""

    def __init__(self, observer: Observer) -> None:
        """Waits for the statuses of those who are there. Raises ConfigError where the run's architecture is not known
        here."""
        self._run, self._network = observer.run, observer.network
        config = architecture(self._run).get_text_config()
        self._shape = Shape.of(self._run, hidden=config.hidden_size, vocabulary=config.vocab_size)
        observer.ask_everybody()
        self._guest = self._network.run(self._start())

    def loss(
        self, batch: Batch, *, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[float, int]:
        return self._network.run(self._loss(batch, on_progress)), batch.num_targets

    def next_logits(self, ids: Sequence[int], *, prefix: int = 0) -> torch.Tensor:
        """The whole text travels for each token: peers keep nothing of it."""
        segments = (((prefix, len(ids)),),) if prefix else None
        logits = self._network.run(self._guest.logits(Batch(torch.tensor([list(ids)]), segments)))
        return logits[0, -1]

    async def _start(self) -> Guest:
        network, (bits, back_bits) = self._network, wire.bits_of(self._run)
        guest = Guest(
            network.peer_id, calls.LinkCalls(network.endpoint, network.directory),
            Router(clock=asyncio.get_running_loop().time, rng=random.Random()), shape=self._shape,
            holders=lambda: calls.holders(network.directory.alive()), bits=bits, back_bits=back_bits,
        )
        calls.listen(guest.onward, network.endpoint)
        return guest

    async def _loss(self, batch: Batch, on_progress: Callable[[int, int], None]) -> float:
        room = asyncio.Semaphore(UNDER_WAY)
        done = 0

        async def ask(part: Batch) -> tuple[float, int]:
            nonlocal done
            async with room:
                loss = await self._guest.loss(part)
            done += len(part)
            on_progress(done, len(batch))
            return loss, part.num_targets

        size = microbatch_sequences(self._run)
        parts = [asyncio.ensure_future(ask(part)) for part in batch.split(size) if part.num_targets]
        try:
            return mean_loss(await asyncio.gather(*parts))
        finally:
            for task in parts:
                task.cancel()
