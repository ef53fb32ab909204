"""A swarm in one process and in no time: real averagers, rounds, ledgers and codec; the network and the clock are made
up.

The event loop's clock jumps to whatever is due next, so minutes of a swarm take a fraction of a second, and a schedule
is the same each time. Messages are delayed, lost, or arrive twice as late; peers are cut off, or die.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any

import torch

from swarm.averaging.averager import Averager
from swarm.averaging.context import Context
from swarm.averaging.global_state import initial_state
from swarm.averaging.layout import Layout
from swarm.averaging.spare_copies import Store
from swarm.config import RunConfig
from swarm.errors import NetworkError, PeerGone, PeerRefused
from swarm.events import Event, Round
from swarm.network.keys import Keypair
from swarm.network.link import Handler
from swarm.network.records import Contact, Status
from swarm.train.boundary import Boundary


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its time goes on to the next timer as soon as nothing else is left to do."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class Caller:
    """What a handler sees of the link."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id


class World:
    def __init__(self, run: RunConfig, *layouts: Layout, seed: int, loss: float = 0.0, delay_s: float = 0.1) -> None:
        """`layouts`: of each fragment of the run."""
        self.run = dataclasses.replace(run, fragments=len(layouts))
        self.layouts, self.dice = layouts, random.Random(seed)
        self.loss, self.delay_s = loss, delay_s
        self.peers: dict[str, Peer] = {}
        self.parted: set[frozenset[str]] = set()

    def can_talk(self, one: str, other: str) -> bool:
        here, there = self.peers[one], self.peers[other]
        return not here.dead and not there.dead and frozenset((one, other)) not in self.parted

    async def travel(self) -> None:
        await asyncio.sleep(self.delay_s * self.dice.uniform(0.5, 1.5) * (5 if self.dice.random() < 0.05 else 1))

    def part(self, side: Iterable[str]) -> None:
        inside = set(side)
        self.parted |= {
            frozenset((one, other)) for one in self.peers for other in self.peers
            if (one in inside) != (other in inside)
        }

    def heal(self) -> None:
        self.parted.clear()


def start_of(layout: Layout) -> torch.Tensor:
    """The weights that a fragment begins with, fp32 [numel]; every peer draws the same."""
    return layout.flatten({
        slot.name: torch.randn(slot.shape, generator=torch.Generator().manual_seed(3)) for slot in layout.slots
    })


class Peer:
    """Stands in for the endpoint and the directory of one averager."""

    bytes_sent = bytes_received = 0
    reach = ""

    def __init__(
        self, world: World, key: Keypair, holds: Collection[int] | None = None, *, disk: Store | None = None
    ) -> None:
        """`holds`: fragments that it holds; None: all. `disk`: for spare copies of the others."""
        layouts = {i: layout for i, layout in enumerate(world.layouts) if holds is None or i in holds}
        starts = {i: start_of(layout) for i, layout in layouts.items()}
        self.world, self.id, self.dead = world, key.peer_id, False
        self.events: list[Event] = []
        self.methods: dict[str, Handler] = {}
        self.heard: dict[str, tuple[Status, float]] = {}
        self.met: dict[str, list[str]] = {}
        self.on_status: Callable[[str, Status], None] = lambda peer_id, status: None
        self.parameters = {
            name: torch.nn.Parameter(v.clone()) for i, layout in layouts.items() for name, v in layout.views(starts[i])
        }
        context = Context(world.run, key, self, self, Boundary(), self.events.append)  # type: ignore[arg-type]
        states = {i: initial_state(i, start, 1) for i, start in starts.items()}
        self.averager = Averager(context, layouts, states, self.parameters)
        if disk is not None:
            self.averager.keep_spares(disk, dict(enumerate(world.layouts)))
        self.trained = 0
        self.trained_in = dict.fromkeys(range(len(world.layouts)), 0)
        """by fragment, where there are several"""
        self.ever_held = set(layouts)
        self.untrained: set[int] = set()
        """fragments that it holds and does not train: it is about to let go of them"""
        self._tasks: list[asyncio.Task[None]] = []
        world.peers[self.id] = self

    def start(self, *, tokens: int = 100, every_s: float = 0.4) -> None:
        self.averager.start()
        self.start_beating()
        self._tasks = [self._tasks[0], asyncio.create_task(self._train(tokens, every_s))]

    def start_beating(self) -> None:
        """Others hear of it while it is joining."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._beat())]

    async def stop_training(self) -> None:
        self._tasks[1].cancel()
        await asyncio.gather(self._tasks[1], return_exceptions=True)

    async def kill(self) -> None:
        self.dead = True
        for task in self._tasks:
            task.cancel()
        await self.averager.stop()

    async def _train(self, tokens: int, every_s: float) -> None:
        dice = random.Random(self.id)
        while True:
            await asyncio.sleep(every_s * dice.uniform(0.5, 1.5))
            if len(self.world.layouts) > 1:
                self._train_some(tokens, dice)
                continue
            self.learn(tokens)

    def learn(self, tokens: int) -> None:
        """An inner step, now."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.add_(torch.randn(parameter.shape) * 1e-3)
        self.trained += tokens
        self.averager.trained(tokens)

    def _train_some(self, tokens: int, dice: random.Random) -> None:
        """One fragment takes its inner step: each does after its own quota."""
        held = [index for index in self.averager.held() if index not in self.untrained]
        if held:
            index = dice.choice(held)
            with torch.no_grad():
                for slot in self.world.layouts[index].slots:
                    self.parameters[slot.name].add_(torch.randn(slot.shape) * 1e-3)
            self.trained_in[index] += tokens * len(held)
            self.averager.trained_fragment(index, tokens * len(held))

    async def _beat(self) -> None:
        while True:
            for other in list(self.world.peers.values()):
                if other is not self and self.world.can_talk(self.id, other.id):
                    asyncio.get_running_loop().call_later(self.world.delay_s, other.hear, self.id, self.status())
            await asyncio.sleep(1.0)

    def hear(self, peer_id: str, status: Status) -> None:
        if self.world.can_talk(self.id, peer_id):
            self.heard[peer_id] = (status, asyncio.get_running_loop().time())
            self.on_status(peer_id, status)

    def status(self) -> Status:
        spares = self.averager.spares
        return Status(
            run_id=self.world.run.run_id, name="x", role="trainer", heads=self.averager.heads(),
            pending=self.averager.pending(), tokens_per_s=100.0, leaving=self.averager.leaving,
            spares=spares.announced() if spares else [], spare_room_bytes=spares.room_bytes if spares else 0,
        )

    @property
    def head(self) -> tuple[int, str, int]:
        return self.head_of(self.averager.held()[0])

    def head_of(self, fragment: int) -> tuple[int, str, int]:
        [state] = [state for state in self.averager.states() if state.fragment == fragment]
        return state.version, state.digest, state.tokens

    def rounds(self) -> list[Round]:
        return [event for event in self.events if isinstance(event, Round)]

    # -- the directory ----------------------------------------------------------------------------------------------

    def alive(self) -> dict[str, Status]:
        now = asyncio.get_running_loop().time()
        return {p: status for p, (status, at) in self.heard.items() if now - at < 6 and not self.world.peers[p].dead}

    async def tell(self, peer_id: str) -> None:
        await asyncio.sleep(self.world.delay_s)
        if self.world.can_talk(self.id, peer_id):
            self.world.peers[peer_id].hear(self.id, self.status())

    def maddrs(self, peer_id: str) -> list[str]:
        return ["/ip4/127.0.0.1/tcp/1"]

    def contacts(self, peer_ids: Iterable[str], *, max_maddrs: int = 8) -> list[Contact]:
        return [Contact(peer_id=peer_id, maddrs=self.maddrs(peer_id)) for peer_id in peer_ids]

    def meet(self, peer_id: str, maddrs: list[str], reach: str = "") -> None:
        self.met[peer_id] = maddrs

    def unsure(self) -> bool:
        return False

    def heard_of_outbound(self) -> bool:
        return False

    async def introduce(self, peer_ids: Iterable[str]) -> None:
        pass

    # -- the endpoint -----------------------------------------------------------------------------------------------

    def on(self, method: str, handler: Handler, *, max_body: int = 0) -> None:
        self.methods[method] = handler

    def is_linked(self, peer_id: str) -> bool:
        return self.world.can_talk(self.id, peer_id)

    async def call(
        self, peer_id: str, method: str, header: dict[str, Any] | None = None, body: bytes = b"", *,
        deadline_s: float, max_answer: int = 0, maddrs: Iterable[str] = (),
    ) -> tuple[dict[str, Any], bytes]:
        async def there_and_back() -> tuple[dict[str, Any], bytes]:
            answer = await self._deliver(peer_id, method, header or {}, body)
            await self.world.travel()
            if not self.world.can_talk(self.id, peer_id):
                raise PeerGone("the link ended")
            return answer

        return await within(there_and_back(), deadline_s)

    async def notify(
        self, peer_id: str, method: str, header: dict[str, Any] | None = None, body: bytes = b"", *,
        deadline_s: float, maddrs: Iterable[str] = (),
    ) -> None:
        if not self.is_linked(peer_id):
            raise PeerGone("not linked")

        async def deliver() -> None:
            try:
                if self.world.dice.random() >= self.world.loss:
                    await self._deliver(peer_id, method, header or {}, body)
            except NetworkError:
                pass  # a quiet message: nobody is told

        self.averager.context.spawn(deliver())

    async def _deliver(
        self, peer_id: str, method: str, header: dict[str, Any], body: bytes
    ) -> tuple[dict[str, Any], bytes]:
        await self.world.travel()
        if not self.world.can_talk(self.id, peer_id):
            raise PeerGone("cannot reach it")
        handler = self.world.peers[peer_id].methods.get(method)
        if handler is None:
            raise PeerRefused("no such method")
        return await handler(Caller(self.id), header, body)  # type: ignore[arg-type]


async def within(work: Coroutine[Any, Any, Any], deadline_s: float) -> Any:
    try:
        return await asyncio.wait_for(work, deadline_s)
    except asyncio.TimeoutError:
        raise PeerGone("no answer in time") from None


def play(story: Coroutine[Any, Any, None]) -> None:
    """Run a story to its end on a clock of its own."""
    loop = JumpingLoop()
    try:
        loop.run_until_complete(story)
    finally:
        while left := asyncio.all_tasks(loop):  # what ends may begin something in its turn, such as to forget its work
            loop.run_until_complete(asyncio.sleep(0))  # one that never ran a line would leave what it awaits unawaited
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()
