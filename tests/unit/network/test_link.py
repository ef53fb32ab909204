"""One link between two ends of a socket pair: what it promises to callers, and what a rude other end cannot do."""

import asyncio
import contextlib
import json
import socket

import pytest

from swarm.errors import BadMessage, NetworkError, PeerGone, PeerRefused
from swarm.network import frames, link
from swarm.network.link import Budget, Link, Method

PATIENCE_S = 20.0
MB = 1024 * 1024


async def soon(condition):
    async def poll():
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), PATIENCE_S)


async def echo(link, header, body):
    return header, body


async def refuse(link, header, body):
    raise PeerRefused("not today")


async def stumble(link, header, body):
    raise KeyError("a bug")


METHODS = {
    "echo": Method(echo, 64 * MB), "small": Method(echo, 10), "refuse": Method(refuse, 64 * MB),
    "stumble": Method(stumble, 0),
}  # fmt: skip


async def streams():
    ours, theirs = socket.socketpair()
    return await asyncio.open_connection(sock=ours), await asyncio.open_connection(sock=theirs)


@contextlib.asynccontextmanager
async def two_links(methods=METHODS, budget=None):
    """(asker, answerer): both greeted."""
    (reader, writer), (reader2, writer2) = await streams()
    asker = Link("A" * 20, reader, writer, dict(METHODS))
    answerer = Link("B" * 20, reader2, writer2, dict(methods), budget=budget)
    asker.greeted = answerer.greeted = True
    try:
        yield asker, answerer
    finally:
        asker.close()
        answerer.close()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def one_link(methods=METHODS, *, greeted=True, **more):
    """(link, reader and writer of its other end, which speaks raw bytes)."""
    (reader, writer), (reader2, writer2) = await streams()
    answerer = Link("B" * 20, reader, writer, dict(methods), **more)
    answerer.greeted = greeted
    try:
        yield answerer, reader2, writer2
    finally:
        answerer.close()
        writer2.close()
        await asyncio.sleep(0)


def request(call, method, length=0, header=None):
    return frames.pack(frames.REQUEST, call, frames.pack_head({"m": method, "h": header or {}, "n": length}))


async def closed_with(answerer, *data, writer):
    for part in data:
        writer.write(part)
    await asyncio.wait_for(answerer.closed.wait(), PATIENCE_S)


async def read_frame(reader):
    return await asyncio.wait_for(frames.read(reader), PATIENCE_S)


def run(test):
    asyncio.run(asyncio.wait_for(test(), 60))


# --- calls


@pytest.mark.parametrize("size", [0, 1, frames.MAX_FRAME_BYTES, frames.MAX_FRAME_BYTES + 1, 5 * MB])
def test_a_call_returns_what_the_handler_answered(size):
    async def test():
        async with two_links() as (asker, _):
            body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
            answer = await asker.call("echo", {"a": [1]}, body, deadline_s=PATIENCE_S, max_answer=size)
            assert answer == ({"a": [1]}, body)

    run(test)


def test_calls_interleave_both_ways_and_every_answer_finds_its_call():
    async def test():
        async with two_links() as (asker, answerer):

            async def ask(one, number):
                body = bytes([number]) * (number * 40_000)
                answer, returned = await one.call("echo", {"n": number}, body, deadline_s=PATIENCE_S, max_answer=4 * MB)
                assert answer == {"n": number} and returned == body

            await asyncio.gather(*(ask(one, number) for number in range(30) for one in (asker, answerer)))
            assert asker.bytes_sent == answerer.bytes_received
            assert answerer.bytes_sent == asker.bytes_received

    run(test)


def test_a_slow_handler_holds_nobody_up():
    async def test():
        gate = asyncio.Event()

        async def slow(link, header, body):
            await gate.wait()
            return {"slow": True}, b""

        async with two_links({**METHODS, "slow": Method(slow, 0)}) as (asker, _):
            waiting = asyncio.create_task(asker.call("slow", deadline_s=PATIENCE_S))
            assert await asker.call("echo", {"a": 1}, deadline_s=PATIENCE_S) == ({"a": 1}, b"")
            assert not waiting.done()
            gate.set()
            assert (await waiting)[0] == {"slow": True}

    run(test)


def test_heads_overtake_bulk_bodies():
    """A heartbeat that is asked after a tensor is on the wire before the tensor's body."""

    async def test():
        async with one_link() as (ours, reader, writer):
            tensor = asyncio.create_task(ours.call("push", {}, bytes(8 * MB), deadline_s=PATIENCE_S))
            beat = asyncio.create_task(ours.call("status", {}, deadline_s=PATIENCE_S))
            seen = []
            while len(seen) < 18:
                kind, call, payload = await read_frame(reader)
                seen.append((kind, call, len(payload)))
            heads = [position for position, frame in enumerate(seen) if frame[0] == frames.REQUEST]
            assert heads == [0, 1]
            assert sum(size for kind, _, size in seen if kind == frames.REQUEST_BODY) == 8 * MB
            for task in (tensor, beat):
                task.cancel()
            await asyncio.gather(tensor, beat, return_exceptions=True)

    run(test)


def test_the_reason_of_a_refusal_arrives_and_the_link_goes_on():
    async def test():
        async with two_links() as (asker, answerer):
            with pytest.raises(PeerRefused, match="not today"):
                await asker.call("refuse", {}, bytes(2 * MB), deadline_s=PATIENCE_S)
            with pytest.raises(PeerRefused, match="internal error"):
                await asker.call("stumble", deadline_s=PATIENCE_S)
            assert await asker.call("echo", {"a": 1}, deadline_s=PATIENCE_S) == ({"a": 1}, b"")
            assert not answerer._answering and not answerer._requests

    run(test)


def test_the_body_of_an_unknown_method_is_swallowed():
    async def test():
        async with two_links() as (asker, answerer):
            with pytest.raises(PeerRefused, match="no such method"):
                await asker.call("nonsense", {}, bytes(3 * MB), deadline_s=PATIENCE_S)
            assert await asker.call("echo", {"a": 1}, b"x", deadline_s=PATIENCE_S, max_answer=1) == ({"a": 1}, b"x")
            assert not answerer._requests and not answerer.closed.is_set()
            assert answerer._budget.used == 0

    run(test)


def test_nothing_but_hello_before_hello():
    async def test():
        async with one_link({**METHODS, "hello": Method(echo, 0)}, greeted=False) as (ours, reader, writer):
            writer.write(request(1, "echo", 3) + frames.pack(frames.REQUEST_BODY, 1, b"abc") + request(2, "hello"))
            kind, call, payload = await read_frame(reader)
            assert (kind, call) == (frames.REFUSED, 1) and b"hello first" in payload
            kind, call, _ = await read_frame(reader)
            assert (kind, call) == (frames.ANSWER, 2)

    run(test)


def test_whom_we_dialled_may_ask_at_once():
    """Its answer to our hello and its first question can arrive together, before our side has seen the answer."""

    async def test():
        async with one_link(greeted=False, dialled=True) as (ours, reader, writer):
            writer.write(request(1, "echo", header={"a": 1}))
            kind, _, payload = await read_frame(reader)
            assert kind == frames.ANSWER and json.loads(payload)["h"] == {"a": 1}

    run(test)


# --- ends


def test_a_deadline_is_an_error_and_frees_the_other_side():
    async def test():
        started, cancelled = asyncio.Event(), asyncio.Event()

        async def forever(link, header, body):
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        async with two_links({**METHODS, "forever": Method(forever, 10)}) as (asker, answerer):
            with pytest.raises(PeerGone, match="no answer from AAAAAA within 0.2 s"):
                await asker.call("forever", {}, b"body", deadline_s=0.2)
            await asyncio.wait_for(started.wait(), PATIENCE_S)
            await asyncio.wait_for(cancelled.wait(), PATIENCE_S)
            await soon(lambda: not answerer._answering)
            assert not asker._calls and answerer._budget.used == 0
            assert await asker.call("echo", {"a": 1}, deadline_s=PATIENCE_S) == ({"a": 1}, b"")

    run(test)


def test_a_caller_that_is_cancelled_takes_its_queued_body_back():
    async def test():
        async with one_link() as (ours, reader, writer):
            task = asyncio.create_task(ours.call("push", {}, bytes(32 * MB), deadline_s=PATIENCE_S))
            await read_frame(reader)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert not ours._bulk and ours._queued_bytes == 0
            kind = size = 0
            while kind != frames.CANCEL:
                kind, _, payload = await read_frame(reader)
                size += len(payload)
            assert size < 32 * MB

    run(test)


def test_a_request_that_is_cancelled_before_it_ran_leaves_nothing():
    async def test():
        async with one_link() as (ours, reader, writer):
            writer.write(b"".join(request(n, "echo") + frames.pack(frames.CANCEL, n, b"") for n in range(300)))
            writer.write(request(1000, "echo"))
            call = 0
            while call != 1000:
                _, call, _ = await read_frame(reader)
            await soon(lambda: not ours._answering)
            assert not ours.closed.is_set()

    run(test)


def test_a_request_that_is_cancelled_in_mid_body_gives_its_bytes_back():
    async def test():
        async with one_link() as (ours, reader, writer):
            writer.write(request(1, "echo", MB) + frames.pack(frames.REQUEST_BODY, 1, bytes(MB // 4)))
            await soon(lambda: ours._budget.used == MB // 4)
            writer.write(frames.pack(frames.CANCEL, 1, b""))
            await soon(lambda: ours._budget.used == 0)
            assert not ours._requests

    run(test)


@pytest.mark.parametrize("how", ["close", "abort"])
def test_the_death_of_the_other_side_fails_all_calls_at_once(how):
    async def test():
        async with one_link() as (ours, reader, writer):
            calls = [asyncio.create_task(ours.call("x", deadline_s=1000)) for _ in range(5)]
            await read_frame(reader)
            getattr(writer.transport, how)()
            for call in calls:
                with pytest.raises(PeerGone, match="ended"):
                    await asyncio.wait_for(call, PATIENCE_S)
            assert ours.closed.is_set()
            with pytest.raises(PeerGone, match="is closed"):
                await ours.call("x", deadline_s=1000)

    run(test)


def test_closing_cancels_handlers_and_gives_everything_back():
    async def test():
        budget = Budget()
        cancelled = asyncio.Event()

        async def forever(link, header, body):
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with one_link({"forever": Method(forever, MB)}, budget=budget) as (ours, reader, writer):
            writer.write(request(1, "forever", MB) + frames.pack(frames.REQUEST_BODY, 1, bytes(MB // 2)))
            writer.write(frames.pack(frames.REQUEST_BODY, 1, bytes(MB // 2)))
            writer.write(request(2, "forever", MB) + frames.pack(frames.REQUEST_BODY, 2, bytes(MB // 2)))
            await soon(lambda: ours._answering and budget.used == MB + MB // 2)
            ours.close()
            ours.close()
            await asyncio.wait_for(cancelled.wait(), PATIENCE_S)
            await soon(lambda: budget.used == 0 and not ours._answering)

    run(test)


def test_a_peer_that_takes_no_bytes_is_gone(monkeypatch):
    monkeypatch.setattr(link, "STALL_S", 0.1)

    async def test():
        async with one_link() as (ours, reader, writer):
            reader._transport.pause_reading()
            with pytest.raises(PeerGone, match="ended") as caught:
                await ours.call("push", {}, bytes(64 * MB), deadline_s=1000)
            assert "took no bytes" in caught.value.why
            assert not ours._bulk

    run(test)


def test_a_body_that_never_comes_closes_the_link(monkeypatch):
    monkeypatch.setattr(link, "MAX_BODY_S", 0.05)

    async def test():
        async with one_link() as (ours, reader, writer):
            await closed_with(ours, request(1, "echo", 100), writer=writer)

    run(test)


# --- what a rude other end cannot do


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
        async with one_link() as (ours, reader, writer):
            await closed_with(ours, *data, writer=writer)
            assert not ours._requests and ours._budget.used == 0

    run(test)


def test_too_many_calls_close_the_link():
    async def test():
        async def forever(link, header, body):
            await asyncio.Event().wait()

        async with one_link({"forever": Method(forever, 0)}) as (ours, reader, writer):
            writer.write(b"".join(request(n, "forever") for n in range(link.MAX_CALLS)))
            await soon(lambda: len(ours._answering) == link.MAX_CALLS)
            assert not ours.closed.is_set()
            await closed_with(ours, request(9999, "forever"), writer=writer)

    run(test)


def test_many_announced_bodies_close_the_link_before_they_come():
    async def test():
        async with one_link({"push": Method(echo, link.MAX_WAITING_BYTES)}) as (ours, reader, writer):
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
        async with one_link(methods, budget=budget) as (one, _, writer):
            async with one_link(methods, budget=budget) as (two, _, writer2):
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
                received += len(payload) if kind == frames.ANSWER_BODY else 0
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
            writer.write(frames.pack(frames.ANSWER, 0, b'{"h":{},"n":10}') + frames.pack(frames.ANSWER_BODY, 0, b"5" * 10))
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
