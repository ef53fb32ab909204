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
from collections.abc import Callable

import torch

from swarm.averaging.averager import Averager
from swarm.config import RunConfig
from swarm.data.stream import PackedStream
from swarm.network.network import Network
from swarm.train.metered import Metered
from swarm.train.serving import Serving, microbatch_sequences
from swarm.train.trainer import give_way

WAIT_S = 0.01
"""rounds wait at most this long for an idle training thread to let them at the weights"""
SETTLE_S = 15.0
"""when leaving: until the origins of microbatches that were done here have spoken"""
QUIET_S = 1.5
"""when leaving: others may leave at the same moment and still need this peer for what they have under way"""


class StageTrainer(Metered):
    """Has the same face as `Trainer`. `stream`: where this peer holds the first fragment."""

    def __init__(
        self, run: RunConfig, serving: Serving, averager: Averager, network: Network, *, stream: PackedStream | None
    ) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self.on_step: Callable[[float, int], None] = lambda loss, tokens: None
        """called with loss and tokens of each microbatch of its own that is done"""
        self._run, self._serving, self._averager, self._network = run, serving, averager, network
        self._stream = stream
        self._settled_by = float("inf")
        self._worked_at = 0.0
        self._leave, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)
        self._originating: concurrent.futures.Future[None] | None = None
        serving.chain.on_committed = lambda start, end: self._committed()

    def start(self) -> None:
        self._serving.boundary.open()
        self._thread.start()
        if self._serving.origin is not None:
            self._originating = self._network.submit(self._originate())

    def stop(self) -> None:
        """Finishes the microbatches under way, its own and others', takes a last step, and returns."""
        self._leave.set()
        if self._thread.is_alive():
            self._settled_by = time.monotonic() + SETTLE_S
            if self._originating is not None:
                with contextlib.suppress(Exception):
                    self._originating.result(timeout=SETTLE_S)
            self._stop.set()
            self._thread.join()
        if self._originating is not None:
            self._originating.cancel()

    @property
    def tokens(self) -> int:
        """trained since this peer started; with a part of the model, that part of each token"""
        return round(self._serving.steps.shares)

    def done(self, loss: float, tokens: int) -> None:
        """A microbatch of its own is done everywhere."""
        self._losses.append(loss)
        self.on_step(loss, tokens)

    # -- on the training thread -------------------------------------------------------------------------------------

    def _train(self) -> None:
        give_way()
        serving = self._serving
        try:
            while not self._is_over():
                serving.boundary.pass_by()
                if serving.work.run_next(wait_s=WAIT_S):
                    self._worked_at = time.monotonic()
            serving.steps.take_rest()
        except BaseException as error:
            self.error = error
        finally:
            serving.work.close()
            serving.boundary.close()

    def _is_over(self) -> bool:
        if not self._stop.is_set():
            return False
        now = time.monotonic()
        quiet = self._serving.compute.in_flight == 0 and now - self._worked_at > QUIET_S
        return quiet or now > self._settled_by

    def _committed(self) -> None:
        self._serving.steps.take_due()
        self._averager.tokens_per_s = self._note(self._serving.steps.shares)

    # -- on the network's thread ------------------------------------------------------------------------------------

    async def _originate(self) -> None:
        origin = self._serving.origin
        assert origin is not None
        try:
            if self._run.averaging.mode == "sync":
                await self._step_forever()
            else:
                await origin.run(until=self._leave.is_set)
        except Exception as error:
            self.error = error
            self._stop.set()

    async def _step_forever(self) -> None:
        """`sync`: a batch, then a round of every fragment, again."""
        origin, stream = self._serving.origin, self._stream
        assert origin is not None and stream is not None

        def oldest() -> int:
            return min(state.version for state in self._averager.states())

        while not self._leave.is_set():
            batch = stream.next_batch(self._run.train.batch_sequences)
            version = oldest()
            pieces = list(torch.split(batch, microbatch_sequences(self._run)))
            self.done(await origin.step(pieces, version=version), batch.numel())
            deadline = time.monotonic() + self._run.averaging.max_round_s
            # a fragment held here may have been done by another holder: nothing is pending then, and the step not over
            while (oldest() <= version or any(self._averager.pending())) and time.monotonic() < deadline:
                if self._leave.is_set():
                    break
                await asyncio.sleep(WAIT_S)
