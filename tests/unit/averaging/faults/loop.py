"""An event loop without a network and with a clock of its own, on which processes run that can be stopped anywhere.

Time goes on to the next timer as soon as nothing else is left to do, so minutes take milliseconds. Every callback and
every step of a task belongs to the process in whose context it was made. Between two steps a process can be killed, at
its n-th step from now if one likes, or frozen: what is due for it then waits until it is thawed, as with SIGSTOP.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from collections.abc import Callable, Coroutine
from typing import Any

_RUNNING: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
OUTSIDE = contextvars.Context()
"""of what belongs to no process: the network's own timers"""
START_S = 1000.0
THROES = 50
"""times that a killed process is told to end: what still runs then never would"""
REAP_S = 0.1
COMPUTE_S = 0.02
"""a worker thread takes up to so long"""


def running() -> str:
    """The name of the process that is running; empty outside of any."""
    process = _RUNNING.get()
    return process.name if process is not None else ""


class Process:
    """One run of a peer's program. Only `StepLoop.begin` makes one."""

    def __init__(self, loop: StepLoop, name: str) -> None:
        self.name, self.dead, self.frozen, self.steps = name, False, False, 0
        self.context = contextvars.copy_context()
        self.context.run(_RUNNING.set, self)
        self._loop = loop
        self.tasks: list[asyncio.Task[Any]] = []
        self.waiting: list[asyncio.Handle] = []
        self.on_step: dict[int, Callable[[], None]] = {}
        """the number of a step -> what is done to the process just before it"""

    def post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Something comes in from outside: the process will deal with it, unless it is dead, once it is not frozen."""
        if not self.dead:
            self._loop.call_soon(function, *arguments, context=self.context)

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.context.run(self._loop.create_task, work)

    def at_step(self, steps: int, function: Callable[[], None]) -> None:
        """Do something to the process after so many more steps."""
        self.on_step[self.steps + 1 + steps] = function

    def left(self) -> list[asyncio.Task[Any]]:
        self.tasks = [task for task in self.tasks if not task.done()]
        return self.tasks

    def thaw(self) -> None:
        if self.frozen:
            self.frozen = False
            waiting, self.waiting = self.waiting, []
            self._loop.resume(waiting)

    def kill(self) -> None:
        """Its tasks end at once. They are cancelled, for coroutines cannot simply vanish; whoever kills must see to it
        that nothing they do on their way out gets anywhere."""
        self.dead = True
        self.thaw()
        self._reap(THROES)

    def _reap(self, times: int) -> None:
        for task in self.left():
            task.cancel()
        if self.tasks and times:
            self._loop.call_later(REAP_S, self._reap, times - 1, context=OUTSIDE.copy())


class StepLoop(asyncio.BaseEventLoop):
    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self._now = START_S
        self._dice = dice
        self.processes: list[Process] = []
        self.problems: list[str] = []
        """exceptions that nobody asked for"""
        self.set_task_factory(_make_task)  # type: ignore[arg-type]
        self.set_exception_handler(_note)

    def time(self) -> float:
        return self._now

    def process(self, name: str) -> Process:
        self.processes.append(Process(self, name))
        return self.processes[-1]

    def resume(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)  # type: ignore[attr-defined]

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """In no time, but the result comes a moment later, as from a thread."""
        future = self.create_future()
        try:
            result = function(*arguments)
        except Exception as error:
            future.set_exception(error)
            return future
        delay_s = COMPUTE_S * self._dice.random()
        self.call_later(delay_s, lambda: future.done() or future.set_result(result))
        return future

    def _write_to_self(self) -> None:
        """Wakes up a loop that sleeps; this one does not."""

    def _run_once(self) -> None:
        ready, timers = self._ready, self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not ready:
            if not timers:
                raise RuntimeError("everybody waits, and nothing will ever come")
            self._now = max(self._now, timers[0]._when)
        while timers and timers[0]._when <= self._now:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_RUNNING)
            if process is not None and not process.dead:
                if process.frozen:
                    process.waiting.append(handle)
                    continue
                process.steps += 1
                if process.on_step and (happens := process.on_step.pop(process.steps, None)) is not None:
                    happens()
                    if process.frozen:
                        process.waiting.append(handle)
                        continue
            handle._run()


def _make_task(loop: StepLoop, work: Coroutine[Any, Any, Any], **more: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **more)
    process = _RUNNING.get()
    if process is not None:
        process.tasks.append(task)
        if len(process.tasks) > 100:
            process.left()
    return task


def _note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    assert isinstance(loop, StepLoop)
    task = context.get("task") or context.get("future")
    where = task.get_coro().__qualname__ if isinstance(task, asyncio.Task) else ""  # type: ignore[union-attr]
    loop.problems.append(f"{context.get('message')} {where}: {context.get('exception')!r}")


def play(story: Callable[[StepLoop], Coroutine[Any, Any, None]], dice: random.Random) -> StepLoop:
    """Run a story to its end; what it leaves undone is ended with it."""
    loop = StepLoop(dice)
    try:
        loop.run_until_complete(story(loop))
    finally:
        for process in loop.processes:
            process.thaw()
        for _ in range(THROES):
            left = asyncio.all_tasks(loop)
            if not left:
                break
            loop.run_until_complete(asyncio.sleep(0))  # one that never ran a line would leave its own unawaited
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()
    return loop
