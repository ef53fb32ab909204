"""A guest: asks the chain what the model says of a text, and holds no fragment itself.

It sends token ids to a holder of the first fragment, and gets a loss or logits from there; in between its question
travels as a microbatch does (chain.py), but nothing is learnt from it, and it comes last everywhere (work.py,
admission.py). What is asked are the weights that each peer of the path is training at that moment.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

from swarm.data.batch import Batch
from swarm.errors import NetworkError, StateError
from swarm.pipeline import admission, wire
from swarm.pipeline.messages import Bits, Gradient, Microbatch
from swarm.pipeline.onward import AGAIN_S, Calls, Handover, Onward, Shape
from swarm.pipeline.routing import Holder, Router

GAP_S = 10.0
"""a fragment may be without a holder for so long: peers come back, and statuses may be a moment old"""
PATIENCE_S = 120.0
"""a question is asked again for so long, such as where peers have too many of them"""


class Guest:
    """Lives on the network's event loop."""

    def __init__(
        self, me: str, calls: Calls, router: Router, *, shape: Shape, holders: Callable[[], Sequence[Holder]],
        bits: Bits, back_bits: Bits,
    ) -> None:
        """`holders`: the peers that are alive; `bits`, `back_bits`: as the run has them (wire.bits_of)."""
        self.onward = Onward(me, calls, router, shape=shape, holders=holders, bits=bits, back_bits=back_bits)
        self.shape = shape
        self._me, self._holders = me, holders
        self._numbers = itertools.count()

    async def loss(self, batch: Batch) -> float:
        """Mean loss (nats a token) over the targets of a batch. Raises StateError where a fragment has no holder,
        NetworkError where the holders do not answer, BadMessage where it is more text than a microbatch may have."""
        answer, _ = await self._ask(self._microbatch(batch, logits=0), batch)
        return answer.loss

    async def logits(self, batch: Batch, *, positions: int = 1) -> torch.Tensor:
        """fp32 [sequences, positions, vocabulary] of the last positions of each row. Raises as `loss` does, and
        BadMessage where they are more than an answer may hold. What a text is to begin with as the model was trained
        (its tokens see each other) is the prefix of its segment."""
        microbatch = self._microbatch(batch, logits=positions)
        _, body = await self._ask(microbatch, batch)
        return wire.decode_logits(body, microbatch, vocabulary=self.shape.vocabulary)

    async def stop(self) -> None:
        await self.onward.stop()

    def _microbatch(self, batch: Batch, *, logits: int) -> Microbatch:
        return Microbatch(
            origin=self._me, number=next(self._numbers), start=0, sequences=len(batch), length=batch.tokens.shape[1],
            train=False, logits=logits, segments=batch.num_segments,
        )

    async def _ask(self, microbatch: Microbatch, batch: Batch) -> tuple[Gradient, bytes]:
        admission.check(microbatch, (), shape=self.shape, max_in_flight=1, me=self._me)
        clock = asyncio.get_running_loop().time
        body = wire.encode_batch(batch, vocabulary=self.shape.vocabulary)
        began = complete_at = clock()
        while True:
            missing = gaps(self._holders(), self.shape.num_fragments)
            if not missing:
                try:
                    return await self.onward.rest(Handover(microbatch), body)
                except NetworkError as error:
                    complete_at = clock()
                    if complete_at - began > PATIENCE_S:
                        raise NetworkError(
                            "the swarm did not answer", why=str(error),
                            do="try again later; scripts/monitor.py shows who is there",
                        ) from None
            elif clock() - complete_at > GAP_S:
                raise StateError(
                    f"nobody here holds fragment {', '.join(map(str, missing))}",
                    why="without it the model cannot be asked anything",
                    do="ask somebody to join with it (--fragments A:B); scripts/monitor.py shows who holds what",
                )
            await asyncio.sleep(AGAIN_S)


def gaps(holders: Iterable[Holder], num_fragments: int) -> list[int]:
    """Fragments that nobody holds."""
    held = {index for holder in holders for index in range(holder.first, holder.end)}
    return [index for index in range(num_fragments) if index not in held]
