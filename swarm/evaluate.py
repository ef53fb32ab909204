"""Asking a swarm's model through its chain, from outside: its loss on a text, and what it writes.

What scripts/evaluate.py and scripts/generate.py are made of. Nobody needs to hold the model, neither who asks nor any
peer: an observer asks holders of the first fragment, and they the next ones (pipeline/guest.py). Peers answer with the
weights that they are training at that moment, which have drifted a little from the global ones that an export has.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator

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


class Asker:
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
    ) -> float:
        """Mean loss in nats a token, as `held_out_loss` of a model at hand. `batch`: at least one row, of 2 tokens to
        the run's sequence_length. `on_progress(sequences done, of how many)`: on the network's thread.
        """
        return self._network.run(self._loss(batch, on_progress))

    def write(
        self, ids: list[int], *, choose: Callable[[torch.Tensor], int], end: int, max_tokens: int
    ) -> Iterator[int]:
        """What comes after the tokens `ids` (at least one), token by token, until `end` (not included) or `max_tokens`.

        `choose`: picks a token by the logits [vocabulary] of the last position. The whole text is sent again for each
        token; of one longer than the run's sequence_length, the end.
        """
        text = list(ids)
        for _ in range(max_tokens):
            tokens = torch.tensor([text[-self._run.train.sequence_length:]])
            logits = self._network.run(self._guest.logits(Batch(tokens)))
            token = choose(logits[0, -1])
            if token == end:
                return
            text.append(token)
            yield token

    async def _start(self) -> Guest:
        network, (bits, back_bits) = self._network, wire.bits_of(self._run)
        guest = Guest(
            network.peer_id, calls.LinkCalls(network.endpoint, network.directory),
            Router(clock=asyncio.get_running_loop().time, rng=random.Random()), shape=self._shape,
            holders=lambda: calls.holders(network.directory.alive()), bits=bits, back_bits=back_bits,
        )
        calls.listen(guest.onward, network.endpoint)
        return guest

    async def _loss(self, whole: Batch, on_progress: Callable[[int, int], None]) -> float:
        room = asyncio.Semaphore(UNDER_WAY)
        done = 0

        async def part(batch: Batch) -> tuple[float, int]:
            nonlocal done
            async with room:
                loss = await self._guest.loss(batch)
            done += len(batch)
            on_progress(done, len(whole))
            return loss, batch.num_targets

        batches = whole.split(microbatch_sequences(self._run))
        parts = [asyncio.ensure_future(part(batch)) for batch in batches]
        try:
            return mean_loss(await asyncio.gather(*parts))
        finally:
            for task in parts:
                task.cancel()
