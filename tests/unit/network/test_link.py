"""One link between two ends of a socket pair: what it promises to callers."""

import asyncio
import json

import pytest

from swarm.errors import PeerGone, PeerRefused
from swarm.network import frames, link, pacing
from swarm.network.line import Line
from swarm.network.link import Budget, Method
from tests.unit.network.link_support import (
    MB,
    METHODS,
    PATIENCE_S,
    closed_with,
    echo,
    one_link,
    read_frame,
    request,
    run,
    soon,
    two_links,
)  # fmt: skip

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
                answer = await one.call("echo", {"n": number}, body, deadline_s=PATIENCE_S, max_answer=4 * MB)
                assert answer == ({"n": number}, body)

            await asyncio.gather(*(ask(one, number) for number in range(30) for one in (asker, answerer)))
            assert asker.bytes_sent == answerer.bytes_received
            assert answerer.bytes_sent == asker.bytes_received

    run(test)


def test_our_line_is_measured_by_when_bytes_left_and_not_by_when_we_hear_of_them():
    """What is said of them comes in bunches, and lines seemed twice as fast."""
    told, left_at = [], 17.0

    class Up(Line):
        def passed(self, stream, size, *, now):
            told.append((size, now))

    async def test():
        async with two_links(lines=(Up(), Line())) as (asker, _):
            on_arrived = asker.pacing.on_arrived

            def arrived(total, **when):
                on_arrived(total, **when)
                asker.pacing.left_at = left_at

            asker.pacing.on_arrived = arrived
            await asker.call("echo", {}, bytes(2 * MB), deadline_s=PATIENCE_S, max_answer=2 * MB)
            await soon(lambda: sum(size for size, _ in told) >= 2 * MB - pacing.ACK_BYTES)
        assert {now for _, now in told} == {left_at}

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
            seen, arrived = [], 0
            while arrived < 8 * MB:
                kind, call, payload = await read_frame(reader)
                seen.append((kind, call, len(payload)))
                if kind == frames.REQUEST_BODY:
                    arrived += len(payload)
                    writer.write(frames.pack_arrived(arrived, at=0.0, share=0.0))
            heads = [position for position, frame in enumerate(seen) if frame[0] == frames.REQUEST]
            assert heads == [0, 1]
            assert sum(size for kind, _, size in seen if kind == frames.REQUEST_BODY) == 8 * MB
            for task in (tensor, beat):
                task.cancel()
            await asyncio.gather(tensor, beat, return_exceptions=True)

    run(test)


def test_who_asked_knows_that_the_answer_is_coming_before_its_body():
    async def test():
        async with one_link() as (ours, reader, writer):
            heads = []
            asked = asyncio.create_task(ours.call(
                "big", {}, deadline_s=PATIENCE_S, max_answer=MB, on_head=lambda: heads.append(asked.done())
            ))
            _, call, _ = await read_frame(reader)
            writer.write(frames.pack(frames.ANSWER, call, frames.pack_head({"h": {}, "n": 9})))
            await soon(lambda: heads == [False])
            writer.write(frames.pack(frames.ANSWER_BODY, call, b"x" * 9))
            assert await asked == ({}, b"x" * 9)

    run(test)


def test_what_waits_for_the_line_is_known_and_taken_back():
    async def test():
        async with one_link() as (ours, reader, _):
            tensor = asyncio.create_task(ours.call("push", {}, bytes(4 * MB), deadline_s=PATIENCE_S, steady=True))
            await read_frame(reader)
            await soon(lambda: 0 < ours.waiting_bytes < 4 * MB)
            tensor.cancel()
            await asyncio.gather(tensor, return_exceptions=True)
            assert ours.waiting_bytes == 0

    run(test)


@pytest.mark.parametrize(("size", "steady", "hurried", "careful"), [
    (MB, True, 0, True), (MB, False, 0, False), (pacing.STEADY_BYTES - 1, True, 0, False), (MB, True, MB, False),
])  # fmt: skip
def test_only_large_bodies_of_a_stream_are_let_go_with_care_and_none_that_others_wait_behind(
    size, steady, hurried, careful
):
    async def test():
        async with one_link() as (ours, reader, _):
            asked = [asyncio.create_task(ours.call("push", {}, bytes(size), deadline_s=PATIENCE_S, steady=steady))]
            if hurried:
                asked.append(asyncio.create_task(ours.call("push", {}, bytes(hurried), deadline_s=PATIENCE_S)))
            while (await read_frame(reader))[0] != frames.REQUEST_BODY:
                pass
            assert ours.pacing.is_steady == careful
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

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
        async with one_link({**METHODS, "hello": Method(echo, 0)}, greeted=False) as (_ours, reader, writer):
            writer.write(request(1, "echo", 3) + frames.pack(frames.REQUEST_BODY, 1, b"abc") + request(2, "hello"))
            kind, call, payload = await read_frame(reader)
            assert (kind, call) == (frames.REFUSED, 1) and b"hello first" in payload
            kind, call, _ = await read_frame(reader)
            assert (kind, call) == (frames.ANSWER, 2)

    run(test)


def test_whom_we_dialled_may_ask_at_once():
    """Its answer to our hello and its first question can arrive together, before our side has seen the answer."""

    async def test():
        async with one_link(greeted=False, dialled=True) as (_ours, reader, writer):
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
            with pytest.raises(PeerGone, match="no answer from AAAAAA within"):
                await asker.call("forever", {}, b"body", deadline_s=0.2)
            await asyncio.wait_for(started.wait(), PATIENCE_S)
            await asyncio.wait_for(cancelled.wait(), PATIENCE_S)
            await soon(lambda: not answerer._answering)
            assert not asker._calls and answerer._budget.used == 0
            assert await asker.call("echo", {"a": 1}, deadline_s=PATIENCE_S) == ({"a": 1}, b"")

    run(test)


def test_a_caller_that_is_cancelled_takes_its_queued_body_back():
    async def test():
        async with one_link() as (ours, reader, _writer):
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
        async with one_link() as (ours, _reader, writer):
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

        async with one_link({"forever": Method(forever, MB)}, budget=budget) as (ours, _reader, writer):
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
        async with one_link() as (ours, reader, _writer):
            reader._transport.pause_reading()
            with pytest.raises(PeerGone, match="ended") as caught:
                await ours.call("push", {}, bytes(64 * MB), deadline_s=1000)
            assert "took no bytes" in caught.value.why
            assert not ours._bulk

    run(test)


def test_a_body_that_never_comes_closes_the_link(monkeypatch):
    monkeypatch.setattr(link, "MAX_BODY_S", 0.05)

    async def test():
        async with one_link() as (ours, _reader, writer):
            await closed_with(ours, request(1, "echo", 100), writer=writer)

    run(test)


def test_a_quiet_message_is_handled_and_not_answered():
    async def test():
        heard = asyncio.Queue()

        async def hear(link, header, body):
            await heard.put((header, body))
            return {"ignored": True}, b"ignored"

        async with two_links({**METHODS, "hear": Method(hear, MB)}) as (asker, answerer):
            await asker.notify("hear", {"a": 1}, bytes(300_000), deadline_s=PATIENCE_S)
            await asker.notify("hear", {"b": 2}, deadline_s=PATIENCE_S)
            assert await heard.get() == ({"a": 1}, bytes(300_000))
            assert await heard.get() == ({"b": 2}, b"")
            for method in ("refuse", "stumble", "no such method"):
                await asker.notify(method, deadline_s=PATIENCE_S)
            assert await asker.call("echo", {"c": 3}, deadline_s=PATIENCE_S) == ({"c": 3}, b"")
            assert not asker._calls and not asker._leaving and not answerer._answering

    run(test)


def test_a_quiet_message_that_is_called_off_takes_its_body_back():
    async def test():
        async with one_link() as (ours, reader, _writer):
            with pytest.raises(PeerGone, match="did not take it"):
                await ours.notify("push", {}, bytes(4 * MB), deadline_s=0.1)
            assert not ours._bulk and ours._queued_bytes == 0 and not ours._leaving
            kind = size = 0
            while kind != frames.CANCEL:
                kind, _, payload = await read_frame(reader)
                size += len(payload)
            assert size < MB, "no more than the window was on its way"

    run(test)


def test_a_quiet_message_ends_with_the_link():
    async def test():
        async with one_link() as (ours, _reader, _writer):
            telling = asyncio.create_task(ours.notify("push", {}, bytes(4 * MB), deadline_s=PATIENCE_S))
            await soon(lambda: ours._leaving)
            ours.close("over")
            with pytest.raises(PeerGone, match="ended"):
                await telling
            with pytest.raises(PeerGone, match="closed"):
                await ours.notify("push", deadline_s=PATIENCE_S)

    run(test)


def test_bodies_wait_for_the_other_side_and_heads_do_not():
    """Who acknowledges nothing gets one window of a body, and every heartbeat."""

    async def test():
        async with one_link() as (ours, reader, writer):
            tensor = asyncio.create_task(ours.call("push", {}, bytes(4 * MB), deadline_s=PATIENCE_S))
            got = 0
            while got < pacing.FIRST_WINDOW:
                kind, _, payload = await read_frame(reader)
                got += len(payload) if kind == frames.REQUEST_BODY else 0
            for _ in range(3):
                beat = asyncio.create_task(ours.call("status", {}, deadline_s=PATIENCE_S))
                kind, call, payload = await read_frame(reader)
                assert kind == frames.REQUEST
                writer.write(frames.pack(frames.ANSWER, call, frames.pack_head({"h": {}, "n": 0})))
                await beat
            writer.write(frames.pack_arrived(got, at=0.0, share=0.0))
            kind, _, payload = await read_frame(reader)
            assert kind == frames.REQUEST_BODY
            tensor.cancel()
            await asyncio.gather(tensor, return_exceptions=True)

    run(test)


def test_a_number_of_arrived_bytes_that_is_none_ends_the_link():
    async def test():
        async with one_link() as (ours, _reader, writer):
            await closed_with(ours, frames.pack(frames.ARRIVED, 0, b"123"), writer=writer)

    run(test)
