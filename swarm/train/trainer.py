"""The training thread: draw data, take an inner step, let averaging at the weights, again.

It never waits for a round (I3). Only a `sync` run does, because there a round is part of every step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable

import torch

from swarm.averaging.averager import Averager
from swarm.averaging.outer import learning_rate
from swarm.config import RunConfig
from swarm.data.text_stream import TextClosed, TextStream
from swarm.network.network import Network
from swarm.train.boundary import Boundary
from swarm.train.inner import InnerOptimizer
from swarm.train.metered import Metered
from swarm.train.serving import Serving
from swarm.train.stage_steps import density, weigh

SYNC_POLL_S = 0.05
SETTLE_S = 15.0
"""when leaving: until the origins of microbatches that were done here have spoken"""
NICENESS = 10
SWITCH_S = 0.001


class Trainer(Metered):
    def __init__(
        self, run: RunConfig, inner: InnerOptimizer, stream: TextStream, averager: Averager, network: Network,
        boundary: Boundary, serving: Serving,
    ) -> None:
        super().__init__()
        self.tokens = 0
        """trained since this peer started"""
        self.error: BaseException | None = None
        self.on_step: Callable[[float, int], None] = lambda loss, tokens: None
        """called after each inner step with its loss and tokens, on the training thread"""
        self._run, self._inner, self._stream = run, inner, stream
        self._averager, self._network, self._boundary, self._serving = averager, network, boundary, serving
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)

    def start(self) -> None:
        self._boundary.open()
        self._thread.start()

    def stop(self) -> None:
        """Ends after the inner step at hand; returns once it has."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def speed(self) -> float:
        """Fragments times tokens a second that it could do: what it does."""
        return self.tokens_per_s * self._run.fragments

    def _train(self) -> None:
        give_way()
        try:
            with contextlib.suppress(TextClosed):
                while not self._stop.is_set():
                    self._serving.pause()
                    self._inner_step()
                    self._serving.steps.take_due()
            self._settle()
        except BaseException as error:
            self.error = error
        finally:
            self._serving.work.close()
            self._boundary.close()

    def _settle(self) -> None:
        """Finish what others have sent here, and learn from it."""
        until = time.monotonic() + SETTLE_S
        while self._serving.compute.in_flight and time.monotonic() < until:
            self._boundary.pass_by()
            self._serving.work.run_next(wait_s=SYNC_POLL_S)
        self._serving.steps.take_rest()

    def _inner_step(self) -> None:
        batch = self._stream.next_batch(self._run.train.batch_sequences)
        tokens = batch.numel()
        loss = self._inner.gradients(batch)
        if self._run.averaging.mode == "sync":
            if not self._inner.clip():
                return
            gradients = {name: p.grad for name, p in self._inner.parameters.items() if p.grad is not None}
            weigh(gradients, density(batch.num_targets, tokens=tokens, length=self._run.train.sequence_length))
            self._averager.trained(tokens, gradients)
        else:
            self._serving.compute.before_write()
            if not self._inner.step(learning_rate(self._run, self._averager.estimated_tokens())):
                return
            self._averager.trained(tokens)
        self.tokens += tokens
        self._losses.append(loss)
        self._averager.tokens_per_s = self._note(self.tokens)
        self.on_step(loss, tokens)
        if self._run.averaging.mode == "sync":
            self._wait_for_round()

    def _wait_for_round(self) -> None:
        """`sync`: the next step starts from the weights that this one leads to. A round that does not come within
        `max_round_s` is not waited for: the gradient stays on the books and goes into a later one."""
        self._network.submit(self._averager.announce())
        deadline = time.monotonic() + self._run.averaging.max_round_s
        while any(self._averager.pending()) and not self._stop.is_set() and time.monotonic() < deadline:
            self._boundary.pass_by(wait_s=SYNC_POLL_S)
            self._serving.pause()


def give_way() -> None:
    """The calling thread takes the processor when nobody else wants it: a round's arithmetic, answers to other peers
    and whatever the owner of the machine does come first. Training loses nothing by it but its place in the queue: a
    round of 10 M parameters with four peers on two cores took 3.7 s without this and 3.1 s with it. Linux only, where
    priorities are a thread's own. Python's lock changes hands sooner, too: a small step of a round could wait 5 ms for
    each."""
    sys.setswitchinterval(SWITCH_S)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def limit_threads(threads: int) -> None:
    if threads > 0:
        torch.set_num_threads(threads)
