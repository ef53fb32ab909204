"""Processes on a clock of their own: stopped, frozen and ended between two steps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.unit.averaging.faults.loop import Process, StepLoop, play

Story = Callable[[StepLoop], Coroutine[Any, Any, None]]


def tell(story: Story) -> StepLoop:
    return play(story, random.Random(1))


async def count(seen: list[int], *, every_s: float = 0.0) -> None:
    for number in range(100):
        seen.append(number)
        await asyncio.sleep(every_s)


def test_hours_take_no_time_and_come_in_order() -> None:
    seen: list[str] = []

    async def story(loop: StepLoop) -> None:
        began = loop.time()
        loop.call_later(7200.0, seen.append, "late")
        loop.call_later(1.0, seen.append, "soon")
        loop.call_later(0.5, seen.append, "never").cancel()
        await asyncio.sleep(7200.5)
        assert loop.time() - began == 7200.5

    tell(story)
    assert seen == ["soon", "late"]


@pytest.mark.parametrize("steps", [0, 1, 5, 50])
def test_a_process_ends_at_the_step_that_was_said(steps: int) -> None:
    seen: list[int] = []

    async def story(loop: StepLoop) -> None:
        process = loop.process("one")
        process.begin(count(seen))
        process.at_step(steps, process.kill)
        await asyncio.sleep(5)
        assert process.dead and not process.left()

    tell(story)
    assert seen == list(range(steps))


def test_what_belongs_to_others_goes_on() -> None:
    seen: dict[str, list[int]] = {"one": [], "two": []}

    async def story(loop: StepLoop) -> None:
        processes = {name: loop.process(name) for name in seen}
        for name, process in processes.items():
            process.begin(count(seen[name]))
        processes["one"].at_step(3, processes["one"].kill)
        await asyncio.sleep(1)

    tell(story)
    assert len(seen["one"]) == 3 and len(seen["two"]) == 100


def test_a_frozen_process_does_nothing_and_then_everything_that_was_due() -> None:
    seen: list[int] = []

    async def story(loop: StepLoop) -> None:
        process = loop.process("one")
        process.begin(count(seen, every_s=1.0))
        await asyncio.sleep(4.5)
        process.frozen = True
        process.post(seen.append, -1)
        await asyncio.sleep(60)
        assert seen == [0, 1, 2, 3, 4], "nor does it take what comes in"
        process.thaw()
        process.thaw()
        await asyncio.sleep(0.1)
        assert seen == [0, 1, 2, 3, 4, -1, 5], "one timer was due, and the message"
        await asyncio.sleep(2)
        assert seen[-1] == 7

    tell(story)


def test_it_can_be_frozen_at_a_step_too() -> None:
    seen: list[int] = []

    async def story(loop: StepLoop) -> None:
        process = loop.process("one")

        def freeze() -> None:
            process.frozen = True

        process.begin(count(seen))
        process.at_step(10, freeze)
        await asyncio.sleep(1)
        assert seen == list(range(10))
        process.thaw()
        await asyncio.sleep(1)
        assert len(seen) == 100

    tell(story)


def test_a_frozen_process_can_be_killed_and_a_dead_one_takes_nothing() -> None:
    seen: list[int] = []

    async def story(loop: StepLoop) -> None:
        process = loop.process("one")
        process.begin(count(seen, every_s=1.0))
        await asyncio.sleep(0.5)
        process.frozen = True
        await asyncio.sleep(5)
        process.kill()
        process.post(seen.append, -1)
        await asyncio.sleep(1)
        assert seen == [0] and not process.left()

    tell(story)


def test_what_begins_inside_belongs_to_the_same_process() -> None:
    """Tasks of tasks, and callbacks."""
    seen: list[int] = []
    ran: list[Process] = []

    async def outer() -> None:
        asyncio.get_running_loop().call_later(3.0, seen.append, -1)
        await asyncio.gather(count(seen, every_s=1.0), asyncio.create_task(count(seen, every_s=1.0)))

    async def story(loop: StepLoop) -> None:
        process = loop.process("one")
        ran.append(process)
        process.begin(outer())
        await asyncio.sleep(1.5)
        process.frozen = True
        await asyncio.sleep(5)
        assert seen == [0, 0, 1, 1] and len(process.left()) >= 3

    tell(story)
    assert not ran[0].left(), "and ends with the story"


def test_a_thread_takes_a_moment_and_its_error_comes_through() -> None:
    async def story(loop: StepLoop) -> None:
        began = loop.time()
        assert await asyncio.to_thread(lambda: 3) == 3
        assert 0 < loop.time() - began < 0.1
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)

    tell(story)


def test_a_story_in_which_nothing_can_happen_any_more_says_so() -> None:
    async def story(loop: StepLoop) -> None:
        await loop.create_future()

    with pytest.raises(RuntimeError, match="nothing will ever come"):
        tell(story)


def test_errors_that_nobody_asked_for_are_kept() -> None:
    async def fails() -> None:
        raise ValueError("nobody asks")

    async def story(loop: StepLoop) -> None:
        task = asyncio.ensure_future(fails())
        await asyncio.sleep(1)
        del task

    loop = tell(story)
    assert len(loop.problems) == 1 and "fails: ValueError('nobody asks')" in loop.problems[0]
