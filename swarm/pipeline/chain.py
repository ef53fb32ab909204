"""The chain: how a microbatch passes through the swarm and its gradient comes back (DESIGN 7).

    origin                      next peer                        last peer
    forward ----- values ---->  forward ------- values ------->  forward, loss, backward
            <---- working ----          <------ working -------
                                backward <----- gradient ------
    backward <--- gradient ---
    verdict: done ------------> add up      (each peer of the path is told)

The call is nested: what comes back to whoever sent values is their gradient, so activations cross each link once each
way and pass through no hub: 2(S-1) of them for S stages, where the origin as hub takes 5(S-1) (SWARM, arXiv
2301.11913, and Petals, arXiv 2209.01188). Now and then each peer tells whoever asked that it is at it, and who does the
rest.

Exactly once. A microbatch is named by its origin, a number, and the fragment at which a peer enters it. Asking a second
time is joining the first: work under way is waited for, a finished answer is kept. A peer whose next one dies or falls
silent asks another, from the values that it still has, and says who does the rest further down; the new one hands over
there, and they answer without doing it again. So whatever dies, its neighbour above repairs it, forward or backward,
and nothing else is computed twice. Gradients are added up only on the origin's verdict, which names one peer a
fragment: a slow peer that was given up and finishes all the same is told that it is not needed, or nothing at all.

The origin itself is the first link: its own microbatches enter here at fragment 0. If it dies, nobody speaks for its
microbatches, and after `FORGET_S` they are gone everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swarm.data.batch import Batch
from swarm.errors import NetworkError, PeerRefused
from swarm.network import records
from swarm.network.link import Answer, Link
from swarm.pipeline import admission, onward, wire
from swarm.pipeline.background import Background
from swarm.pipeline.compute import StageCompute
from swarm.pipeline.messages import Bits, Gradient, Hop, Microbatch, Verdict, Working
from swarm.pipeline.onward import AGAIN_S, WORKING_S, Calls, Handover, Onward, Shape
from swarm.pipeline.routing import Holder, Router
from swarm.pipeline.work import BACKWARD, FORWARD, GUEST, OWN, REPAIR, VERDICT, Work

FORGET_S = 120.0
ORPHAN_S = 10.0
"""a peer that is alive has told so by then, and an origin speaks within seconds"""
KEPT_DONE = 4096

Read = Callable[[], tuple[Batch, torch.Tensor | None]]
"""a microbatch and its hidden states (None at fragment 0); checks what a stranger sent, so it may raise"""


@dataclass
class _Entry(Handover):
    """A microbatch at this peer."""

    at: float = 0.0
    """when it was begun, was answered, or the last call that waited for it ended"""
    askers: set[str] = field(default_factory=set)
    """who wants the answer; nobody any more: it is forgotten"""
    waiting: int = 0
    """calls that wait for it"""
    task: asyncio.Task[Answer] | None = None

    def is_answered(self) -> bool:
        task = self.task
        return task is not None and task.done() and not task.cancelled() and task.exception() is None


class Chain:
    """One peer's link of it. Lives on the network's event loop; `work` takes what is computed to the training
    thread."""

    def __init__(
        self, me: str, calls: Calls, work: Work, compute: StageCompute, router: Router, *, shape: Shape,
        first: int, end: int, holders: Callable[[], Sequence[Holder]], is_alive: Callable[[str], bool],
        bits: Bits = 8, back_bits: Bits = 8,
        is_ready: Callable[[int, int, int], bool] = lambda start, end, version: True, max_in_flight: int = 64,
    ) -> None:
        """Fragments [first, end) are held here. `holders`: the other peers that are alive; `is_ready(start, end,
        version)`: are these fragments at that version here (`sync` runs)? `max_in_flight`: microbatches that there is
        memory for here; `is_alive(peer_id)`: has that peer been heard of late, whether it serves anything or not?

        `first`, `end` and `max_in_flight` may be assigned while this peer serves, between two messages: a microbatch
        looks at them when it comes and when it is begun, and what it was begun with stays its own."""
        self._me, self._calls, self._work, self._compute, self._router = me, calls, work, compute, router
        self.shape, self.first, self.end = shape, first, end
        self._holders, self._bits, self._back_bits, self._is_ready = holders, bits, back_bits, is_ready
        self._is_alive, self.max_in_flight = is_alive, max_in_flight
        self._entries: dict[tuple[str, int, int], _Entry] = {}
        self._done: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._background = Background()
        self._service_s = 0.0
        self.speed = 0.0
        """fragments times tokens a second while it computes, of late; 0: not known yet"""
        self.on_committed: Callable[[int, int], None] = lambda start, end: None
        """gradients of fragments [start, end) were added up; on the training thread"""
        self.onward = Onward(me, calls, router, shape=shape, holders=holders, bits=bits, back_bits=back_bits)
        """what is asked of the next peers"""
        self.onward.myself = self._go_on
        self.onward.is_held = lambda fragment: self.first <= fragment < self.end

    # -- what others ask --------------------------------------------------------------------------------------------

    async def on_microbatch(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        microbatch = records.parse(Microbatch, header)
        return await self.serve(microbatch, body, asker=link.peer_id)

    async def serve(self, microbatch: Microbatch, body: bytes, *, asker: str) -> Answer:
        """Do the rest of a microbatch, or join who is doing it. Raises NetworkError."""
        # own ones come back to be gone on with, and have their place; a stranger may only say that one is ours
        is_own = microbatch.origin == self._me and (self._me, microbatch.number, 0) in self._entries
        entry = self._entry(microbatch, body, is_own=is_own)
        entry.askers.add(asker)
        entry.waiting += 1
        assert entry.task is not None
        pulse = asyncio.ensure_future(self._tell_working(asker, entry))
        try:
            return await asyncio.shield(entry.task)
        except asyncio.CancelledError:
            if entry.task.cancelled():
                raise PeerRefused("this peer has stopped working") from None
            raise
        finally:
            pulse.cancel()
            entry.waiting -= 1
            entry.at = asyncio.get_running_loop().time()

    async def _go_on(self, microbatch: Microbatch, body: bytes) -> Answer:
        """The rest of a microbatch that has a place here already and was handed over early, to peers that are gone now:
        its other fragments are computed as a microbatch of their own. Memory is planned for all of them."""
        entry = self._entry(microbatch, body, is_own=True)
        entry.waiting += 1
        assert entry.task is not None
        try:
            return await asyncio.shield(entry.task)
        except asyncio.CancelledError:
            if entry.task.cancelled():
                raise PeerRefused("this peer has stopped working") from None
            if not entry.askers:
                self._background.spawn(self._forget([microbatch.key]))
            raise
        finally:
            entry.waiting -= 1
            entry.at = asyncio.get_running_loop().time()

    def _entry(self, microbatch: Microbatch, body: bytes, *, is_own: bool) -> _Entry:
        """A microbatch that is here, or is begun."""
        return self._entries.get(microbatch.key) or self._begin(microbatch, is_own=is_own, read=lambda: wire.read(
            microbatch, body, vocabulary=self.shape.vocabulary, hidden=self.shape.hidden, device=self._compute.device
        ))

    def on_working(self, sender: str, working: Working) -> None:
        self.onward.on_working(sender, working)

    async def on_withdrawn(self, sender: str, working: Working) -> None:
        """Whoever asked has the answer from somebody else."""
        entry = self._entries.get((working.origin, working.number, working.start))
        if entry is not None and sender in entry.askers:
            entry.askers.discard(sender)
            if not entry.askers and entry.microbatch.origin != self._me:
                await self._forget([entry.microbatch.key])

    async def judge(self, origin: str, verdicts: Sequence[Verdict]) -> list[int]:
        """Add up the gradients of microbatches that are done, and forget what else was done of them here; returns the
        numbers of those that are not here."""
        done: list[tuple[tuple[str, int, int], int]] = []
        missing = []
        for verdict in verdicts:
            key = origin, verdict.number, verdict.start
            entry = self._entries.get(key)
            if entry is not None and entry.is_answered() and entry.end == verdict.end:
                done.append((key, verdict.end))
                del self._entries[key]
            elif (origin, verdict.number) not in self._done:
                missing.append(verdict.number)
        settled = {(origin, verdict.number) for verdict in verdicts}
        self._done.update(dict.fromkeys(settled))  # before anything is awaited: the same words may come again
        while len(self._done) > KEPT_DONE:
            self._done.popitem(last=False)

        def commit() -> None:
            for key, end in done:
                self._compute.commit(key)
                self.on_committed(key[2], end)

        if done:
            await self._work(commit, urgency=VERDICT)
        await self._forget([key for key in self._entries if key[:2] in settled])
        return missing

    # -- what this peer does ----------------------------------------------------------------------------------------

    async def begin_own(self, number: int, batch: Batch, *, train: bool = True, version: int = 0) -> Gradient:
        """The answer to a microbatch of this peer's own. Raises PeerRefused where nobody can go on with it; asking
        again goes on from there."""
        microbatch = Microbatch(
            origin=self._me, number=number, start=0, sequences=len(batch), length=batch.tokens.shape[1],
            bits=self._bits, back_bits=self._back_bits, train=train, version=version, segments=batch.num_segments,
        )
        entry = self._entries.get(microbatch.key) or self._begin(
            microbatch, lambda: (batch, None), is_own=True
        )
        assert entry.task is not None
        header, _ = await asyncio.shield(entry.task)
        return records.parse(Gradient, header)

    def _begin(self, microbatch: Microbatch, read: Read, *, is_own: bool) -> _Entry:
        self._check_held(microbatch)
        if (microbatch.origin, microbatch.number) in self._done:
            raise PeerRefused("that microbatch is done")
        if len(self._entries) >= self.max_in_flight:
            self._background.spawn(self._forget(self._orphans()))
        here = (entry.microbatch for entry in self._entries.values())
        admission.check(microbatch, here, shape=self.shape, max_in_flight=self.max_in_flight, is_own=is_own)
        entry = _Entry(microbatch, at=asyncio.get_running_loop().time())
        self._entries[microbatch.key] = entry
        entry.task = asyncio.ensure_future(self._do(entry, read))
        entry.task.add_done_callback(lambda task: self._ended(entry, task))
        return entry

    def _check_held(self, microbatch: Microbatch) -> None:
        if not self.first <= microbatch.start < self.end:
            raise PeerRefused(f"fragment {microbatch.start} is not held here")

    def _ended(self, entry: _Entry, task: asyncio.Task[Answer]) -> None:
        entry.at = asyncio.get_running_loop().time()
        if task.cancelled() or task.exception() is not None or not entry.microbatch.train:  # can be asked again
            if self._entries.get(entry.microbatch.key) is entry:
                del self._entries[entry.microbatch.key]
            key = entry.microbatch.key
            if entry.microbatch.train:
                self._background.spawn(self._work(lambda: self._compute.forget(key), urgency=VERDICT))

    async def _do(self, entry: _Entry, read: Read) -> Answer:
        """Forward, the rest of the chain, backward."""
        asked, clock = entry.microbatch, asyncio.get_running_loop().time
        began, queue = clock(), self._work.queue
        entry.end = self._leave_at(asked)
        while asked.version and not self._is_ready(asked.start, entry.end, asked.version):
            if clock() > began + onward.NOBODY_S:
                raise PeerRefused(f"version {asked.version} did not come within {onward.NOBODY_S:.0f} s")
            await asyncio.sleep(AGAIN_S / 10)
        hop = Hop(peer_id=self._me, start=asked.start, end=entry.end)
        usual = REPAIR if asked.again else OWN if asked.origin == self._me else FORWARD
        urgency = usual if asked.train else GUEST
        if entry.end == self.shape.num_fragments:
            def last() -> tuple[float, bytes]:
                batch, values = read()
                entered = batch.tokens if values is None else values
                if asked.logits:
                    logits = self._compute.logits(
                        entered, start=asked.start, end=entry.end, positions=asked.logits, segments=batch.segments
                    )
                    return 0.0, wire.encode_values(logits, 32)
                loss, gradient = self._compute.loss(
                    asked.key, entered, batch.tokens, start=asked.start, end=entry.end, keep=asked.train,
                    segments=batch.segments,
                )
                return loss, b"" if gradient is None else wire.encode_values(gradient, asked.back_bits)

            done = await self._work(last, urgency=urgency)
            (loss, body), service_s, waited_s = done.value, done.service_s, done.waited_s
            path, crowded = [hop], 0.0
        else:
            def forward() -> bytes:
                batch, values = read()
                left = self._compute.forward(
                    asked.key, batch.tokens if values is None else values, start=asked.start, end=entry.end,
                    tokens=asked.tokens, keep=asked.train, segments=batch.segments,
                )
                what = wire.encode_batch(batch, vocabulary=self.shape.vocabulary)
                return what + wire.encode_values(left, self._bits)

            there = await self._work(forward, urgency=urgency)
            answer, came = await self.onward.rest(entry, there.value)
            shape = (asked.sequences, asked.length, self.shape.hidden)

            def backward() -> bytes:
                gradient = self._compute.backward(
                    asked.key, wire.decode_values(came, shape, self._back_bits, device=self._compute.device)
                )
                return b"" if gradient is None else wire.encode_values(gradient, asked.back_bits)

            loss, path, crowded = answer.loss, [hop, *answer.path], max(answer.crowded, entry.line_queue)
            body, service_s, waited_s = came, there.service_s, there.waited_s
            if asked.train:
                back = await self._work(backward, urgency=BACKWARD)
                body, service_s, waited_s = back.value, service_s + back.service_s, waited_s + back.waited_s
        share_s = service_s / (entry.end - asked.start)
        if asked.train:
            self._service_s = self._service_s + 0.2 * (share_s - self._service_s) if self._service_s else share_s
            self.speed = asked.tokens / max(self._service_s, 1e-9)
        lines = [self.onward.line_queue(asker, len(body)) for asker in entry.askers if body]
        header = Gradient(
            loss=loss, path=path, inside_s=clock() - began, service_s=service_s, waited_s=waited_s, queue=queue,
            crowded=min(max(crowded, waited_s / max(service_s, 1e-6), *lines), 1e6),
        )
        return header.model_dump(), body

    def _leave_at(self, asked: Microbatch) -> int:
        """Where to hand over: where somebody further down is at it already, else where it is done soonest."""
        self._check_held(asked)  # again: the stage may have changed since it came
        known = [hop.start for hop in asked.known if asked.start < hop.start <= self.end]
        if known:
            return min(known)
        return self._router.leave_at(
            self._holders(), start=asked.start, end=self.end, queue=self._work.queue, service_s=self._service_s,
            num_fragments=self.shape.num_fragments,
        )

    async def _tell_working(self, asker: str, entry: _Entry) -> None:
        own = entry.microbatch
        while True:
            path = [Hop(peer_id=self._me, start=own.start, end=entry.end), *entry.rest] if entry.end else []
            word = Working(origin=own.origin, number=own.number, start=own.start, path=path)
            with contextlib.suppress(NetworkError):
                await self._calls.notify(asker, "working", word.model_dump(), deadline_s=WORKING_S)
            await asyncio.sleep(WORKING_S)

    # -- a stage that changes ---------------------------------------------------------------------------------------

    def in_use(self, fragments: Collection[int]) -> int:
        """Microbatches here that need any of these fragments, or whose gradients of them wait for a verdict."""
        return len(self._needing(fragments))

    async def give_up(self, fragments: Collection[int], *, answered: bool) -> None:
        """Refuse them: whoever asked goes elsewhere. `answered`: those too that wait for nothing but their verdict."""
        keys = self._needing(fragments)
        await self._forget([key for key in keys if answered or not self._entries[key].is_answered()])

    def _needing(self, fragments: Collection[int]) -> list[tuple[str, int, int]]:
        def needs(start: int, end: int) -> bool:  # where the end is not decided, it will be by the new stage
            return any(start <= fragment < max(end, start + 1) for fragment in fragments)

        return [key for key, entry in self._entries.items() if needs(key[2], entry.end)]

    # -- the end ----------------------------------------------------------------------------------------------------

    async def forget_old(self) -> None:
        """Microbatches whose origin has not spoken for `FORGET_S` since they were computed, and those under way that
        nobody waits for; call it now and then."""
        now = asyncio.get_running_loop().time()
        old = [
            key for key, entry in self._entries.items()
            if entry.task is not None and entry.task.done() and now - entry.at > FORGET_S
        ]
        await self._forget(old + [key for key in self._orphans() if not self._entries[key].is_answered()])
        self._router.forget([holder.peer_id for holder in self._holders()])

    def _orphans(self) -> list[tuple[str, int, int]]:
        """Microbatches whose origin is not there any more: under way and nobody has waited for them for a while (who
        needs one asks again within seconds), or waiting for its verdict. In a small peer a few of them would keep
        everybody else out, and they would go on asking others."""
        now = asyncio.get_running_loop().time()

        def is_orphan(entry: _Entry) -> bool:
            origin = entry.microbatch.origin
            if origin == self._me or now - entry.at <= ORPHAN_S:
                return False
            return not self._is_alive(origin) if entry.is_answered() else not entry.waiting

        return [key for key, entry in self._entries.items() if is_orphan(entry)]

    async def _forget(self, keys: list[tuple[str, int, int]]) -> None:
        for key in keys:
            entry = self._entries.pop(key, None)
            if entry is None:
                continue
            if entry.task is not None and not entry.task.done():
                entry.task.cancel()  # _ended drops what is in memory
            else:
                await self._work(lambda key=key: self._compute.forget(key), urgency=VERDICT)  # type: ignore[misc]

    async def stop(self) -> None:
        tasks: list[asyncio.Task[Any]] = [e.task for e in self._entries.values() if e.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._background.stop()
        await self.onward.stop()
