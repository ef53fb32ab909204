"""What a peer asks of the next one: "do the rest of this microbatch". The asking half of the chain (chain.py).

The next peer is the router's choice, or whoever is said to be at it already (path hints). One that refuses, dies, or is
silent for `SILENT_S` is passed over: another is asked, from the values that are still here, and is told who does what
comes after it, so that nothing further down is done twice. Who was given up is told that it is not needed. Where nobody
else can, and this peer holds the fragment as well, it goes on itself: it had only handed over early, to share the work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from swarm.config import RunConfig
from swarm.errors import BadMessage, NetworkError, PeerGone, PeerRefused
from swarm.network import records
from swarm.network.link import Answer
from swarm.pipeline import wire
from swarm.pipeline.background import Background
from swarm.pipeline.messages import Bits, Gradient, Hop, Microbatch, Working, below
from swarm.pipeline.routing import Holder, Router

WORKING_S = 0.5
"""between two words that a peer is at it"""
SILENT_S = 2.5
"""without a word: asked elsewhere. Death is noticed at once, by the link that ends; this is for machines that freeze"""
SLOWEST_BYTES_PER_S = 64e3
"""until the first word, the microbatch may take as long as this"""
CALL_S = 600.0
NOBODY_S = 60.0
"""this long a peer waits for somebody to hold the next fragment"""
GUEST_NOBODY_S = 5.0
"""and this long for a guest, who holds a place here meanwhile and asks again"""
AGAIN_S = 0.2

log = logging.getLogger(__name__)


Myself = Callable[[Microbatch, bytes], Awaitable[Answer]]


class Calls(Protocol):
    """What the chain needs of the network: the endpoint, or a made-up one."""

    async def call(
        self, peer_id: str, method: str, header: dict[str, Any], body: bytes = b"", *, deadline_s: float,
        max_answer: int = 0, on_head: Callable[[], None] = lambda: None,
    ) -> Answer:
        """`on_head` is called when the answer has begun to come; its body may have to wait behind others."""
        ...

    async def notify(self, peer_id: str, method: str, header: dict[str, Any], *, deadline_s: float) -> None: ...

    def waiting_bytes(self, peer_id: str) -> int:
        """Of bodies that wait here for their turn on the line to that peer."""
        ...

    def last_heard(self, peer_id: str) -> float:
        """When anything came from that peer last, by the event loop's clock."""
        ...


@dataclass(frozen=True)
class Shape:
    """Of the model, as the chain needs it."""

    num_fragments: int
    hidden: int
    vocabulary: int
    max_tokens: int
    """of a microbatch: what memory was planned for"""

    @classmethod
    def of(cls, run: RunConfig, *, hidden: int, vocabulary: int) -> Shape:
        return cls(run.fragments, hidden, vocabulary, run.train.batch_sequences * run.train.sequence_length)


@dataclass
class Handover:
    """A microbatch that is to be done from fragment `end` on by others."""

    microbatch: Microbatch
    """as it came here"""
    end: int = 0
    """the fragments [start, end) are done here; 0: not decided"""
    rest: list[Hop] = field(default_factory=list)
    """who does what comes after, as far as known"""
    line_queue: float = 0.0
    """microbatches that waited for the line to the next peer when this one was sent there"""


@dataclass
class _Asked:
    """A question that is out: when its peer was last heard at it."""

    heard_at: float
    rest: list[Hop] = field(default_factory=list)
    is_coming: bool = False
    """the answer has begun to come: no more words, and its body may wait for seconds behind those of others"""

    def on_head(self) -> None:
        self.is_coming = True


class Onward:
    """Lives on the network's event loop."""

    def __init__(
        self, me: str, calls: Calls, router: Router, *, shape: Shape, holders: Callable[[], Sequence[Holder]],
        bits: Bits, back_bits: Bits,
    ) -> None:
        """`holders`: the other peers that are alive; `bits` of values that are sent on, `back_bits` of the gradients
        that are asked for."""
        self._me, self._calls, self._router, self._holders = me, calls, router, holders
        self._shape, self._bits, self._back_bits = shape, bits, back_bits
        self._asked: dict[tuple[str, tuple[str, int, int]], _Asked] = {}
        self._background = Background()
        self.myself: Myself | None = None
        """to go on here, where nobody else can; None, for a guest: never"""
        self.is_held: Callable[[int], bool] = lambda fragment: False
        """by this peer, now"""
        self.reroutes = 0
        """times that another peer was asked because the first one failed"""

    def on_working(self, sender: str, working: Working) -> None:
        """The peer that was asked is at it."""
        key = working.origin, working.number, working.start
        asked = self._asked.get((sender, key))
        if asked is not None:
            asked.heard_at = asyncio.get_running_loop().time()
            asked.rest = below(working.path, working.path[0].end) if working.path else []

    async def rest(self, going: Handover, body: bytes) -> tuple[Gradient, bytes]:
        """Have the rest of the chain done, by whoever can. Raises PeerRefused where nobody does for long.

        `body`: token ids and values, as on the wire. `going.rest` is kept up to date meanwhile."""
        clock = asyncio.get_running_loop().time
        known = below([hop for hop in going.microbatch.known if hop.start >= going.end], going.end)
        failed: set[str] = set()
        given_up: set[str] = set()
        began = since = clock()
        trains, last = going.microbatch.train, ""
        while True:
            holders = [holder for holder in self._holders() if holder.peer_id != self._me]
            here = next((h for h in holders if known and h.peer_id == known[0].peer_id), None)
            if here is None or here.peer_id in failed or known[0].start != going.end:
                known = [hop for hop in known if hop.start > going.end]
                here = self._router.choose(holders, going.end, excluded=sorted(failed))
            myself = self.myself if self.is_held(going.end) else None
            if here is not None and myself and self._router.is_banned(here.peer_id):
                here = None
            if here is None and myself is None:
                if clock() > (since + NOBODY_S if trains else began + GUEST_NOBODY_S):
                    held = any(holder.first <= going.end < holder.end for holder in holders)
                    what = "can go on at" if held else "holds"
                    raise PeerRefused(f"nobody {what} fragment {going.end}", why=last)
                failed.clear()
                await asyncio.sleep(AGAIN_S)
                continue
            try:
                if here is None:
                    assert myself is not None
                    answer = await self._go_on(myself, going, body, known)
                else:
                    answer = await self.ask(here, going, body, known)
                    given_up.discard(here.peer_id)  # it may have answered when it was asked again
                for peer_id in given_up:
                    own = going.microbatch
                    word = Working(origin=own.origin, number=own.number, start=going.end).model_dump()
                    self._background.spawn(self._calls.notify(peer_id, "withdrawn", word, deadline_s=WORKING_S))
                return answer
            except NetworkError as error:
                if here is None:
                    raise
                since = clock() if failed else since
                failed.add(here.peer_id)
                last = str(error)
                log.info("fragment %d of a microbatch: %s: %s", going.end, here.peer_id[-6:], error)
                if not isinstance(error, PeerRefused):
                    given_up.add(here.peer_id)
                    self.reroutes += 1
                    going.microbatch = going.microbatch.model_copy(update={"again": True})
                known = [hop for hop in going.rest if hop.peer_id not in failed]

    async def _go_on(
        self, myself: Myself, going: Handover, body: bytes, known: list[Hop]
    ) -> tuple[Gradient, bytes]:
        header, data = await myself(self._asking(going, known), body)
        answer = records.parse(Gradient, header)
        going.rest = list(answer.path)
        return answer, data

    def line_queue(self, peer_id: str, body_bytes: int) -> float:
        """Microbatches of that size that wait for the line to a peer."""
        return self._calls.waiting_bytes(peer_id) / max(1, body_bytes)

    def _asking(self, going: Handover, known: list[Hop]) -> Microbatch:
        return going.microbatch.model_copy(update={
            "start": going.end, "bits": self._bits, "back_bits": self._back_bits, "known": known,
        })

    async def ask(self, here: Holder, going: Handover, body: bytes, known: list[Hop]) -> tuple[Gradient, bytes]:
        """One peer, once: (its answer, the gradient's bytes). Raises NetworkError."""
        clock, own = asyncio.get_running_loop().time, going.microbatch
        microbatch = self._asking(going, known)
        going.rest = known or [Hop(peer_id=here.peer_id, start=going.end, end=here.end)]
        asked = self._asked[here.peer_id, microbatch.key] = _Asked(clock() + len(body) / SLOWEST_BYTES_PER_S)
        self._router.asked(here.peer_id)
        going.line_queue = self.line_queue(here.peer_id, len(body))
        began = clock()
        size = wire.answer_bytes(microbatch, vocabulary=self._shape.vocabulary, hidden=self._shape.hidden)
        call = asyncio.ensure_future(self._calls.call(
            here.peer_id, "microbatch", microbatch.model_dump(exclude_defaults=True), body, deadline_s=CALL_S,
            max_answer=size, on_head=asked.on_head,
        ))
        try:
            while not call.done():
                heard_at = self._calls.last_heard(here.peer_id) if asked.is_coming else asked.heard_at
                left_s = heard_at + SILENT_S - clock()
                if left_s <= 0:
                    raise PeerGone(f"{here.peer_id[-6:]} is silent")
                await asyncio.wait([call], timeout=min(left_s, WORKING_S))
                if asked.rest:
                    going.rest = [Hop(peer_id=here.peer_id, start=going.end, end=asked.rest[0].start), *asked.rest]
            header, data = call.result()
            answer = records.parse(Gradient, header)
            answer.check(microbatch, here.peer_id, self._shape.num_fragments)
            if len(data) != size:
                raise BadMessage("an answer of a wrong size")
        except PeerRefused:
            self._router.refused(here.peer_id)
            raise
        except NetworkError:
            self._router.failed(here.peer_id)
            raise
        except asyncio.CancelledError:
            self._router.withdrawn(here.peer_id)
            raise
        finally:
            call.cancel()
            del self._asked[here.peer_id, microbatch.key]
        if own.train:
            self._router.answered(
                here.peer_id, fragments=answer.path[0].end - going.end, total_s=clock() - began,
                inside_s=answer.inside_s, service_s=answer.service_s, queue=answer.queue,
            )
        else:
            self._router.answered_guest(here.peer_id)
        going.rest = list(answer.path)
        return answer, data

    async def stop(self) -> None:
        await self._background.stop()
