"""What a rude other end cannot do to a link: every byte that it sends is bounded or ends it."""

import asyncio

import pytest

from swarm.errors import BadMessage, NetworkError, PeerGone, PeerRefused
from swarm.network import frames, link
from swarm.network.link import Budget, Method
from tests.unit.network.link_support import (
    MB,
    PATIENCE_S,
    closed_with,
    echo,
    one_link,
    read_frame,
    request,
    run,
    soon,
)  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        [frames.pack(frames.REQUEST_BODY, 1, b"x")],
        [request(1, "echo", 3), frames.pack(frames.REQUEST_BODY, 1, b"four")],
        [request(1, "echo", 3), request(1, "echo", 3)],
        [request(1, "small", 11)],
        [request(1, "echo", -1)],
        [request(1, "echo", 1.5)],
        [request(1, "nonsense", 2**60)],
        [request(1, "echo", 2**60)],
        [frames.pack(frames.REQUEST, 1, b"[]")],
        [frames.pack(frames.REQUEST, 1, b'{"m":1,"h":{},"n":0}')],
        [frames.pack(frames.REQUEST, 1, b'{"m":"echo","h":[],"n":0}')],
        [frames.pack(frames.REQUEST, 1, b'{"m":"echo","n":0}')],
        [frames.pack(frames.REQUEST, 1, b'{"m":"echo","h":{"a":1e999},"n":0}')],
        [b"\xff" * 9],
        [b"GET / HTTP/1.1\r\n\r\n"],
    ],
    ids=[
        "unannounced body", "body too long", "number twice", "over the method's limit", "negative", "fraction",
        "swallow too much", "echo too much", "list", "no name", "no header", "half", "infinite", "kind", "http",
    ],
)  # fmt: skip
def test_breaking_the_protocol_closes_the_link(data):
    async def test():
        async with one_link() as (ours, _reader, writer):
            await closed_with(ours, *data, writer=writer)
            assert not ours._requests and ours._budget.used == 0

    run(test)


def test_too_many_calls_close_the_link():
    async def test():
        async def forever(link, header, body):
            await asyncio.Event().wait()

        async with one_link({"forever": Method(forever, 0)}) as (ours, _reader, writer):
            writer.write(b"".join(request(n, "forever") for n in range(link.MAX_CALLS)))
            await soon(lambda: len(ours._answering) == link.MAX_CALLS)
            assert not ours.closed.is_set()
            await closed_with(ours, request(9999, "forever"), writer=writer)

    run(test)


def test_many_announced_bodies_close_the_link_before_they_come():
    async def test():
        async with one_link({"push": Method(echo, link.MAX_WAITING_BYTES)}) as (ours, _reader, writer):
            await closed_with(
                ours, request(1, "push", link.MAX_WAITING_BYTES), request(2, "push", 1), writer=writer
            )

    run(test)


def test_all_links_together_hold_no_more_than_the_budget():
    async def test():
        budget = Budget(limit=3 * MB // 2)

        async def forever(link, header, body):
            await asyncio.Event().wait()

        methods = {"forever": Method(forever, MB)}
        half = bytes(MB // 2)
        links = one_link(methods, budget=budget), one_link(methods, budget=budget)
        async with links[0] as (one, _, writer), links[1] as (two, _, writer2):
            writer.write(request(1, "forever", MB) + 2 * frames.pack(frames.REQUEST_BODY, 1, half))
            await soon(lambda: one._answering)
            writer2.write(request(1, "forever", MB) + frames.pack(frames.REQUEST_BODY, 1, half))
            await soon(lambda: budget.used == 3 * MB // 2)
            await closed_with(two, frames.pack(frames.REQUEST_BODY, 1, half), writer=writer2)
            assert budget.used == MB
            assert not one.closed.is_set()

    run(test)


def test_who_asks_and_takes_no_answers_is_closed(monkeypatch):
    monkeypatch.setattr(link, "MAX_QUEUED_HEADS", 20)

    async def test():
        async with one_link() as (ours, reader, writer):
            reader._transport.pause_reading()
            question = b"".join(request(n, "nonsense", header={"pad": "x" * 1000}) for n in range(500))
            try:
                for _ in range(200):
                    writer.write(question)
                    await asyncio.wait_for(writer.drain(), PATIENCE_S)
            except OSError:
                pass
            await asyncio.wait_for(ours.closed.wait(), PATIENCE_S)
            assert not ours._urgent

    run(test)


def test_answers_that_are_not_taken_wait_with_their_handlers(monkeypatch):
    """Else small questions for large answers would fill our memory."""
    monkeypatch.setattr(link, "MAX_QUEUED_BYTES", 2 * MB)

    async def test():
        async def large(link, header, body):
            return {}, bytes(MB)

        async with one_link({"large": Method(large, 0)}) as (ours, reader, writer):
            reader._transport.pause_reading()
            writer.write(b"".join(request(n, "large") for n in range(20)))
            await soon(lambda: ours._queued_bytes >= 2 * MB)
            for _ in range(50):
                await asyncio.sleep(0)
            assert ours._queued_bytes <= 3 * MB and ours._answering
            reader._transport.resume_reading()
            received = 0
            while received < 20 * MB:
                kind, _, payload = await read_frame(reader)
                if kind == frames.ANSWER_BODY:
                    received += len(payload)
                    writer.write(frames.pack_arrived(received, at=0.0, share=0.0))
            await soon(lambda: not ours._answering)
            assert ours._queued_bytes == 0

    run(test)


@pytest.mark.parametrize(
    "answer",
    [
        [frames.pack(frames.ANSWER, 0, b'{"h":{},"n":11}')],
        [frames.pack(frames.ANSWER, 0, b'{"h":{},"n":-1}')],
        [frames.pack(frames.ANSWER, 0, b'{"n":0}')],
        [frames.pack(frames.ANSWER, 0, b"[]")],
        [frames.pack(frames.ANSWER_BODY, 0, b"x")],
        [frames.pack(frames.ANSWER, 0, b'{"h":{},"n":3}'), frames.pack(frames.ANSWER_BODY, 0, b"four")],
        [frames.pack(frames.ANSWER, 0, b'{"h":{},"n":3}'), frames.pack(frames.ANSWER, 0, b'{"h":{},"n":3}')],
        [frames.pack(frames.REFUSED, 0, b"\xff")],
    ],
    ids=["too long", "negative", "no header", "list", "no head", "more than announced", "twice", "no reason"],
)
def test_a_bad_answer_ends_the_link_and_the_call(answer):
    async def test():
        async with one_link() as (ours, reader, writer):
            call = asyncio.create_task(ours.call("x", deadline_s=PATIENCE_S, max_answer=10))
            await read_frame(reader)
            await closed_with(ours, *answer, writer=writer)
            with pytest.raises(PeerGone):
                await call

    run(test)


def test_an_answer_as_long_as_allowed_passes_and_late_ones_are_dropped():
    async def test():
        async with one_link() as (ours, reader, writer):
            call = asyncio.create_task(ours.call("x", deadline_s=PATIENCE_S, max_answer=10))
            await read_frame(reader)
            writer.write(frames.pack(frames.ANSWER, 77, b'{"h":{},"n":5}') + frames.pack(frames.REFUSED, 78, b"{}"))
            writer.write(frames.pack(frames.ANSWER, 0, b'{"h":{},"n":10}'))
            writer.write(frames.pack(frames.ANSWER_BODY, 0, b"5" * 10))
            assert await call == ({}, b"5" * 10)
            assert not ours.closed.is_set()

    run(test)


def test_a_long_reason_is_cut():
    async def test():
        async with one_link() as (ours, reader, writer):
            call = asyncio.create_task(ours.call("x", deadline_s=PATIENCE_S))
            await read_frame(reader)
            writer.write(frames.pack(frames.REFUSED, 0, frames.pack_head({"why": "x" * 60_000})))
            with pytest.raises(PeerRefused) as caught:
                await call
            assert len(str(caught.value)) <= 500

    run(test)


def test_errors_of_calls_are_one_family():
    assert issubclass(PeerGone, NetworkError) and issubclass(BadMessage, NetworkError)
