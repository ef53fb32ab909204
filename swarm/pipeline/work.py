"""The training thread's work: what the network's event loop wants computed, the most urgent first.

Gradients that come back go before new microbatches, and verdicts before both: what is nearly done frees memory, here
and at all the peers that wait for it. Microbatches whose peer has died go before those that have waited for nothing:
at the end of the queue of whoever is left, they would hold up their whole chain once more.

Guests' questions (a loss, logits: nothing is learnt from them) come last, but not never: while there is other work they
get a tenth of the time that it takes, so that nobody can stop training by asking, and who asks a peer that is always
busy gets an answer all the same.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

VERDICT, BACKWARD, REPAIR, FORWARD, OWN, GUEST = range(6)
"""urgency: own new microbatches come after those of others, who wait for theirs; guests are who does not train"""
GUEST_SHARE = 0.1
"""of the time of other work goes to guests where there is any"""
GUEST_SAVINGS_S = 1.0
"""at most this much is kept for guests who come later"""


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
        """functions that wait; not those of guests"""

    def __call__(self, function: Callable[[], T], *, urgency: int) -> Awaitable[Done[T]]: ...


@dataclass(order=True)
class _Item:
    urgency: int
    number: int
    queued_at: float = field(compare=False)
    function: Callable[[], Any] = field(compare=False)
    future: concurrent.futures.Future[Any] = field(compare=False)


class WorkQueue:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heap: list[_Item] = []
        self._guests: deque[_Item] = deque()
        self._guests_s = GUEST_SAVINGS_S
        """that guests may take from other work now"""
        self._away_since: float | None = None
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
                item = _Item(urgency, next(self._numbers), self._clock(), function, future)
                if urgency == GUEST:
                    self._guests.append(item)
                else:
                    heapq.heappush(self._heap, item)
                self._changed.notify()
        return asyncio.wrap_future(future)

    def run_next(self, *, wait_s: float = 0.0) -> bool:
        """On the training thread: run the most urgent function, waiting up to `wait_s` for one. False: there was
        none. What it raises belongs to whoever awaits it."""
        with self._changed:
            if not (self._heap or self._guests) and wait_s:
                self._changed.wait(wait_s)
            busy = bool(self._heap)
            item = self._take(busy=busy)
        if item is None:
            return False
        self._run(item, busy=busy)
        return True

    def run_waiting(self, between: Callable[[], None] = lambda: None) -> None:
        """On a thread that has work of its own, between two pieces of it: run what waits now, of guests what they may
        take. `between` is called after each."""
        if self._away_since is not None:
            self._save(self._clock() - self._away_since)
        for _ in range(len(self._heap) + len(self._guests)):
            with self._changed:
                item = self._take(busy=True)
            if item is None:
                break
            self._run(item, busy=True)
            between()
        self._away_since = self._clock()

    def close(self) -> None:
        """Nothing more is computed: whoever waits is told so (CancelledError)."""
        with self._changed:
            self._closed = True
            waiting, self._heap, self._guests = [*self._heap, *self._guests], [], deque()
        for item in waiting:
            item.future.cancel()

    def _take(self, *, busy: bool) -> _Item | None:
        """The next one. `busy`: there is other work than guests', here or elsewhere."""
        if self._guests and (not busy or self._guests_s > 0):
            return self._guests.popleft()
        return heapq.heappop(self._heap) if self._heap else None

    def _run(self, item: _Item, *, busy: bool) -> None:
        if not item.future.set_running_or_notify_cancel():
            return
        began = self._clock()
        try:
            value = item.function()
        except BaseException as error:
            item.future.set_exception(error)
        else:
            item.future.set_result(Done(value, began - item.queued_at, self._clock() - began))
        took_s = self._clock() - began
        if item.urgency != GUEST:
            self._save(took_s)
        elif busy:
            self._guests_s -= took_s

    def _save(self, seconds: float) -> None:
        """Other work took so long."""
        self._guests_s = min(GUEST_SAVINGS_S, self._guests_s + GUEST_SHARE * seconds)
