"""The boundary between two microbatches: what others want done with the weights happens there and nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import pytest

from swarm.train.boundary import Boundary


@contextlib.contextmanager
def training(boundary: Boundary) -> Iterator[dict[str, int]]:
    """A thread that trains: it is inside a microbatch, except when it passes by the boundary."""
    state = {"inside": 0, "thread": 0}
    ended, begun = threading.Event(), threading.Event()

    def train() -> None:
        state["thread"] = threading.get_ident()
        boundary.open()
        begun.set()
        while not ended.is_set():
            state["inside"] = 1
            sum(range(200))
            state["inside"] = 0
            boundary.pass_by(wait_s=0.001)
        boundary.close()

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    assert begun.wait(10)
    try:
        yield state
    finally:
        ended.set()
        thread.join(10)
        assert not thread.is_alive()


def test_where_nothing_trains_it_runs_at_once() -> None:
    async def main() -> None:
        boundary, done = Boundary(), []
        future = boundary(lambda: done.append(threading.get_ident()) or "result")
        assert done == [threading.get_ident()], "before anybody awaits it"
        assert await future == "result"

    asyncio.run(main())


def test_while_something_trains_it_waits_for_the_boundary() -> None:
    async def main() -> None:
        boundary, done = Boundary(), []
        boundary.open()
        first, second = boundary(lambda: done.append(1)), boundary(lambda: done.append(2))
        await asyncio.sleep(0)
        assert done == []
        boundary.pass_by()
        assert done == [1, 2], "in order"
        await asyncio.gather(first, second)
        boundary.pass_by()
        assert done == [1, 2], "once each"

    asyncio.run(main())


def test_functions_run_on_the_training_thread_between_microbatches() -> None:
    boundary = Boundary()

    async def main(state: dict[str, int]) -> None:
        for _ in range(50):
            seen = await asyncio.wait_for(boundary(lambda: (state["inside"], threading.get_ident())), 10)  # type: ignore[arg-type]
            assert seen == (0, state["thread"])

    with training(boundary) as state:
        asyncio.run(main(state))


def test_when_training_ends_everything_that_waits_runs() -> None:
    async def main() -> None:
        boundary, done = Boundary(), []
        boundary.open()
        waiting = boundary(lambda: done.append("waiting"))
        boundary.close()
        assert done == ["waiting"]
        await waiting
        await boundary(lambda: done.append("later"))
        assert done == ["waiting", "later"]

    asyncio.run(main())


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_what_goes_wrong_belongs_to_whoever_asked(error: BaseException) -> None:
    """And never ends the training thread, nor keeps others from their turn."""
    def fail() -> None:
        raise error

    async def main() -> None:
        boundary = Boundary()
        boundary.open()
        failing, fine = boundary(fail), boundary(lambda: "fine")
        boundary.pass_by()
        try:
            with pytest.raises(type(error)):
                await failing
        finally:
            assert await fine == "fine"

    asyncio.run(main())


def test_who_has_given_up_is_passed_over() -> None:
    async def main() -> None:
        boundary, done = Boundary(), []
        boundary.open()
        given_up = asyncio.ensure_future(boundary(lambda: done.append("given up")))
        wanted = boundary(lambda: done.append("wanted"))
        given_up.cancel()
        await asyncio.sleep(0)
        boundary.pass_by()
        await wanted
        assert done == ["wanted"] and given_up.cancelled()

    asyncio.run(main())


def test_a_function_may_leave_another_one() -> None:
    async def main() -> None:
        boundary, done = Boundary(), []

        def outer() -> None:
            done.append("outer")
            boundary(lambda: done.append("inner"))

        await boundary(outer)
        boundary.open()
        waiting = boundary(outer)
        boundary.pass_by()
        await waiting
        assert done == ["outer", "inner", "outer", "inner"]

    asyncio.run(main())


def test_pass_by_wakes_as_soon_as_something_comes() -> None:
    boundary, done = Boundary(), threading.Event()
    boundary.open()
    thread = threading.Thread(target=lambda: boundary.pass_by(wait_s=30), daemon=True)
    thread.start()

    async def main() -> None:
        await asyncio.wait_for(boundary(done.set), 10)  # type: ignore[arg-type]

    asyncio.run(main())
    thread.join(10)
    assert done.is_set() and not thread.is_alive()


def test_the_event_loop_does_not_wait_for_a_function_that_runs() -> None:
    """Copying a large fragment takes seconds; heartbeats must go on, and others' functions be left meanwhile."""
    boundary, begun, go_on = Boundary(), threading.Event(), threading.Event()

    def long() -> bool:
        begun.set()
        return go_on.wait(10)

    async def main() -> None:
        first = boundary(long)
        await asyncio.to_thread(begun.wait, 10)
        second = boundary(lambda: "second")  # would block here
        assert not go_on.is_set()
        go_on.set()
        assert await asyncio.wait_for(first, 10) is True  # type: ignore[arg-type]
        assert await asyncio.wait_for(second, 10) == "second"  # type: ignore[arg-type]

    with training(boundary):
        asyncio.run(main())


def test_training_does_not_begin_while_a_function_runs() -> None:
    """One that ran at once because nothing trained would otherwise change weights under the first microbatch."""
    boundary, begun, go_on, order = Boundary(), threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        go_on.wait(10)
        order.append("function")

    async def ask() -> None:
        await boundary(slow)

    def train() -> None:
        boundary.open()
        order.append("training")

    asker = threading.Thread(target=lambda: asyncio.run(ask()), daemon=True)
    asker.start()
    assert begun.wait(10)
    trainer = threading.Thread(target=train, daemon=True)
    trainer.start()
    trainer.join(0.05)
    assert trainer.is_alive() and order == []
    go_on.set()
    asker.join(10)
    trainer.join(10)
    assert order == ["function", "training"]


def test_many_threads_ask_and_each_function_runs_once_alone() -> None:
    boundary, counts, running = Boundary(), [0], [0]

    def count() -> int:
        running[0] += 1
        assert running[0] == 1, "two at the same time"
        counts[0] += 1
        running[0] -= 1
        return counts[0]

    results: list[int] = []

    async def ask() -> None:
        for _ in range(40):
            results.append(await asyncio.wait_for(boundary(count), 20))  # type: ignore[arg-type]

    with training(boundary):
        threads = [threading.Thread(target=lambda: asyncio.run(ask()), daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert counts[0] == 240 and sorted(results) == list(range(1, 241))
