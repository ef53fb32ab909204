"""One process of a simulated peer: a real averager, and what stands around it in place of endpoint, directory and
training thread. It may be killed or frozen between any two of its steps; a new process goes on from its disk.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from swarm.averaging.averager import Averager
from swarm.averaging.context import Context
from swarm.averaging.global_state import GlobalState
from swarm.averaging.layout import Layout
from swarm.config import RunConfig
from swarm.errors import NetworkError, StateError
from swarm.events import Event
from swarm.host.keep import Keep
from swarm.network.directory import ALIVE_S, HEARTBEAT_S, UNSURE_S
from swarm.network.keys import Keypair
from swarm.network.records import Contact, Status
from tests.unit.averaging.faults.endpoint import Answer, Endpoint
from tests.unit.averaging.faults.loop import StepLoop
from tests.unit.averaging.faults.network import Link, Network

T = TypeVar("T")

BOUNDARY_S = 0.2
"""until the training thread passes by"""
MEET_S = 5.0
AGAIN_S = 1.0
CHECKPOINT_S = 6.0
GOSSIP = 2
ROUTINE = {"tick_forever", "_beat_forever", "_save_forever", "_live"}
"""what a peer does that has nothing else to do"""
STEP = 0.01
"""an inner step changes each weight by about this much"""


@dataclass
class Disk:
    """What a peer's next process finds."""

    states: dict[int, GlobalState] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    """peers ever met"""
    processes: int = 0
    """that it has had so far"""


@dataclass(frozen=True)
class Surroundings:
    """What all peers of a simulated swarm have in common."""

    loop: StepLoop
    network: Network
    run: RunConfig
    layouts: tuple[Layout, ...]
    starts: tuple[GlobalState, ...]
    dice: random.Random
    watch: Callable[[Peer], None]
    """is told of each new process before it does anything"""


class Peer(Endpoint):
    reach = ""

    def __init__(
        self, around: Surroundings, key: Keypair, disk: Disk, *, name: str, holds: tuple[int, ...], keep: Keep,
        tokens: int, every_s: float, newcomer: bool = False,
    ) -> None:
        """`tokens`: of an inner step, which comes every `every_s`; `newcomer`: joins, and must be answered."""
        process = around.loop.process(f"{name}.{disk.processes}")
        super().__init__(around.loop, around.network, key.peer_id, process)
        self.around, self.key, self.disk, self.name, self.holds = around, key, disk, name, holds
        disk.processes += 1
        self.events: list[Event] = []
        self.trained = dict.fromkeys(holds, 0)
        """tokens of this process, by fragment"""
        self.steps = dict.fromkeys(holds, 0)
        self.learns = {index: self._learns(index) for index in holds}
        self.on_status: Callable[[str, Status], None] = lambda peer_id, status: None
        self.training = True
        self.boundaries: set[asyncio.Future[Any]] = set()
        self._tokens, self._every_s, self._newcomer = tokens, every_s, newcomer
        self._heard: dict[str, tuple[Status, float]] = {}
        self._lost_at: dict[str, float] = {}
        self.on("status", self._on_status)
        self.process.context.run(self._build, keep)
        around.network.arrives(self)
        around.watch(self)
        self.process.begin(self._live())

    def _learns(self, fragment: int) -> torch.Tensor:
        """What this process takes off the weights in each inner step, fp32 [numel]: another one than all others, and
        always the same, so that what was learnt is known exactly."""
        generator = torch.Generator().manual_seed(self.around.dice.getrandbits(62))
        layout = self.around.layouts[fragment]
        return layout.flatten({
            slot.name: (torch.rand(slot.shape, generator=generator) + 0.5) * STEP for slot in layout.slots
        })

    def _build(self, keep: Keep) -> None:
        around = self.around
        layouts = {index: around.layouts[index] for index in self.holds}
        states = {index: self.disk.states.get(index, around.starts[index]) for index in self.holds}
        self.parameters = {
            name: torch.nn.Parameter(values.clone(), requires_grad=False)
            for index, layout in layouts.items() for name, values in layout.views(states[index].weights)
        }
        context = Context(
            around.run, self.key, self, self, self.at_boundary, self.events.append, keep=keep,  # type: ignore[arg-type]
            nonce=lambda: f"{around.dice.getrandbits(64):016x}",
        )
        self.averager = Averager(context, layouts, states, self.parameters)

    # -- a peer's life ----------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        """Beat; meet the others; take over their state; take part and train."""
        self._spawn(self._beat_forever())
        loop = self.around.loop
        while self._newcomer and not self._heard:
            await asyncio.sleep(0.3)
        deadline = loop.time() + MEET_S
        while not self._covered() and loop.time() < deadline:
            await asyncio.sleep(0.3)
        while True:
            try:
                await self.averager.synchroniser.join()
                break
            except StateError:
                await asyncio.sleep(AGAIN_S)  # a person starts it again
        self.averager.start()
        self._spawn(self._save_forever())
        dice = random.Random(f"{self.id}/{self.process.name}")
        while True:
            await asyncio.sleep(self._every_s * dice.uniform(0.5, 1.5))
            if self.training:
                self._train(dice.choice(self.holds))

    def _covered(self) -> bool:
        held = {index for status in self.alive().values() for index in status.held()}
        return held.issuperset(range(self.around.run.fragments))

    def _train(self, fragment: int) -> None:
        for name, values in self.around.layouts[fragment].views(self.learns[fragment]):
            self.parameters[name].sub_(values)
        self.trained[fragment] += self._tokens
        self.steps[fragment] += 1
        self.averager.trained_fragment(fragment, self._tokens)

    async def _save_forever(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_S)
            self.save()

    def save(self) -> None:
        if not self.process.dead:  # a coroutine that is told to end may still come by here
            self.disk.states |= {state.fragment: state for state in self.averager.states()}

    async def at_boundary(self, function: Callable[[], T]) -> T:
        done: asyncio.Future[T] = self.around.loop.create_future()
        self.boundaries.add(done)

        def pass_by() -> None:
            self.boundaries.discard(done)
            if not done.done():
                try:
                    done.set_result(function())
                except Exception as error:
                    done.set_exception(error)

        self.around.loop.call_later(BOUNDARY_S * self.around.dice.random(), pass_by)
        return await done

    def kill(self) -> None:
        if not self.process.dead:
            self.process.kill()
            self.around.network.dies(self)

    def rest(self) -> None:
        """Train, beat and open rounds no more: only what is under way goes on."""
        for task in self.process.left():
            if task.get_coro().__name__ in ROUTINE:  # type: ignore[union-attr]
                task.cancel()

    def is_busy(self) -> bool:
        """With a round or a download of any fragment, and not dead."""
        return not self.process.dead and any(
            fragment.opening or fragment.following or fragment.downloading or fragment.rounds.member.in_round()
            for fragment in self.averager._fragments.values()
        )

    def waits_in(self) -> list[str]:
        """Where its tasks are, the innermost line last."""
        places = []
        for task in self.process.left():
            coroutine: Any = task.get_coro()
            frames = []
            while getattr(coroutine, "cr_frame", None) is not None:
                frames.append(f"{coroutine.__name__}:{coroutine.cr_frame.f_lineno}")
                coroutine = coroutine.cr_await
            places.append(" > ".join(frames))
        return places

    def _spawn(self, work: Any) -> None:
        asyncio.get_running_loop().create_task(work)  # the process keeps it

    # -- in place of the directory ----------------------------------------------------------------------------------

    def status(self) -> Status:
        return Status(
            run_id=self.around.run.run_id, name=self.name, role="trainer", heads=self.averager.heads(),
            pending=self.averager.pending(), leaving=self.averager.leaving,
            tokens_per_s=self._tokens / self._every_s if self.training else 0.0,
        )

    async def _beat_forever(self) -> None:
        network = self.around.network
        while True:
            status, known = self.status(), sorted(self.disk.known)
            told = self.around.dice.sample(known, min(GOSSIP, len(known)))
            for peer_id in known:
                link = network.try_link(self, peer_id)
                if link is not None:
                    network.send(link, self, partial(self._post_beat, link, status, told))
            await asyncio.sleep(HEARTBEAT_S * self.around.dice.uniform(0.8, 1.2))

    def _post_beat(self, link: Link, status: Status, told: list[str]) -> None:
        other = link.other(self)
        assert isinstance(other, Peer)
        other.process.post(other.hear, self.id, status, told)

    def hear(self, peer_id: str, status: Status, told: Iterable[str] = ()) -> None:
        self.disk.known |= {peer_id, *told} - {self.id}
        self._heard[peer_id] = (status, self.around.loop.time())
        self._lost_at.pop(peer_id, None)
        self.on_status(peer_id, status)

    def alive(self) -> dict[str, Status]:
        now = self.around.loop.time()
        return {peer_id: status for peer_id, (status, at) in self._heard.items() if now - at < ALIVE_S}

    def unsure(self) -> bool:
        now = self.around.loop.time()
        return any(now - at < UNSURE_S for at in self._lost_at.values())

    async def tell(self, peer_id: str) -> None:
        try:
            answer, _ = await self.call(peer_id, "status", {"status": self.status()}, deadline_s=ALIVE_S)
        except NetworkError:
            self._lost_at.pop(peer_id, None)
        else:
            self.hear(peer_id, answer["status"])

    async def _on_status(self, link: Any, header: dict[str, Any], body: bytes) -> Answer:
        self.hear(link.peer_id, header["status"])
        return {"status": self.status()}, b""

    def lost(self, peer_id: str) -> None:
        if self._heard.pop(peer_id, None) is not None:
            self._lost_at[peer_id] = self.around.loop.time()
            self._spawn(self.tell(peer_id))

    def maddrs(self, peer_id: str) -> list[str]:
        return ["/ip4/127.0.0.1/tcp/1"]

    def contacts(self, peer_ids: Iterable[str], *, max_maddrs: int = 8) -> list[Contact]:
        return [Contact(peer_id=peer_id, maddrs=self.maddrs(peer_id)) for peer_id in peer_ids]

    def meet(self, peer_id: str, maddrs: list[str], reach: str = "") -> None:
        self.disk.known |= {peer_id} - {self.id}

    def heard_of_outbound(self) -> bool:
        return False

    async def introduce(self, peer_ids: Iterable[str]) -> None:
        for peer_id in peer_ids:
            self.meet(peer_id, [])
