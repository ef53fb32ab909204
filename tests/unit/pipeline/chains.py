"""Chains in one process and in no time: the real protocol, routing and gradients on a made-up clock and network.

Messages are delayed and delivered twice; peers compute at their own speed, freeze, or die. What a dead peer was told
after its death is put on its books all the same: in a swarm that is what is held by a peer that died, and here it lets
the sums be compared to the last token.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import torch

from swarm.data.batch import Batch
from swarm.errors import NetworkError, PeerGone
from swarm.network import records
from swarm.network.link import Answer
from swarm.pipeline.chain import Chain
from swarm.pipeline.compute import StageCompute
from swarm.pipeline.guest import Guest
from swarm.pipeline.messages import Bits, Microbatch, Verdicts, Working
from swarm.pipeline.onward import Shape
from swarm.pipeline.origin import Origin
from swarm.pipeline.routing import Holder, Router
from swarm.pipeline.work import Done
from tests.unit.pipeline.toy import HIDDEN, LENGTH, VOCABULARY, Toy, fragments_of

T = TypeVar("T")
A_TARGET = LENGTH / (LENGTH - 1)
"""tokens of plain rows"""


class World:
    def __init__(
        self, num_fragments: int, *, seed: int, delay_s: float = 0.02, twice: float = 0.0, bits: Bits = 32,
        back_bits: Bits = 32,
    ) -> None:
        self.num_fragments, self.dice, self.bits, self.back_bits = num_fragments, random.Random(seed), bits, back_bits
        self.delay_s, self.twice = delay_s, twice
        self.peers: dict[str, Peer] = {}
        self.messages: list[tuple[str, str, str, int]] = []
        """(from, to, method, bytes of the body)"""
        self.waiting_bytes: dict[tuple[str, str], int] = {}
        """for the line of one peer to another"""
        self.answers_wait_s = 0.0
        """for the line, once they have begun to come"""

    async def travel(self) -> None:
        await asyncio.sleep(self.delay_s * self.dice.uniform(0.5, 1.5))


class Processor:
    """One thing at a time, the most urgent first; each takes `service_s` for each call of the stage."""

    def __init__(self, peer: Peer, service_s: float) -> None:
        self._peer, self.service_s = peer, service_s
        self.urgencies: set[int] = set()
        """of what it was given"""
        self._busy = False
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._number = 0

    @property
    def queue(self) -> int:
        return len(self._waiting)

    def __call__(self, function: Callable[[], T], *, urgency: int) -> Awaitable[Done[T]]:
        return self._run(function, urgency)

    async def _run(self, function: Callable[[], T], urgency: int) -> Done[T]:
        clock = asyncio.get_running_loop().time
        queued = clock()
        self.urgencies.add(urgency)
        if self._busy:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._number += 1
            self._waiting.append((urgency, self._number, turn))
            await turn
        self._busy = True
        began = clock()
        try:
            if urgency:
                await asyncio.sleep(self.service_s)
            await self._peer.awake()
            if self._peer.dead:
                raise PeerGone("it died meanwhile")
            return Done(function(), began - queued, clock() - began)
        finally:
            self._busy = False
            self._waiting.sort(key=lambda item: item[:2])
            while self._waiting:
                turn = self._waiting.pop(0)[2]
                if not turn.done():
                    turn.set_result(None)
                    break


class Peer:
    """Stands in for the endpoint, the directory and the training thread of one peer with fragments [first, end)."""

    def __init__(self, world: World, name: str, first: int, end: int, *, service_s: float = 0.05) -> None:
        self.world, self.id, self.first, self.end = world, name.replace("0", "Z").ljust(20, "x"), first, end
        self.dead, self.frozen_until = False, 0.0
        fragments = {i: f for i, f in fragments_of(world.num_fragments).items() if first <= i < end}
        self.stage = stage = Toy(world.num_fragments)
        names = {t.name for fragment in fragments.values() for t in fragment.tensors}
        self.parameters = {name: p for name, p in stage.model.named_parameters() if name in names}
        self.compute = StageCompute(stage, fragments, self.parameters)  # type: ignore[arg-type]
        self.work = Processor(self, service_s)
        self.router = Router(clock=asyncio.get_running_loop().time, rng=random.Random(name))
        self.chain = Chain(
            self.id, self, self.work, self.compute, self.router, first=first, end=end, holders=self.holders,
            is_alive=lambda peer_id: not world.peers[peer_id].forgotten,
            shape=Shape(world.num_fragments, HIDDEN, VOCABULARY, 10 * LENGTH), bits=world.bits,
            back_bits=world.back_bits,
        )
        self.losses: list[float] = []
        self.answering: set[asyncio.Task[Any]] = set()
        world.peers[self.id] = self

    def holders(self) -> list[Holder]:
        """A directory notices a death some seconds late, so the dead are in it."""
        others = (p for p in self.world.peers.values() if p is not self and not p.forgotten)
        return [Holder(p.id, p.first, p.end) for p in others if p.first < p.end]

    forgotten = False

    def origin(
        self, texts: Sequence[torch.Tensor | Batch], *, credit: int = 4
    ) -> tuple[Origin, Callable[[], bool]]:
        """An origin of these microbatches, and whether all are drawn."""
        left = [text if isinstance(text, Batch) else Batch(text) for text in texts]
        made = Origin(
            self.id, self.chain, self, draw=lambda: left.pop(0), first_number=0, largest_credit=credit,
            on_done=lambda loss, tokens: self.losses.append(loss),
        )
        return made, lambda: not left

    def kill(self) -> None:
        self.dead = True
        for task in self.answering:
            task.cancel()

    def freeze(self, seconds: float) -> None:
        self.frozen_until = asyncio.get_running_loop().time() + seconds

    async def awake(self) -> None:
        while (left_s := self.frozen_until - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(left_s)

    # -- the endpoint -----------------------------------------------------------------------------------------------

    async def call(
        self, peer_id: str, method: str, header: dict[str, Any], body: bytes = b"", *, deadline_s: float,
        max_answer: int = 0, on_head: Callable[[], None] = lambda: None,
    ) -> Answer:
        other = self.world.peers[peer_id]
        self.world.messages.append((self.id, peer_id, method, len(body)))
        if other.dead and method == "verdicts":
            return await other.answer(self.id, method, header, body)
        asking = asyncio.ensure_future(self._there_and_back(other, method, header, body))
        if self.world.dice.random() < self.world.twice:  # a repeated request, such as after a broken link
            again = asyncio.ensure_future(self._there_and_back(other, method, header, body))
            again.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            done, _ = await asyncio.wait([asking], timeout=deadline_s)
            while not done and other.dead:
                raise PeerGone("the link ended")
            if not done:
                raise PeerGone("no answer in time")
            header, data = asking.result()
            if data and self.world.answers_wait_s:  # behind others, on a line that is full
                on_head()
                await asyncio.sleep(self.world.answers_wait_s)
            self.world.messages.append((peer_id, self.id, f"{method}'s answer", len(data)))
            return header, data
        finally:
            asking.cancel()

    async def _there_and_back(self, other: Peer, method: str, header: dict[str, Any], body: bytes) -> Answer:
        await self.world.travel()
        await other.awake()
        if other.dead:
            raise PeerGone("the link ended")
        task = asyncio.ensure_future(other.answer(self.id, method, header, body))
        other.answering.add(task)
        task.add_done_callback(other.answering.discard)
        try:
            answer = await task
        except asyncio.CancelledError:
            if other.dead:
                raise PeerGone("the link ended") from None
            raise
        await other.awake()
        await self.world.travel()
        if other.dead or self.dead:
            raise PeerGone("the link ended")
        return answer

    def waiting_bytes(self, peer_id: str) -> int:
        return self.world.waiting_bytes.get((self.id, peer_id), 0)  # these lines take all at once

    def last_heard(self, peer_id: str) -> float:
        other, now = self.world.peers[peer_id], asyncio.get_running_loop().time()
        return float("-inf") if other.dead or now < other.frozen_until else now

    async def notify(self, peer_id: str, method: str, header: dict[str, Any], *, deadline_s: float) -> None:
        other = self.world.peers[peer_id]
        await self.awake()
        if not self.dead and not other.dead:
            await self.world.travel()
            await other.answer(self.id, method, header, b"")

    async def answer(self, asker: str, method: str, header: dict[str, Any], body: bytes) -> Answer:
        if method == "microbatch":
            return await self.chain.serve(records.parse(Microbatch, header), body, asker=asker)
        if method == "working":
            self.chain.on_working(asker, records.parse(Working, header))
            return {}, b""
        if method == "withdrawn":
            await self.chain.on_withdrawn(asker, records.parse(Working, header))
            return {}, b""
        assert method == "verdicts"
        if self.dead:
            return {"missing": self.told_when_dead(asker, records.parse(Verdicts, header))}, b""
        return {"missing": await self.chain.judge(asker, records.parse(Verdicts, header).verdicts)}, b""

    def told_when_dead(self, origin: str, words: Verdicts) -> list[int]:
        missing = []
        for verdict in words.verdicts:
            try:
                self.compute.commit((origin, verdict.number, verdict.start))
            except KeyError:
                if (origin, verdict.number) not in self.chain._done:  # told before it died
                    missing.append(verdict.number)
        return missing


class Visitor(Peer):
    """Asks and holds nothing."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, 0, 1)
        self.first = self.end = self.chain.end = 0
        self.guest = Guest(
            self.id, self, self.router, shape=self.chain.shape, holders=self.holders, bits=world.bits,
            back_bits=world.back_bits,
        )

    async def answer(self, asker: str, method: str, header: dict[str, Any], body: bytes) -> Answer:
        assert method == "working", "nobody asks it anything"
        self.guest.onward.on_working(asker, records.parse(Working, header))
        return {}, b""


async def finish(origins: list[tuple[Origin, Callable[[], bool]]]) -> None:
    await asyncio.gather(*(origin.run(until=until) for origin, until in origins))


def sums(world: World) -> dict[str, torch.Tensor]:
    """Of all peers, dead or alive: name -> gradient times tokens, added up. Plain rows of so many targets, that is."""
    total: dict[str, torch.Tensor] = {}
    for peer in world.peers.values():
        for fragment in peer.compute.fragments:
            targets = peer.compute.targets(fragment)
            gradients, _ = peer.compute.take(fragment)
            for name, values in gradients.items():
                total[name] = total.get(name, torch.zeros_like(values)) + values * (targets * A_TARGET)
    return total


def largest_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative, over all tensors."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


__all__ = ["NetworkError", "Peer", "Visitor", "World", "finish", "largest_error", "sums"]
