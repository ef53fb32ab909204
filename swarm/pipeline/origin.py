"""The origin of microbatches: draws text, sends it down the chain, and says which peers' gradients count.

Several microbatches are under way at once, so that computing and links overlap. How many is the origin's credit: one
more while no peer of the path has microbatches waiting for its processor or its line, fewer where several wait. That
keeps queues short everywhere without any peer being told how fast the others are, and it bounds the memory of all of
them, and how old weights get between forward and backward. (Processors alone once counted; where lines were the bound,
the credit went to its limit, and the microbatches stood in queues for ten seconds.)
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable

from swarm.data.batch import Batch
from swarm.errors import NetworkError
from swarm.pipeline.chain import Chain
from swarm.pipeline.messages import Gradient, Verdict, Verdicts
from swarm.pipeline.onward import AGAIN_S, Calls

VERDICT_S = 5.0
VERDICT_TRIES = 6
CROWDED, IDLE = 6.0, 2.0
"""microbatches that wait: they come in no order, so a processor that is never idle has some waiting. Simulated,
four stages with links as long as their computing: 8 under way are 0.83 of the bound, 12 are 0.98, and where turns and
transfers differ by 30 %, 12 are 0.85, 16 are 0.93. With 8 and 3, or 10 and 4, lines of 100 Mbit/s made no more than
with these"""
AIM = (CROWDED + IDLE) / 2
"""microbatches that shall wait after the credit was too much"""
LESS, LEAST = 0.8, 0.5
"""of the credit is left, at most and at least, where it was too much"""

log = logging.getLogger(__name__)


class Credit:
    """How many microbatches may be under way: doubled until somebody is busy, then one more at a time, or fewer by as
    many as wait in vain, after as many answers as are under way."""

    def __init__(self, *, first: int = 2, largest: int) -> None:
        self.now = min(first, largest)
        self.largest, self._opening = largest, True
        self._seen: list[float] = []
        self._fresh = 0
        """the first microbatch that was begun after the last change: those before say nothing of it"""

    def learn(self, crowded: float, *, number: int, following: int) -> None:
        """`crowded`: microbatches that waited for the busiest processor or line of this one's path; `following`: the
        number of the next one that will be begun."""
        if number < self._fresh:
            return
        self._seen.append(crowded)
        if len(self._seen) < self.now:
            return
        self._fresh = following
        standing = sorted(self._seen)[len(self._seen) // 4]  # bursts wait for each other, a lasting queue holds up all
        self._seen.clear()
        if standing >= IDLE:
            self._opening = False
        if standing > CROWDED:
            less = max(LEAST * self.now, min(LESS * self.now, self.now - (standing - AIM)))
            self.now = max(1, int(less))
        elif standing < IDLE:
            self.now = min(self.largest, 2 * self.now if self._opening else self.now + 1)


class Origin:
    """`draw()` returns a microbatch, at once or when there is text; `on_done(loss, tokens)` is called for each of them
    that is done everywhere. Lives on the network's event loop."""

    def __init__(
        self, me: str, chain: Chain, calls: Calls, *, draw: Callable[[], Batch | Awaitable[Batch]], first_number: int,
        largest_credit: int, on_done: Callable[[float, int], None] = lambda loss, tokens: None,
    ) -> None:
        """`first_number`: beyond any that this identity has used before."""
        self._me, self._chain, self._calls, self._draw, self._on_done = me, chain, calls, draw, on_done
        self.credit = Credit(largest=largest_credit)
        self._number = first_number
        self._running: set[asyncio.Task[None]] = set()
        self._telling: set[asyncio.Task[None]] = set()
        self.lost_tokens = 0
        """of fragments of peers that could not be told that a microbatch is done"""

    async def run(self, *, until: Callable[[], bool]) -> None:
        """Keep the credit used until told to stop; then wait for what is under way."""
        while not until():
            self.credit.now = min(self.credit.now, self.credit.largest)
            while len(self._running) < self.credit.now and not until():
                drawn = self._draw()
                self._start(drawn if isinstance(drawn, Batch) else await drawn)
            if not self._running:
                break
            done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a bug of ours must not pass for a peer that is slow
        await self.finish()

    async def step(self, microbatches: list[Batch], *, version: int) -> float:
        """`sync` runs: all of these, once every fragment is at `version`. Returns the mean loss over their targets."""
        losses = await asyncio.gather(*(self._one(batch, version=version) for batch in microbatches))
        targets = [batch.num_targets for batch in microbatches]
        return sum(loss * count for loss, count in zip(losses, targets, strict=True)) / max(1, sum(targets))

    async def finish(self) -> None:
        while self._running or self._telling:
            await asyncio.wait(self._running | self._telling)

    def _start(self, batch: Batch) -> None:
        async def one() -> None:
            self._on_done(await self._one(batch), batch.numel())

        task = asyncio.ensure_future(one())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _one(self, batch: Batch, *, version: int = 0) -> float:
        """One microbatch, until it is done. Only the end of this peer keeps it from that."""
        number, self._number = self._number, self._number + 1
        while True:
            try:
                answer = await self._chain.begin_own(number, batch, version=version)
                break
            except NetworkError as error:
                log.info("microbatch %d: %s; trying again", number, error)
                await asyncio.sleep(AGAIN_S)
        self.credit.learn(answer.crowded, number=number, following=self._number)
        verdicts = self._verdicts(number, answer)
        await self._chain.judge(self._me, verdicts.pop(self._me, []))
        telling = [self._tell(peer_id, theirs, batch.numel()) for peer_id, theirs in verdicts.items()]
        if version:
            await asyncio.gather(*telling)
        else:
            for words in telling:
                task = asyncio.ensure_future(words)
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)
        return answer.loss

    def _verdicts(self, number: int, answer: Gradient) -> dict[str, list[Verdict]]:
        """One peer for each fragment."""
        verdicts: defaultdict[str, list[Verdict]] = defaultdict(list)
        for hop in answer.path:
            verdicts[hop.peer_id].append(Verdict(number=number, start=hop.start, end=hop.end))
        return verdicts

    async def _tell(self, peer_id: str, verdicts: list[Verdict], tokens: int) -> None:
        """It must hear of it as long as it lives: until then its gradients wait."""
        words = Verdicts(verdicts=verdicts).model_dump()
        for attempt in range(VERDICT_TRIES):
            try:
                header, _ = await self._calls.call(peer_id, "verdicts", words, deadline_s=VERDICT_S)
                if header.get("missing"):
                    log.warning("%s had forgotten a microbatch that is done", peer_id[-6:])
                    break
                return
            except NetworkError:
                await asyncio.sleep(AGAIN_S * 2**attempt)
        self.lost_tokens += tokens * sum(verdict.end - verdict.start for verdict in verdicts)

    async def stop(self) -> None:
        tasks = [*self._running, *self._telling]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
