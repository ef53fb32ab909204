"""How a peer with a part of the model gets to another part, while it goes on serving what it has.

What it should hold is decided by pipeline/placement.py, and in which order it loads, and what it serves meanwhile, by
pipeline/loading.py; this carries it out, a fragment at a time:

    load       build, download from who holds it, average it; then serve more with it
    let go     refuse new microbatches, end those under way, put what was learnt into a round, drop it

Make before break: old fragments go once the new ones are served, or earlier where memory is too little for both. A
newcomer is a peer that moves from one fragment. Whoever dies in the middle is like any that dies; what it let go of was
in a round before, or is lost with the tokens since the last one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass

import torch

from swarm.averaging.averager import Averager
from swarm.config import RunConfig
from swarm.data.text_stream import TextStream
from swarm.errors import SwarmError
from swarm.events import Check, Event, Warning
from swarm.network.directory import Directory
from swarm.network.records import Move, Span
from swarm.pipeline.loading import next_fragment, stage_to_serve
from swarm.pipeline.placement import Act, Memory, decide
from swarm.pipeline.snapshot import NO_STAGE, Claim, Holder, Snapshot, Stage
from swarm.train import surroundings
from swarm.train.optimizers import Optimizers
from swarm.train.pieces import Piece, build, stage_of
from swarm.train.place import Planner
from swarm.train.serving import Serving
from swarm.train.stage_trainer import StageTrainer

LOOK_S = 1.0
AGAIN_S = 3.0
"""after a fragment that could not be had"""
END_S = 5.0
"""for microbatches under way on a fragment that is let go of; then others are asked to do them"""
VERDICT_S = 10.0
"""and then for the verdicts of those that are done"""
REMOVE_S = 20.0
"""until what was learnt of it is in a round"""
FIRST_LOAD_S = 30.0
"""what loading a fragment is taken to cost before one was loaded"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """Of the peer that moves."""

    run: RunConfig
    device: torch.device
    planner: Planner
    averager: Averager
    inner: Optimizers
    serving: Serving
    trainer: StageTrainer
    directory: Directory
    stream: Callable[[], Awaitable[TextStream]]
    """the text, for a peer that comes to serve the first fragment"""
    emit: Callable[[Event], None]


class Mover:
    """On the network's event loop."""

    def __init__(
        self, me: str, parts: Parts, pieces: Iterable[Piece], *, serving: Stage, target: Stage, may_move: bool
    ) -> None:
        """`pieces`: those held at the start, served as `serving`. `may_move`: not where it was told what to hold."""
        self._me, self._parts, self._may_move = me, parts, may_move
        self._pieces = {piece.spec.index: piece for piece in pieces}
        self.serving, self.target = serving, target
        self.claim: Claim | None = None
        self._memory, self._snapshot = Memory(), Snapshot([], parts.planner.fragments())
        self._load_s = FIRST_LOAD_S
        self._complained = ""

    async def run_forever(self) -> None:
        while True:
            try:
                await self._go_on()
                wait_s, self._complained = LOOK_S, ""
            except SwarmError as error:  # others may come who have it, or memory may be there again
                if str(error) != self._complained:
                    self._complained = str(error)
                    self._parts.emit(Warning(f"fragments {_name(self.target)} are not all here yet: {error}"))
                wait_s = AGAIN_S
            except Exception:  # a bug of ours must not end all moving
                log.exception("cannot go on to fragments %s", _name(self.target))
                wait_s = AGAIN_S
            await asyncio.sleep(wait_s)

    # -- for the status ---------------------------------------------------------------------------------------------

    def said_serving(self) -> Span | None:
        return None if self.serving == NO_STAGE else list(self.serving)

    def said_target(self) -> Span | None:
        return None if self.target == self.serving else list(self.target)

    def said_claim(self) -> Move | None:
        claim = self.claim
        if claim is None:
            return None
        gain = min(1e9, max(0.0, claim.gain))  # a swarm that can do nothing gains without measure by anything
        return Move(stage=list(claim.stage), gain=gain, heals=claim.heals)

    # ---------------------------------------------------------------------------------------------------------------

    async def _go_on(self) -> None:
        snapshot, me = self._look()
        if self._pieces.keys() != set(range(*self.target)) or self.serving != self.target:
            await self._approach(snapshot, me)
        elif self._may_move:
            self._think(snapshot, me)

    def _look(self) -> tuple[Snapshot, Holder]:
        parts = self._parts
        statuses = parts.directory.alive()
        fragments = self._snapshot.fragments
        self._snapshot = surroundings.snapshot(parts.run, statuses, fragments, like=self._snapshot)
        speed = parts.serving.chain.speed or surroundings.usual_speed(parts.run, statuses)
        return self._snapshot, Holder(self._me, self.serving, self.target, parts.planner.room_bytes(), speed)

    def _think(self, snapshot: Snapshot, me: Holder) -> None:
        """Whether to go somewhere else."""
        now_s = asyncio.get_running_loop().time()
        decision = decide(snapshot, me, self._memory, now_s=now_s, load_s=self._load_s)
        self._memory = decision.memory
        claim = decision.claim if decision.act is Act.CLAIM else None
        if decision.act is Act.GO and decision.claim is not None:
            self.target = self._that_fits(decision.claim.stage, snapshot, me)
            why = "nobody else holds some of them" if decision.claim.heals else "the swarm is faster so"
            self._parts.emit(Check("moving", f"fragments {_name(self.serving)} to {_name(self.target)}: {why}", 0.0))
        if claim != self.claim or decision.act is Act.GO:
            self.claim = claim
            self._tell_all()

    def _that_fits(self, stage: Stage, snapshot: Snapshot, me: Holder) -> Stage:
        """The stages that placement thinks of fit by their fragments' sizes alone: without what others do most of, at
        either end, where that is too much."""
        rates, (first, end) = snapshot.served_rates(me), stage
        while end - first > 1 and not self._parts.planner.in_flight(range(first, end)):
            if rates[first] > rates[end - 1]:
                first += 1
            else:
                end -= 1
        return first, end

    async def _approach(self, snapshot: Snapshot, me: Holder) -> None:
        """One fragment more, or, when all are here, one less."""
        index = next_fragment(snapshot, me, self._pieces.keys())
        if index is not None:
            await self._make_room(index, snapshot, me)
            await self._load(index)
        await self._serve(stage_to_serve(*self._look(), self._pieces.keys()))
        old = self._pieces.keys() - set(range(*self.target))
        if index is None and old:
            await self._let_go(self._least_missed(old, snapshot, me))
            self._parts.trainer.limit(self._parts.planner.in_flight(self._pieces.keys()))

    async def _make_room(self, index: int, snapshot: Snapshot, me: Holder) -> None:
        """Fewer microbatches at a time beside one fragment more; where even one is too many, an old fragment goes."""
        planner = self._parts.planner
        while not planner.in_flight({*self._pieces, index}):
            old = self._pieces.keys() - set(range(*self.target))
            if not old:
                raise SwarmError(f"there is no room for fragment {index}", why="memory was planned for fewer")
            await self._let_go(self._least_missed(old, snapshot, me))
        self._parts.trainer.limit(planner.in_flight({*self._pieces, index}))

    def _least_missed(self, old: Collection[int], snapshot: Snapshot, me: Holder) -> int:
        """Of these, one at an end of what it holds: what the others do most of."""
        rates = snapshot.served_rates(me)
        ends = [index for index in old if {index - 1, index + 1} - self._pieces.keys()]
        return max(ends, key=lambda index: (rates[index], index))

    async def _load(self, index: int) -> None:
        """Raises StateError where it is somewhere and nobody gives it."""
        parts, loop = self._parts, asyncio.get_running_loop()
        began = loop.time()
        piece, start = await asyncio.to_thread(
            build, parts.run, index, device=parts.device, settings=parts.planner.settings
        )
        downloaded = await parts.averager.add(
            index, start.layout, start.state, piece.parameters, trusted=start.is_named
        )
        await parts.averager.context.at_boundary(lambda: self._put(piece))
        self._load_s = loop.time() - began
        head = next(state for state in parts.averager.states() if state.fragment == index)
        own = "the run's start" if not head.tokens else "from this peer's own copy, or rebuilt"
        origin = "downloaded" if downloaded else own
        parts.emit(Check("fragment", f"{index} at version {head.version}: {origin}", round(self._load_s, 1)))

    def _put(self, piece: Piece) -> None:
        """On the training thread, or where it stands still."""
        self._parts.inner.add(piece.spec, piece.parameters)
        self._parts.serving.compute.fragments[piece.spec.index] = piece.spec
        self._pieces[piece.spec.index] = piece

    async def _serve(self, stage: Stage) -> None:
        """From now on microbatches can use these fragments, which are all here."""
        parts, old = self._parts, self.serving
        if stage == old:
            return
        kept = max(stage[0], old[0]), min(stage[1], old[1])
        if kept[0] >= kept[1]:
            kept = NO_STAGE
        if kept != old:
            self._say_serving(kept)
            await self._end(set(range(*old)) - set(range(*kept)))
        if stage == NO_STAGE:
            return
        begins = stage[0] == 0 and (kept == NO_STAGE or kept[0] > 0)
        stream = await parts.stream() if begins else None  # before it serves: it may not be there
        made = await asyncio.to_thread(stage_of, parts.run, [self._pieces[index] for index in range(*stage)])
        await parts.averager.context.at_boundary(lambda: parts.serving.compute.restage(made))
        self._say_serving(stage)
        if stream is not None:
            await parts.trainer.originate(stream)

    async def _end(self, fragments: set[int]) -> None:
        """Microbatches under way on these fragments, which are not served any more: end them, here or elsewhere."""
        parts = self._parts
        if 0 in fragments:
            await parts.trainer.stop_originating(deadline_s=END_S)
        for patience_s, answered in ((END_S, False), (VERDICT_S, True)):
            deadline = asyncio.get_running_loop().time() + patience_s
            while parts.serving.chain.in_use(fragments) and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(LOOK_S / 10)
            await parts.serving.chain.give_up(fragments, answered=answered)

    async def _let_go(self, index: int) -> None:
        """Serve without it, then drop it."""
        parts, left = self._parts, self._pieces.keys() - {index}
        await self._serve(stage_to_serve(*self._look(), left))
        await parts.averager.context.at_boundary(lambda: parts.serving.steps.take_rest(index))
        lost = await parts.averager.remove(index, deadline_s=REMOVE_S)
        if lost:
            parts.emit(Warning(f"{lost} tokens of fragment {index} did not get into a round before it was let go of"))
        await parts.averager.context.at_boundary(lambda: self._drop(index))

    def _drop(self, index: int) -> None:
        """On the training thread, or where it stands still."""
        piece = self._pieces.pop(index)
        del self._parts.serving.compute.fragments[index]
        self._parts.inner.remove(piece.spec)

    def _say_serving(self, stage: Stage) -> None:
        self.serving = stage
        self._parts.serving.chain.first, self._parts.serving.chain.end = stage
        self._tell_all()

    def _tell_all(self) -> None:
        for peer_id in self._parts.directory.alive():
            self._parts.averager.context.spawn(self._parts.directory.tell(peer_id))


def _name(stage: Stage) -> str:
    return f"{stage[0]}:{stage[1]}" if stage != NO_STAGE else "none"
