"""The baseline of `bench.py pipeline`: hub and spoke, as in SWARM (arXiv 2301.11913) and Petals (arXiv 2209.01188).

The origin's machine has the first stage and drives each of the others itself: it sends activations to a stage, gets
what comes out, sends that to the next; then the same way back, where a stage gets its input again beside the gradient,
because it keeps nothing: it computes the forward once more. So 5(S-1) activations cross the hub's line for S stages,
3(S-1) of them upwards. Like Petals' client the hub has the head, so the last stage is like the others (where that stage
had it, as SWARM's has, 2 of 15 would be saved); emulated computing (emulated.py) makes the head free.

Everything else is the product's: endpoint, codec, compute thread. The hub does not decode what it passes on.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from swarm.data.batch import Batch
from swarm.errors import NetworkError
from swarm.network import records
from swarm.network.endpoint import Endpoint
from swarm.network.link import Answer, Link
from swarm.network.records import Strict
from swarm.pipeline import wire
from swarm.pipeline.calls import MAX_BODY_BYTES
from swarm.pipeline.chain import Chain
from swarm.pipeline.onward import AGAIN_S
from swarm.pipeline.routing import Holder
from swarm.pipeline.work import BACKWARD, FORWARD, OWN, VERDICT, Done

BITS = 8
CALL_S = 120.0


class Asked(Strict):
    """The body: token ids are not needed, so it is values, or values and then their output's gradient."""

    number: Annotated[int, Field(ge=0, le=2**53)]
    start: Annotated[int, Field(ge=0, lt=256)]
    end: Annotated[int, Field(ge=1, le=256)]
    sequences: Annotated[int, Field(ge=1, le=4096)]
    length: Annotated[int, Field(ge=2, le=2**20)]


def serve(chain: Chain, endpoint: Endpoint) -> None:
    """A stateless stage: it computes for whoever asks. In place of the chain's own calls."""
    compute, work, hidden = chain._compute, chain._work, chain.shape.hidden

    def split(asked: Asked, body: bytes) -> list[torch.Tensor]:
        shape = asked.sequences, asked.length, hidden
        size = wire.values_bytes(shape, BITS)
        return [wire.decode_values(body[at:at + size], shape, BITS) for at in range(0, len(body), size)]

    async def on_forward(link: Link, header: dict[str, Any], body: bytes) -> Answer:
        asked = records.parse(Asked, header)

        def forward() -> bytes:
            (values,) = split(asked, body)
            tokens = asked.sequences * asked.length
            key = asked.number, asked.start
            left = compute.forward(key, values, start=asked.start, end=asked.end, tokens=tokens, keep=False)
            return wire.encode_values(left, BITS)

        return {}, (await chain._work(forward, urgency=FORWARD)).value

    async def on_backward(link: Link, header: dict[str, Any], body: bytes) -> Answer:
        asked = records.parse(Asked, header)

        def backward() -> bytes:
            values, gradient = split(asked, body)
            key, tokens = (asked.number, asked.start), asked.sequences * asked.length
            compute.forward(key, values, start=asked.start, end=asked.end, tokens=tokens)
            back = compute.backward(key, gradient)
            assert back is not None
            compute.commit(key)
            chain.on_committed(asked.start, asked.end)
            return wire.encode_values(back, BITS)

        return {}, (await work(backward, urgency=BACKWARD)).value

    endpoint.on("hub_forward", on_forward, max_body=MAX_BODY_BYTES)
    endpoint.on("hub_backward", on_backward, max_body=MAX_BODY_BYTES)


class Hub:
    """Has the face of `Origin`. `in_flight`: microbatches under way, each number for `each_s` seconds, the last one for
    ever: the baseline is to have its best."""

    in_flight: Sequence[int] = (8,)
    each_s = 10.0
    on_done: Callable[[int, int], None] = lambda number, in_flight: None
    """number of a microbatch, and how many were meant to be under way"""

    def __init__(
        self, me: str, chain: Chain, calls: Any, *, draw: Callable[[], Awaitable[Batch]], first_number: int,
        largest_credit: int, on_done: Callable[[float, int], None],
    ) -> None:
        self._me, self._chain, self._calls, self._draw, self._done = me, chain, calls, draw, on_done
        self._number = first_number
        self._outstanding: defaultdict[str, int] = defaultdict(int)

    async def run(self, *, until: Callable[[], bool]) -> None:
        running: set[asyncio.Task[None]] = set()
        began: float | None = None
        while not until():
            if not all(self._able(start, ()) for start in range(self._chain.end, self._chain.shape.num_fragments)):
                await asyncio.sleep(AGAIN_S)
                continue
            began = time.monotonic() if began is None else began
            now = self.in_flight[min(int((time.monotonic() - began) / self.each_s), len(self.in_flight) - 1)]
            while len(running) < now:
                running.add(asyncio.ensure_future(self._one((await self._draw()).tokens, now)))
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        if running:
            await asyncio.wait(running)

    async def _one(self, tokens: torch.Tensor, in_flight: int) -> None:
        chain, number = self._chain, self._number
        self._number += 1
        compute, key, last = chain._compute, number, chain.shape.num_fragments

        def forward() -> bytes:
            left = compute.forward(key, tokens, start=0, end=chain.end, tokens=tokens.numel())
            return wire.encode_values(left, BITS)

        first: Done[bytes] = await chain._work(forward, urgency=OWN)
        values, start = first.value, chain.end
        went: list[tuple[int, int, bytes]] = []
        while start < last:
            came, end = await self._ask("hub_forward", tokens, number, start, values)
            went.append((start, end, values))
            values, start = came, end
        gradient = values  # the head's, which costs nothing here
        for start, end, entered in reversed(went):
            gradient, _ = await self._ask("hub_backward", tokens, number, start, entered + gradient, end=end)

        def backward() -> None:
            shape = (*tokens.shape, chain.shape.hidden)
            compute.backward(key, wire.decode_values(gradient, shape, BITS))
            compute.commit(key)
            chain.on_committed(0, chain.end)

        await chain._work(backward, urgency=VERDICT)
        type(self).on_done(number, in_flight)
        self._done(1.0, tokens.numel())

    async def _ask(
        self, method: str, tokens: torch.Tensor, number: int, start: int, body: bytes, *, end: int | None = None
    ) -> tuple[bytes, int]:
        """(what the stage at `start` makes of it, where that stage ends), from whoever has least to do."""
        size = wire.values_bytes((*tokens.shape, self._chain.shape.hidden), BITS)
        failed: list[str] = []
        while True:
            able = [holder for holder in self._able(start, failed) if end is None or holder.end == end]
            if not able:
                failed.clear()
                await asyncio.sleep(AGAIN_S)
                continue
            here = min(able, key=lambda holder: self._outstanding[holder.peer_id])
            asked = Asked(
                number=number, start=start, end=here.end, sequences=tokens.shape[0], length=tokens.shape[1]
            )
            self._outstanding[here.peer_id] += 1
            try:
                _, found = await self._calls.call(
                    here.peer_id, method, asked.model_dump(), body, deadline_s=CALL_S, max_answer=size
                )
                return found, here.end
            except NetworkError:
                failed.append(here.peer_id)
            finally:
                self._outstanding[here.peer_id] -= 1

    def _able(self, start: int, failed: Sequence[str]) -> list[Holder]:
        return [h for h in self._chain._holders() if h.first == start and h.peer_id not in failed]
