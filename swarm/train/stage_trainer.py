"""The training thread of a peer that holds a part of the model.

It computes what the chain asks for: microbatches of its own, where it holds the first fragment, and those of others. It
never waits for a round (I3); in a `sync` run its own next step begins once all fragments have the version that the last
one led to.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

from swarm.averaging.averager import Averager
from swarm.config import RunConfig
from swarm.data.text_stream import TextClosed, TextStream, drawn
from swarm.network.network import Network
from swarm.pipeline.origin import Origin
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
    """Has the same face as `Trainer`."""

    def __init__(
        self, run: RunConfig, serving: Serving, averager: Averager, network: Network, *, stream: TextStream | None
    ) -> None:
        """`stream`: where this peer serves the first fragment at its start."""
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
        self._origin: Origin | None = None
        self._originating: asyncio.Task[None] | None = None
        self._no_more = False
        """own microbatches end, and others' do not"""
        serving.chain.on_committed = lambda start, end: self._committed()

    def start(self) -> None:
        self._serving.boundary.open()
        self._thread.start()
        if self._stream is not None:
            self._network.run(self.originate(self._stream))

    def stop(self) -> None:
        """Finishes the microbatches under way, its own and others', takes a last step, and returns."""
        self._leave.set()
        if self._thread.is_alive():
            self._settled_by = time.monotonic() + SETTLE_S
            with contextlib.suppress(Exception):
                self._network.run(self.stop_originating(deadline_s=SETTLE_S), timeout_s=2 * SETTLE_S)
            self._stop.set()
            self._thread.join()

    @property
    def tokens(self) -> int:
        """trained since this peer started; with a part of the model, that part of each token"""
        return round(self._serving.steps.shares)

    @property
    def speed(self) -> float:
        """Fragments times tokens a second that it could do, by how long microbatches take it; 0: not known yet."""
        return self._serving.chain.speed

    def _done(self, loss: float, tokens: int) -> None:
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

    async def originate(self, stream: TextStream) -> None:
        """This peer serves the first fragment: from now on it draws text, too."""
        self._stream, self._no_more = stream, False
        self._origin = self._serving.new_origin(stream, self._done)
        self._originating = asyncio.create_task(self._originate(self._origin, stream))

    async def stop_originating(self, *, deadline_s: float) -> None:
        """No new microbatches of its own; what is not done by the deadline is given up, and counts nowhere."""
        if self._origin is None or self._originating is None:
            return
        self._no_more = True
        await asyncio.wait([self._originating], timeout=deadline_s)
        await self._origin.stop()
        self._originating.cancel()
        self._origin = self._originating = None

    def limit(self, in_flight: int) -> None:
        """Microbatches that there is room for at once, from now on."""
        self._serving.chain.max_in_flight = in_flight
        if self._origin is not None:
            self._origin.credit.largest = in_flight

    async def _originate(self, origin: Origin, stream: TextStream) -> None:
        try:
            with contextlib.suppress(TextClosed):  # this peer is leaving: what is under way is finished
                if self._run.averaging.mode == "sync":
                    await self._step_forever(origin, stream)
                else:
                    await origin.run(until=self._is_over_here)
            await origin.finish()
        except Exception as error:
            self.error = error
            self._stop.set()

    def _is_over_here(self) -> bool:
        return self._no_more or self._leave.is_set()

    async def _step_forever(self, origin: Origin, stream: TextStream) -> None:
        """`sync`: a batch, then a round of every fragment, again."""
        def oldest() -> int:
            return min(state.version for state in self._averager.states())

        while not self._is_over_here():
            batch = await drawn(stream, self._run.train.batch_sequences)
            version = oldest()
            pieces = batch.split(microbatch_sequences(self._run))
            self._done(await origin.step(pieces, version=version), batch.numel())
            deadline = time.monotonic() + self._run.averaging.max_round_s
            # a fragment held here may have been done by another holder: nothing is pending then, and the step not over
            while (oldest() <= version or any(self._averager.pending())) and time.monotonic() < deadline:
                if self._is_over_here():
                    break
                await asyncio.sleep(WAIT_S)
