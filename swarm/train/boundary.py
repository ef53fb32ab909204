"""The boundary between two microbatches: the only moment at which working weights change hands.

Averaging runs on the network's thread and never touches weights under a live graph: it leaves a function here, and
the training thread runs it before the next microbatch. So the backward of a microbatch uses the weights that its
forward used, and a copy of the weights is never taken in the middle of an inner step. Where nothing trains, the
functions run at once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Boundary:
    def __init__(self) -> None:
        self._queue: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._running = threading.RLock()
        """held while functions run, one at a time; apart from `_changed`, so that leaving one here takes no time"""
        self._training = False

    def __call__(self, function: Callable[[], T]) -> Awaitable[T]:
        """From the event loop: run `function` at the next boundary and await its result."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._changed:
            self._queue.append((function, future))
            self._changed.notify_all()
            training = self._training
        if not training:
            with self._running:  # training cannot begin in here
                if not self._training:
                    self._run_queue()
        return asyncio.wrap_future(future)

    def open(self) -> None:
        """The calling thread trains from now on, and promises to `pass_by` often."""
        with self._running, self._changed:
            self._training = True

    def close(self) -> None:
        """Training has ended; what is waiting, and all that comes, runs at once."""
        with self._running:
            with self._changed:
                self._training = False
            self._run_queue()

    def pass_by(self, *, wait_s: float = 0.0) -> None:
        """From the training thread: run what is waiting; with `wait_s`, wait that long for something to come."""
        with self._changed:
            if not self._queue and wait_s:
                self._changed.wait(wait_s)
        with self._running:
            self._run_queue()

    def _run_queue(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    return
                function, future = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # it belongs to whoever awaits it
                future.set_exception(error)
