"""Plays a schedule: a swarm of real averagers under its faults, checked all the time, and then left in peace.

    faults     what the schedule says; every process' books are looked at each second, and at each commit
    going on   all lines are mended that the schedule mends; each process must come to a new commit (I3, I5)
    settling   nobody trains any more: all that was learnt must get into commits that all agree on (I1, I2)
    quiet      then nothing may be left that somebody waits for (I3)
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.averaging.global_state import GlobalState, initial_state
from swarm.averaging.layout import Layout, layout_of
from swarm.config import AveragingConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from swarm.host.keep import AMPLE, LITTLE
from swarm.model.fragments import FragmentSpec, TensorSpec
from swarm.network.keys import Keypair
from tests.unit.averaging.faults.books import BROKEN, Books, Broken
from tests.unit.averaging.faults.loop import START_S, StepLoop, play, running
from tests.unit.averaging.faults.network import Network
from tests.unit.averaging.faults.peer import Disk, Peer, Surroundings
from tests.unit.averaging.faults.schedule import Crash, Cut, Fault, Freeze, Join, Schedule, Storm
from tests.unit.averaging.simulation import start_of

TOKENS = 100
"""of an inner step"""
ROUND_S = 3.5
"""the tokens of a round take the swarm about so long"""
MAX_ROUND_S = 8.0
GO_ON_S = 60.0
SETTLE_S = 120.0
QUIET_S = 70.0
"""the longest deadline that a peer at rest may still have, for a contribution that nobody wants any more"""
LOOK_S = 1.0
LAYOUTS: tuple[Layout, ...] = tuple(
    layout_of(FragmentSpec(index, (index, index + 1), (
        TensorSpec(f"{index}.bias", (10,), fine=True), TensorSpec(f"{index}.matrix", (rows, 40), fine=False),
    ))) for index, rows in enumerate((24, 16))
)
STARTS = tuple(initial_state(index, start_of(layout), 1) for index, layout in enumerate(LAYOUTS))
KEYS = [Keypair(bytes([number]) * 32) for number in range(1, 9)]


@dataclass
class Outcome:
    schedule: Schedule
    problem: str = ""
    """which invariant does not hold; empty: all do"""
    commits: int = 0
    versions: int = 0
    """of the fragment that has most"""
    tokens_trained: int = 0
    tokens_lost: int = 0
    """died with killed processes"""
    simulated_s: float = 0.0
    going_on_s: float = 0.0
    """until the last process had a new commit, after the last fault"""
    settling_s: float = 0.0
    log: list[str] = field(default_factory=list)


class Story:
    def __init__(self, loop: StepLoop, schedule: Schedule, outcome: Outcome) -> None:
        self.loop, self.schedule, self.outcome = loop, schedule, outcome
        self.dice = random.Random(f"story {schedule.seed}")
        self.books = Books(log=outcome.log)
        self.network = Network(
            loop, self.dice, loss=schedule.loss, twice=schedule.twice, delay_s=schedule.delay_s
        )
        fragments = 1 + max(index for holds in schedule.holds for index in holds)
        run = RunConfig(
            name="faults", fragments=fragments, model=ModelConfig(config={"model_type": "gptj"}),
            data=DataConfig(stdlib=True), train=TrainConfig(total_tokens=10**12),
            averaging=AveragingConfig(
                bits=schedule.bits, max_round_s=MAX_ROUND_S,
                # so that the books can say to the bit what a result must be
                **({"robust": False, "warm_steps": 0} if schedule.bits == 32 else {}),
                tokens_per_round=int(ROUND_S / fragments * sum(TOKENS / every_s for every_s in schedule.every_s)),
            ),
        )
        starts: tuple[GlobalState, ...] = STARTS[:fragments]
        self.around = Surroundings(
            loop, self.network, run, LAYOUTS[:fragments], starts, self.dice, self.books.watch
        )
        self.peers: dict[int, Peer] = {}
        """the newest process of each peer"""
        self.coming_back = 0
        """processes that died and are about to be followed by others"""
        self.disks = [Disk() for _ in schedule.holds]

    # -- a swarm and its faults -------------------------------------------------------------------------------------

    async def tell(self) -> None:
        first = [number for number in range(len(self.schedule.holds)) if number not in self.schedule.late]
        for number in first:
            self.disks[number].known = {KEYS[other].peer_id for other in first if other != number}
            self.begin(number)
        for fault in self.schedule.faults:
            self.loop.call_later(fault.at_s, self.happens, fault)
        began = self.loop.time()
        while self.loop.time() - began < self.schedule.until_s or self.coming_back:
            await self.look()
        for peer in self.alive():
            peer.process.on_step.clear()
            peer.process.thaw()
        self.network.loss = self.network.twice = 0.0
        await self.go_on()
        await self.settle()
        await self.be_quiet()

    def begin(self, number: int) -> None:
        """A new process of a peer."""
        schedule = self.schedule
        self.peers[number] = Peer(
            self.around, KEYS[number], self.disks[number], name=f"p{number}", holds=schedule.holds[number],
            keep=LITTLE if schedule.little[number] else AMPLE, tokens=TOKENS, every_s=schedule.every_s[number],
            newcomer=number in schedule.late and not self.disks[number].processes,
        )
        self.books.say(self.peers[number], "begins")

    def alive(self) -> list[Peer]:
        return [peer for _, peer in sorted(self.peers.items()) if not peer.process.dead]

    def happens(self, fault: Fault) -> None:
        if isinstance(fault, Join):
            living = self.alive()
            if not living:
                self.loop.call_later(1.0, self.happens, fault)
                return
            self.disks[fault.peer].known = {self.dice.choice(living).id}
            self.begin(fault.peer)
        elif isinstance(fault, Cut):
            side = {KEYS[number].peer_id for number in fault.side}
            self.books.say(None, f"{fault}")
            self.network.cut(side)
            if fault.for_s is not None:
                self.loop.call_later(fault.for_s, self.heal, side)
        elif isinstance(fault, Storm):
            self.books.say(None, f"{fault}")
            before, self.network.loss = self.network.loss, max(fault.loss, self.network.loss)
            self.loop.call_later(fault.for_s, setattr, self.network, "loss", before)
        else:
            peer = self.peers.get(fault.peer)
            if peer is None or peer.process.dead:
                return
            act = self.crash if isinstance(fault, Crash) else self.freeze
            peer.process.at_step(fault.steps, lambda: act(fault, peer))  # type: ignore[operator]

    def heal(self, side: set[str]) -> None:
        self.books.say(None, "the line is mended")
        self.network.heal(side)

    def crash(self, fault: Crash, peer: Peer) -> None:
        if not peer.process.dead:
            self.books.say(peer, f"dies at its step {peer.process.steps}")
            peer.kill()
            if fault.back_s is not None:
                self.coming_back += 1
                self.loop.call_later(fault.back_s, self.come_back, fault.peer)

    def come_back(self, number: int) -> None:
        self.coming_back -= 1
        self.begin(number)

    def freeze(self, fault: Freeze, peer: Peer) -> None:
        self.books.say(peer, f"freezes at its step {peer.process.steps} for {fault.for_s:.1f} s")
        peer.process.frozen = True
        self.loop.call_later(fault.for_s, self.thaw, peer)

    def thaw(self, peer: Peer) -> None:
        self.books.say(peer, "thaws")
        peer.process.thaw()

    # -- what must hold ---------------------------------------------------------------------------------------------

    async def look(self) -> None:
        await asyncio.sleep(LOOK_S)
        if BROKEN:
            raise Broken(BROKEN[0])
        for peer in self.alive():
            for fragment in peer.averager.held():
                self.books.check(peer, fragment)

    async def wait(self, condition: Callable[[], bool], *, limit_s: float, what: Callable[[], str]) -> float:
        """Seconds until it holds. Raises Broken."""
        began = self.loop.time()
        while not condition():
            if self.loop.time() - began > limit_s:
                raise Broken(f"I3: not within {limit_s:.0f} s: {what()}")
            await self.look()
        return self.loop.time() - began

    def heads(self) -> dict[tuple[str, int], str]:
        """(process, fragment) -> digest"""
        return {
            (peer.process.name, state.fragment): state.digest
            for peer in self.alive() for state in peer.averager.states()
        }

    async def go_on(self) -> None:
        self.books.say(None, "no more faults")
        self.introduce()
        first = self.heads()
        moved: set[tuple[str, int]] = set()

        def all_have_moved() -> bool:
            self.introduce()
            moved.update(key for key, digest in self.heads().items() if first.get(key) != digest)
            return all(peer.averager.serving for peer in self.alive()) and moved >= self.heads().keys()

        self.outcome.going_on_s = await self.wait(
            all_have_moved, limit_s=GO_ON_S,
            what=lambda: f"a new commit at {sorted(self.heads().keys() - moved)}, or those who join do not get in",
        )

    def introduce(self) -> None:
        """Who knows nobody alive is told of somebody by a friend."""
        for peer in self.alive():
            others = [
                other.id for other in self.alive()
                if other is not peer and self.network.can_talk(peer.id, other.id)
            ]
            if others and not peer.disk.known & set(others):
                peer.disk.known.add(others[0])

    async def settle(self) -> None:
        self.books.say(None, "nobody trains any more")
        for peer in self.alive():
            peer.training = False
            peer.averager.leaving = True

        def is_settled() -> bool:
            if any(any(peer.averager.pending()) for peer in self.alive()):
                return False
            return all(
                len({peer.averager._fragments[index].ledger.state.digest for peer in side if index in peer.holds}) <= 1
                for side in self.sides() for index in range(self.around.run.fragments)
            )

        def where() -> str:
            return "; ".join(
                f"{peer.process.name} at {[(s.version, s.digest[:6], s.tokens) for s in peer.averager.states()]} with "
                f"{peer.averager.pending()} pending" for peer in self.alive()
            )

        self.outcome.settling_s = await self.wait(is_settled, limit_s=SETTLE_S, what=where)

    def sides(self) -> list[list[Peer]]:
        return [
            [peer for number, peer in sorted(self.peers.items()) if number in side and not peer.process.dead]
            for side in self.schedule.sides()
        ]

    async def be_quiet(self) -> None:
        for side in self.sides():
            for fragment in range(self.around.run.fragments):
                self.books.check_agreement(side, fragment)
        for peer in self.alive():
            peer.rest()
        await self.wait(
            lambda: not any(peer.process.left() or peer.is_busy() for peer in self.books.peers), limit_s=QUIET_S,
            what=lambda: "; ".join(
                f"{peer.process.name} still waits in {place}" for peer in self.books.peers
                for place in [*peer.waits_in(), *(["a round"] if peer.is_busy() else [])]
            ),
        )


class Notes(logging.Handler):
    """What the product itself has to say of it, in the story's log."""

    def __init__(self, story: Story) -> None:
        super().__init__()
        self._story = story

    def emit(self, record: logging.LogRecord) -> None:
        self._story.books.note(running(), f"  ({record.getMessage()})")


def outcome_of(schedule: Schedule, *, notes: bool = False) -> Outcome:
    """Play it. Whatever breaks is in the outcome; nothing is raised but for bugs of the simulation itself. `notes`:
    with what the product logs."""
    outcome = Outcome(schedule)
    BROKEN.clear()
    stories: list[Story] = []

    async def told(loop: StepLoop) -> None:
        story = Story(loop, schedule, outcome)
        stories.append(story)
        handler, log = Notes(story), logging.getLogger("swarm")
        level = log.level
        if notes:
            log.addHandler(handler)
            log.setLevel(logging.INFO)
        try:
            await story.tell()
        except Broken as broken:
            outcome.problem = str(broken)
            outcome.log += [f"nobody asked for {problem}" for problem in loop.problems]
            outcome.log += [
                f"{peer.process.name} waits in {place}" for peer in story.alive() for place in peer.waits_in()
            ]
        finally:
            log.removeHandler(handler)
            log.setLevel(level)

    loop = play(told, random.Random(f"loop {schedule.seed}"))
    [story] = stories
    if not outcome.problem and loop.problems:
        outcome.problem = f"an exception that nobody asked for: {loop.problems[0]}"
    books = story.books
    states = [state for peer in story.alive() for state in peer.averager.states()]
    outcome.commits, outcome.simulated_s = len(books.steps), loop.time() - START_S
    outcome.versions = max((state.version for state in states), default=0)
    outcome.tokens_trained = sum(sum(peer.trained.values()) for peer in books.peers)
    newest = {state.fragment: state.tokens for state in sorted(states, key=lambda state: state.tokens)}
    outcome.tokens_lost = outcome.tokens_trained - sum(newest.values())
    return outcome
