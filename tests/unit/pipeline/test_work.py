"""The training thread's queue: the most urgent first, and whatever goes wrong belongs to who asked."""

from __future__ import annotations

import asyncio
import threading

import pytest

from swarm.pipeline.work import BACKWARD, FORWARD, OWN, VERDICT, WorkQueue


def test_the_most_urgent_first_and_equals_in_their_order() -> None:
    done: list[str] = []

    async def story() -> None:
        work = WorkQueue()
        asked = [
            work(lambda name=name: done.append(name), urgency=urgency)
            for name, urgency in [("own", OWN), ("f1", FORWARD), ("b", BACKWARD), ("f2", FORWARD), ("v", VERDICT)]
        ]
        assert work.queue == 5
        while work.run_next():
            pass
        await asyncio.gather(*asked)
        assert work.queue == 0 and not work.run_next()

    asyncio.run(story())
    assert done == ["v", "b", "f1", "f2", "own"]


def test_times_are_told() -> None:
    now = [0.0]

    def compute() -> str:
        now[0] += 2.0
        return "x"

    async def story() -> None:
        work = WorkQueue(clock=lambda: now[0])
        asked = work(compute, urgency=OWN)
        now[0] += 3.0
        assert work.run_next()
        done = await asked
        assert (done.value, done.waited_s, done.service_s) == ("x", 3.0, 2.0)

    asyncio.run(story())


def test_an_error_goes_to_who_asked_and_the_thread_goes_on() -> None:
    async def story() -> None:
        work = WorkQueue()
        bad, good = work(lambda: 1 // 0, urgency=OWN), work(lambda: 7, urgency=OWN)
        assert work.run_next() and work.run_next()
        with pytest.raises(ZeroDivisionError):
            await bad
        assert (await good).value == 7

    asyncio.run(story())


def test_what_nobody_waits_for_is_not_computed() -> None:
    done: list[int] = []

    async def story() -> None:
        work = WorkQueue()
        task = asyncio.ensure_future(work(lambda: done.append(1), urgency=OWN))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert work.run_next() and done == []

    asyncio.run(story())


def test_another_thread_computes_and_wakes_up_for_it() -> None:
    async def story() -> None:
        work, stop = WorkQueue(), threading.Event()
        names: list[str] = []

        def loop() -> None:
            while not stop.is_set():
                work.run_next(wait_s=0.5)

        thread = threading.Thread(target=loop, name="training")
        thread.start()
        try:
            for _ in range(20):
                await work(lambda: names.append(threading.current_thread().name), urgency=FORWARD)
        finally:
            stop.set()
            thread.join()
        assert names == ["training"] * 20

    asyncio.run(story())


def test_after_the_end_nobody_waits_for_ever() -> None:
    async def story() -> None:
        work = WorkQueue()
        before = asyncio.ensure_future(work(lambda: 1, urgency=OWN))
        await asyncio.sleep(0)
        work.close()
        for asked in (before, asyncio.ensure_future(work(lambda: 2, urgency=OWN))):
            with pytest.raises(asyncio.CancelledError):
                await asked

    asyncio.run(story())
