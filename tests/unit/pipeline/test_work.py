"""The training thread's queue: the most urgent first, and whatever goes wrong belongs to who asked."""

from __future__ import annotations

import asyncio
import threading

import pytest

from swarm.pipeline.work import BACKWARD, FORWARD, GUEST, GUEST_SAVINGS_S, OWN, REPAIR, VERDICT, WorkQueue


def test_the_most_urgent_first_and_equals_in_their_order() -> None:
    done: list[str] = []

    async def story() -> None:
        work = WorkQueue()
        asked = [
            work(lambda name=name: done.append(name), urgency=urgency)
            for name, urgency in [
                ("own", OWN), ("f1", FORWARD), ("b", BACKWARD), ("f2", FORWARD), ("r", REPAIR), ("v", VERDICT),
            ]
        ]
        assert work.queue == 6
        while work.run_next():
            pass
        await asyncio.gather(*asked)
        assert work.queue == 0 and not work.run_next()

    asyncio.run(story())
    assert done == ["v", "b", "r", "f1", "f2", "own"]


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


class Timed:
    """A queue whose functions take time on a made-up clock; `done` are their names in order."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.done: list[str] = []
        self.work = WorkQueue(clock=lambda: self.now_s)

    def put(self, name: str, seconds: float, urgency: int) -> None:
        def function() -> None:
            self.now_s += seconds
            self.done.append(name)

        self.work(function, urgency=urgency)


def test_a_guest_is_served_at_once_where_there_is_nothing_else() -> None:
    async def story() -> None:
        timed = Timed()
        for _ in range(100):
            timed.put("guest", 5.0, GUEST)
        assert timed.work.queue == 0, "they do not make this peer look busy"
        while timed.work.run_next():
            pass
        assert timed.done == ["guest"] * 100

    asyncio.run(story())


def test_guests_take_a_tenth_of_a_busy_peer_and_are_not_forgotten() -> None:
    async def story() -> None:
        timed = Timed()
        for _ in range(500):
            timed.put("guest", 0.3, GUEST)
        for _ in range(1000):
            timed.put("own", 0.2, OWN)
        while timed.work.queue:
            assert timed.work.run_next()
        assert timed.done.count("own") == 1000
        guests_s = 0.3 * timed.done.count("guest")
        assert 0.1 * 200 <= guests_s <= 0.1 * 200 + GUEST_SAVINGS_S + 0.3
        first = timed.done.index("own")
        gaps = [i for i, name in enumerate(timed.done) if name == "guest" and i > first]
        assert max(b - a for a, b in zip(gaps, gaps[1:], strict=False)) <= 17, "one after 15 of the others"

    asyncio.run(story())


def test_savings_for_guests_do_not_grow_for_ever() -> None:
    async def story() -> None:
        timed = Timed()
        for _ in range(1000):
            timed.put("own", 1.0, OWN)
            assert timed.work.run_next()
        timed.done.clear()
        for _ in range(20):
            timed.put("guest", 0.5, GUEST)
            timed.put("own", 0.01, OWN)
        while timed.work.queue:
            timed.work.run_next()
        assert timed.done.count("guest") <= 4

    asyncio.run(story())


def test_a_peer_with_work_of_its_own_gives_guests_a_tenth_of_its_time() -> None:
    async def story() -> None:
        timed = Timed()
        passed: list[int] = []
        for _ in range(500):
            timed.put("guest", 0.5, GUEST)
        timed.put("other", 0.1, FORWARD)
        for _ in range(100):
            timed.work.run_waiting(lambda: passed.append(1))
            timed.now_s += 1.0  # a microbatch of its own
        assert len(passed) == len(timed.done) and "other" in timed.done
        assert 0.1 * 100 - 1 <= 0.5 * timed.done.count("guest") <= 0.1 * 100 + GUEST_SAVINGS_S + 0.5

    asyncio.run(story())


def test_guests_are_told_of_the_end_as_well() -> None:
    async def story() -> None:
        work = WorkQueue()
        asked = work(lambda: 1, urgency=GUEST)
        work.close()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert not work.run_next()

    asyncio.run(story())
