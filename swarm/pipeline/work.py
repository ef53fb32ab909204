"""The training thread's work: what the network's event loop wants computed, the most urgent first.

Gradients that come back go before new microbatches, and verdicts before both: what is nearly done frees memory, here
and at all the peers that wait for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import heapq
import itertools
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

VERDICT, BACKWARD, FORWARD, OWN = range(4)
"""urgency: own new microbatches come last, since others wait for theirs"""


@dataclass(frozen=True)
class Done(Generic[T_co]):
    value: T_co
    waited_s: float
    """for the processor"""
    service_s: float
    """computing"""


class Work(Protocol):
    """Runs a function where the stage's weights may be touched."""

    @property
    def queue(self) -> int:
        """functions that wait"""

    def __call__(self, function: Callable[[], T], *, urgency: int) -> Awaitable[Done[T]]: ...


class WorkQueue:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heap: list[tuple[int, int, float, Callable[[], Any], concurrent.futures.Future[Any]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    @property
    def queue(self) -> int:
        return len(self._heap)

    def __call__(self, function: Callable[[], T], *, urgency: int) -> Awaitable[Done[T]]:
        """From the event loop. Cancelling the wait takes the function out where it has not begun."""
        future: concurrent.futures.Future[Done[T]] = concurrent.futures.Future()
        with self._changed:
            if self._closed:
                future.cancel()
            else:
                item = (urgency, next(self._numbers), self._clock(), function, future)
                heapq.heappush(self._heap, item)
                self._changed.notify()
        return asyncio.wrap_future(future)

    def run_next(self, *, wait_s: float = 0.0) -> bool:
        """On the training thread: run the most urgent function, waiting up to `wait_s` for one. False: there was
        none. What it raises belongs to whoever awaits it."""
        with self._changed:
            if not self._heap and wait_s:
                self._changed.wait(wait_s)
            if not self._heap:
                return False
            _, _, queued_at, function, future = heapq.heappop(self._heap)
        if not future.set_running_or_notify_cancel():
            return True
        began = self._clock()
        try:
            value = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(Done(value, began - queued_at, self._clock() - began))
        return True

    def close(self) -> None:
        """Nothing more is computed: whoever waits is told so (CancelledError)."""
        with self._changed:
            self._closed = True
            waiting, self._heap = self._heap, []
        for *_, future in waiting:
            future.cancel()
