"""The training thread of a peer that holds a part of the model.

It computes what the chain asks for: microbatches of its own, where it holds the first fragment, and those of others. It
never waits for a round (I3); in a `sync` run its own next step begins once all fragments have the version that the last
one led to.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from swarm.averaging.averager import Averager
from swarm.config import RunConfig
from swarm.data.stream import PackedStream
from swarm.network.network import Network
from swarm.pipeline.chain import Chain
from swarm.pipeline.compute import StageCompute
from swarm.pipeline.origin import Origin
from swarm.pipeline.work import WorkQueue
from swarm.train.boundary import Boundary
from swarm.train.stage_steps import StageSteps
from swarm.train.trainer import RECENT_STEPS, SPEED_WINDOW_S, give_way

WAIT_S = 0.01
"""rounds wait at most this long for an idle training thread to let them at the weights"""
PIECES = 4
"""microbatches in the batch of one inner step"""
SETTLE_S = 15.0
"""when leaving: until the origins of microbatches that were done here have spoken"""
CREDIT = 16
"""own microbatches under way, at most"""
FORGET_EVERY_S = 10.0


class StageTrainer:
    """Has the same face as `Trainer`. `stream`: where this peer holds the first fragment."""

    def __init__(
        self, run: RunConfig, steps: StageSteps, compute: StageCompute, chain: Chain, work: WorkQueue,
        averager: Averager, network: Network, boundary: Boundary, *, origin: Origin | None,
        stream: PackedStream | None,
    ) -> None:
        self.error: BaseException | None = None
        self.on_step: Callable[[float, int], None] = lambda loss, tokens: None
        """called with loss and tokens of each microbatch of its own that is done"""
        self._run, self._steps, self._compute, self._chain, self._work = run, steps, compute, chain, work
        self._averager, self._network, self._boundary, self._origin = averager, network, boundary, origin
        self._stream = stream
        self._losses: deque[float] = deque(maxlen=RECENT_STEPS)
        self._times: deque[tuple[float, float]] = deque([(time.monotonic(), 0.0)])
        self._stop, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)
        self._background: list[concurrent.futures.Future[None]] = []
        chain.on_committed = lambda start, end: self._committed()

    def start(self) -> None:
        self._boundary.open()
        self._thread.start()
        self._background = [self._network.submit(self._tidy_forever())]
        if self._origin is not None:
            self._background.append(self._network.submit(self._originate()))

    def stop(self) -> None:
        """Finishes the microbatches under way, its own and others', takes a last step, and returns."""
        self._leave.set()
        if self._thread.is_alive():
            with contextlib.suppress(Exception):
                for task in self._background[1:]:
                    task.result(timeout=SETTLE_S)
            self._stop.set()
            self._thread.join()
        for task in self._background:
            task.cancel()

    @property
    def tokens(self) -> int:
        """trained since this peer started; those of a part of the model count by that part"""
        return round(self._steps.shares)

    @property
    def loss(self) -> float | None:
        """Mean of its own recent microbatches, nats a token; None where it draws none."""
        losses = list(self._losses)
        return sum(losses) / len(losses) if losses else None

    @property
    def tokens_per_s(self) -> float:
        (began, before), (now, tokens) = self._times[0], self._times[-1]
        return (tokens - before) / (now - began) if now > began else 0.0

    def done(self, loss: float, tokens: int) -> None:
        """A microbatch of its own is done everywhere."""
        self._losses.append(loss)
        self.on_step(loss, tokens)

    def _train(self) -> None:
        give_way()
        try:
            until = float("inf")
            while not (self._stop.is_set() and (self._compute.in_flight == 0 or time.monotonic() > until)):
                self._boundary.pass_by()
                self._work.run_next(wait_s=WAIT_S)
                if self._stop.is_set() and until == float("inf"):
                    until = time.monotonic() + SETTLE_S
            self._steps.take_rest()
        except BaseException as error:
            self.error = error
        finally:
            self._work.close()
            self._boundary.close()

    def _committed(self) -> None:
        self._steps.take_due()
        now = time.monotonic()
        self._times.append((now, self._steps.shares))
        while len(self._times) > 2 and now - self._times[0][0] > SPEED_WINDOW_S:
            self._times.popleft()
        self._averager.tokens_per_s = self.tokens_per_s

    # -- on the network's thread ------------------------------------------------------------------------------------

    async def _originate(self) -> None:
        assert self._origin is not None
        try:
            if self._run.averaging.mode == "sync":
                await self._step_forever()
            else:
                await self._origin.run(until=self._leave.is_set)
        except Exception as error:
            self.error = error
            self._stop.set()

    async def _step_forever(self) -> None:
        """`sync`: a batch, then a round of every fragment, again."""
        assert self._origin is not None and self._stream is not None
        while not self._leave.is_set():
            batch = self._stream.next_batch(self._run.train.batch_sequences)
            version = min(state.version for state in self._averager.states())
            loss = await self._origin.step(list(batch.split(microbatch_sequences(self._run))), version=version)
            self._losses.append(loss)
            self.on_step(loss, batch.numel())
            await self._averager.announce()
            deadline = time.monotonic() + self._run.averaging.max_round_s
            while any(self._averager.pending()) and time.monotonic() < deadline and not self._leave.is_set():
                await asyncio.sleep(WAIT_S)

    async def _tidy_forever(self) -> None:
        while True:
            await asyncio.sleep(FORGET_EVERY_S)
            await self._chain.forget_old()


def microbatch_sequences(run: RunConfig) -> int:
    return max(1, run.train.batch_sequences // PIECES)


def drawn(stream: PackedStream, run: RunConfig) -> Callable[[], torch.Tensor]:
    """Draws microbatches [sequences, length]."""
    return lambda: stream.next_batch(microbatch_sequences(run))
