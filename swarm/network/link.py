"""A link: one raw stream kept open between two peers, on which both ask and answer.

The side behind a router dials; after that the direction makes no difference, so peers without incoming connections
take full part. Every read and write has a deadline: a peer that stops taking our bytes for `STALL_S` is gone. When a
link ends, all calls that wait on it fail with PeerGone at once - the death of a process is noticed in milliseconds,
that of a frozen machine by the deadline of the call. What a peer can make us keep is bounded: requests in number,
their bodies in bytes and time, and answers that it does not take by leaving them with their handlers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from swarm.errors import BadMessage, NetworkError, PeerGone, PeerRefused
from swarm.network import frames
from swarm.network.line import Line
from swarm.network.pacing import ACK_BYTES, STEADY_BYTES, Pacing

STALL_S = 20.0
MAX_CALLS = 64
"""unanswered requests that one peer may have with us"""
MAX_WAITING_BYTES = 256 * 1024 * 1024
"""request bodies of one peer that may be on their way at once"""
MAX_BODY_S = 900.0
"""a request's body takes at most this long to arrive"""
MAX_QUEUED_BYTES = 16 * 1024 * 1024
"""further answers with a body wait while this much waits to be sent"""
MAX_QUEUED_HEADS = 2000

log = logging.getLogger(__name__)

Answer = tuple[dict[str, Any], bytes]
Handler = Callable[["Link", dict[str, Any], bytes], Awaitable[Answer]]


@dataclass
class Method:
    """What a peer may ask of us. `max_body`: bytes, checked before anything is allocated; `steady`: as in `call`."""

    handler: Handler
    max_body: int
    steady: bool = False


@dataclass
class Budget:
    """Bytes of request bodies that all links together hold: received, and not yet answered."""

    limit: int = 1024**3
    used: int = 0


@dataclass
class _Call:
    future: asyncio.Future[Answer]
    max_answer: int
    on_head: Callable[[], None]
    head: dict[str, Any] | None = None
    expected: int = 0
    body: bytearray = field(default_factory=bytearray)
    answered: bool = False


@dataclass
class _Request:
    method: Method
    head: dict[str, Any]
    expected: int
    timer: asyncio.TimerHandle
    quiet: bool
    body: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Of a body that waits to be sent."""

    kind: int
    call: int
    part: memoryview
    last: bool
    steady: bool


class Link:
    """`dialled`: by us, so we know who it is and it may ask before it says hello."""

    def __init__(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, methods: dict[str, Method],
        observed_maddr: str = "", *, dialled: bool = False, budget: Budget | None = None,
        lines: tuple[Line, Line] | None = None,
    ) -> None:
        """`lines`: this machine's up and down, which it shares with other links."""
        self.peer_id = peer_id
        self.observed_maddr = observed_maddr
        self.bytes_sent = self.bytes_received = 0
        self.greeted = False
        """both sides have said hello; until then the one that dialled may ask for nothing else"""
        self._dialled, self._budget = dialled, budget or Budget()
        self._up, self._down = lines or (Line(), Line())
        self.session = ""
        self.last_heard = asyncio.get_running_loop().time()
        self._reader, self._writer, self._methods = reader, writer, methods
        self._urgent: deque[bytes] = deque()
        self._bulk: deque[_Piece] = deque()
        self._queued_bytes = self._hurried_bytes = 0
        """that wait; and those of bodies that are not steady"""
        self._wake, self._room = asyncio.Event(), asyncio.Event()
        self.pacing = Pacing()
        """of what we send"""
        self._bodies_received = self._acknowledged = 0
        self._leaving: dict[int, asyncio.Future[None]] = {}
        """quiet requests whose bodies are not yet on their way"""
        self._calls: dict[int, _Call] = {}
        self._requests: dict[int, _Request] = {}
        self._answering: dict[int, asyncio.Task[None]] = {}
        self._next_call = 0
        self.closed = asyncio.Event()
        self._tasks = [asyncio.create_task(self._read_loop()), asyncio.create_task(self._write_loop())]

    async def call(
        self, method: str, header: dict[str, Any] | None = None, body: bytes = b"", *,
        deadline_s: float, max_answer: int = 0, steady: bool = False, on_head: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Ask and wait for the answer (header, body of at most `max_answer` bytes). `steady`: such bodies come one
        after another, and leave with more care (pacing.py). `on_head` is called when the answer has begun to come: its
        body may have to wait behind others.

        Raises PeerGone when the link ends or the deadline passes, PeerRefused with the other side's reason.
        """
        if self.closed.is_set():
            raise PeerGone(f"{method}: the link to {self.peer_id[-6:]} is closed")
        call, self._next_call = self._next_call, (self._next_call + 1) % 2**32
        waiting = _Call(asyncio.get_running_loop().create_future(), max_answer, on_head)
        self._calls[call] = waiting
        try:
            head = frames.pack_head({"m": method, "h": header or {}, "n": len(body)})
            self._send(frames.REQUEST, frames.REQUEST_BODY, call, head, body, steady=steady)
            return await asyncio.wait_for(waiting.future, deadline_s)
        except asyncio.TimeoutError:
            raise PeerGone(f"{method}: no answer from {self.peer_id[-6:]} within {deadline_s:.1f} s") from None
        finally:
            del self._calls[call]
            if not waiting.answered and not self.closed.is_set():
                self._cancel(frames.REQUEST_BODY, call)

    async def notify(
        self, method: str, header: dict[str, Any] | None = None, body: bytes = b"", *, deadline_s: float
    ) -> None:
        """Tell without being answered: half the messages of a call. Returns once the body is on its way; what becomes
        of it, the other side must say by other means. Raises PeerGone when the link ends or the deadline passes
        before."""
        if self.closed.is_set():
            raise PeerGone(f"{method}: the link to {self.peer_id[-6:]} is closed")
        call, self._next_call = self._next_call, (self._next_call + 1) % 2**32
        head = frames.pack_head({"m": method, "h": header or {}, "n": len(body), "q": True})
        self._send(frames.REQUEST, frames.REQUEST_BODY, call, head, body)
        if not body:
            return
        leaving = self._leaving[call] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(leaving, deadline_s)
        except asyncio.TimeoutError:
            raise PeerGone(f"{method}: {self.peer_id[-6:]} did not take it within {deadline_s:.1f} s") from None
        finally:
            del self._leaving[call]
            if (leaving.cancelled() or not leaving.done()) and not self.closed.is_set():
                self._cancel(frames.REQUEST_BODY, call)

    @property
    def waiting_bytes(self) -> int:
        """Of bodies that are not yet on their way."""
        return self._queued_bytes

    def close(self, reason: str = "closed") -> None:
        if self.closed.is_set():
            return
        self.closed.set()
        self._wake.set()
        futures: list[asyncio.Future[Any]] = [waiting.future for waiting in self._calls.values()]
        for future in [*futures, *self._leaving.values()]:
            if not future.done():
                future.set_exception(PeerGone(f"the link to {self.peer_id[-6:]} ended", why=reason))
        for request in self._requests.values():
            request.timer.cancel()
            self._budget.used -= len(request.body)
        self._requests.clear()
        self._urgent.clear()
        self._bulk.clear()
        for task in [*self._tasks, *self._answering.values()]:
            if task is not asyncio.current_task():
                task.cancel()
        with contextlib.suppress(Exception):
            self._writer.transport.abort()  # close() would wait, perhaps for ever, for the peer to take what is left

    def _send(
        self, head_kind: int, body_kind: int, call: int, head: bytes, body: bytes, *, steady: bool = False
    ) -> None:
        self._urgent.append(frames.pack(head_kind, call, head))
        view = memoryview(body)
        steady = steady and len(body) >= STEADY_BYTES
        for start in range(0, len(body), frames.FRAME_BYTES):
            part = view[start:start + frames.FRAME_BYTES]
            self._bulk.append(_Piece(body_kind, call, part, start + len(part) == len(body), steady))
        self._queued_bytes += len(body)
        self._hurried_bytes += 0 if steady else len(body)
        self._wake.set()

    def _cancel(self, body_kind: int, call: int) -> None:
        self._drop_queued(body_kind, call)
        self._urgent.append(frames.pack(frames.CANCEL, call, b""))
        self._wake.set()

    async def _write_loop(self) -> None:
        """Heads first, then bodies frame by frame, as many as pacing lets go: control traffic never starves behind
        tensors. What is there is written at once: each write costs four processes a wake-up on its way."""
        loop = asyncio.get_running_loop()
        try:
            while not self.closed.is_set():
                self._wake.clear()
                batch = list(self._urgent)
                self._urgent.clear()
                may_send = bool(self._bulk) and self.pacing.room() > 0
                pause_s = self.pacing.wait_s(loop.time()) if may_send else 0.0
                if may_send and not pause_s:
                    batch.append(self._next_bulk(loop.time()))
                if batch:
                    data = b"".join(batch)
                    self._writer.write(data)
                    self.bytes_sent += len(data)
                    if self._writer.transport.get_write_buffer_size():  # else it went straight into the socket
                        await asyncio.wait_for(self._writer.drain(), STALL_S)
                elif pause_s:
                    loop.call_later(pause_s, self._wake.set)
                    await self._wake.wait()
                elif self._bulk:
                    left_s = self.pacing.progress_at + STALL_S - loop.time()
                    await asyncio.wait_for(self._wake.wait(), max(left_s, 0.01))
                else:
                    await self._wake.wait()
        except asyncio.TimeoutError:
            self.close(f"it took no bytes for {STALL_S:.0f} s")
        except OSError:
            self.close("the connection ended")

    def _next_bulk(self, now: float) -> bytes:
        piece = self._bulk.popleft()
        self._unqueue(piece)
        self.pacing.is_steady = piece.steady and not self._hurried_bytes
        self.pacing.on_sent(len(piece.part), now=now, own_share=self._up.share(self, now=now))
        leaving = self._leaving.get(piece.call) if piece.kind == frames.REQUEST_BODY and piece.last else None
        if leaving is not None and not leaving.done():
            leaving.set_result(None)
        return frames.pack(piece.kind, piece.call, piece.part)

    def _unqueue(self, piece: _Piece) -> None:
        self._queued_bytes -= len(piece.part)
        self._hurried_bytes -= 0 if piece.steady else len(piece.part)
        if self._queued_bytes < MAX_QUEUED_BYTES:
            self._room.set()

    async def _read_loop(self) -> None:
        try:
            while True:
                kind, call, payload = await frames.read(self._reader)
                self.bytes_received += len(payload) + frames.HEADER_BYTES
                self.last_heard = asyncio.get_running_loop().time()
                if kind in (frames.REQUEST_BODY, frames.ANSWER_BODY):
                    self._count_body(len(payload))
                if kind == frames.REQUEST:
                    self._on_request(call, payload)
                elif kind == frames.REQUEST_BODY:
                    self._on_request_body(call, payload)
                elif kind == frames.CANCEL:
                    self._on_cancel(call)
                elif kind == frames.ARRIVED:
                    self._on_arrived(*frames.parse_arrived(payload))
                    self._wake.set()
                else:
                    self._on_answer(kind, call, payload)
        except (OSError, asyncio.IncompleteReadError):
            self.close("the connection ended")
        except NetworkError as error:
            log.warning("closing the link to %s: %s", self.peer_id, error)
            self.close(str(error))
        except Exception:
            log.exception("closing the link to %s", self.peer_id)
            self.close("internal error")

    def _on_arrived(self, total: int, there_at: float, share: float) -> None:
        before, self.pacing.told_share = self.pacing.arrived, share
        self.pacing.on_arrived(total, there_at=there_at, now=self.last_heard)
        if self.pacing.arrived > before:  # else it said what cannot be
            self._up.passed(self, self.pacing.arrived - before, now=self.pacing.left_at)

    def _count_body(self, size: int) -> None:
        self._bodies_received += size
        self._down.passed(self, size, now=self.last_heard)
        if self._bodies_received - self._acknowledged >= ACK_BYTES:
            self._acknowledged = self._bodies_received
            share = self._down.share(self, now=self.last_heard)
            self._urgent.append(frames.pack_arrived(self._bodies_received, at=self.last_heard, share=share))
            self._wake.set()

    def _on_request(self, call: int, payload: bytes) -> None:
        head = frames.parse_head(payload)
        name, header, length, quiet = head.get("m"), head.get("h"), head.get("n"), head.get("q") is True
        if not (isinstance(name, str) and isinstance(header, dict) and isinstance(length, int) and length >= 0):
            raise BadMessage("a request without method, header and length")
        if call in self._requests or call in self._answering:
            raise BadMessage("a call number is used twice")
        if len(self._requests) + len(self._answering) >= MAX_CALLS:
            raise BadMessage(f"more than {MAX_CALLS} requests at once")
        method = self._methods.get(name)
        if method is None or not (self.greeted or self._dialled or name == "hello"):
            if len(self._urgent) > MAX_QUEUED_HEADS:
                raise BadMessage("it asks and takes no answers")
            self._refuse(call, "no such method" if method is None else "say hello first", quiet=quiet)
            method = Method(_swallow, frames.MAX_FRAME_BYTES * 1024) if length else None
        if method is None:
            return
        if length > method.max_body:
            raise BadMessage(f"{name[:40]!r}: a body of {length} bytes", why=f"the limit is {method.max_body}")
        if length + sum(r.expected for r in self._requests.values()) > MAX_WAITING_BYTES:
            raise BadMessage(f"more than {MAX_WAITING_BYTES} bytes of requests at once")
        timer = asyncio.get_running_loop().call_later(MAX_BODY_S, self.close, f"a body took over {MAX_BODY_S:.0f} s")
        self._requests[call] = _Request(method, header, length, timer, quiet)
        self._maybe_answer(call)

    def _on_request_body(self, call: int, payload: bytes) -> None:
        request = self._requests.get(call)
        if request is None or len(request.body) + len(payload) > request.expected:
            raise BadMessage("a body that was not announced")
        if request.method.handler is not _swallow:
            if self._budget.used + len(payload) > self._budget.limit:
                raise BadMessage("too many bytes of requests from all peers at once")
            self._budget.used += len(payload)
            request.body += payload
        else:
            request.expected -= len(payload)
        self._maybe_answer(call)

    def _maybe_answer(self, call: int) -> None:
        request = self._requests[call]
        if len(request.body) < request.expected:
            return
        del self._requests[call]
        request.timer.cancel()
        if request.method.handler is not _swallow:
            task = asyncio.create_task(self._answer(call, request))
            self._answering[call] = task

            def done(task: asyncio.Task[None], size: int = len(request.body)) -> None:
                if self._answering.get(call) is task:  # here, because a task cancelled early never runs a line
                    del self._answering[call]
                self._budget.used -= size

            task.add_done_callback(done)

    def _on_cancel(self, call: int) -> None:
        request = self._requests.pop(call, None)
        if request is not None:
            request.timer.cancel()
            self._budget.used -= len(request.body)
        self._drop_queued(frames.ANSWER_BODY, call)
        if call in self._answering:
            self._answering.pop(call).cancel()

    def _drop_queued(self, kind: int, call: int) -> None:
        dropped = [piece for piece in self._bulk if (piece.kind, piece.call) == (kind, call)]
        if dropped:
            self._bulk = deque(piece for piece in self._bulk if (piece.kind, piece.call) != (kind, call))
        for piece in dropped:
            self._unqueue(piece)

    async def _answer(self, call: int, request: _Request) -> None:
        try:
            header, body = await request.method.handler(self, request.head, bytes(request.body))
            if request.quiet:
                return
            head = frames.pack_head({"h": header, "n": len(body)})
            while body and self._queued_bytes >= MAX_QUEUED_BYTES:
                self._room.clear()
                await self._room.wait()
            self._send(frames.ANSWER, frames.ANSWER_BODY, call, head, body, steady=request.method.steady)
        except NetworkError as error:
            self._refuse(call, str(error), quiet=request.quiet)
        except Exception:
            log.exception("a handler failed")
            self._refuse(call, "internal error", quiet=request.quiet)
        if len(self._urgent) > MAX_QUEUED_HEADS:
            self.close("it asks and takes no answers")

    def _refuse(self, call: int, why: str, *, quiet: bool = False) -> None:
        if quiet:
            log.info("a message from %s: %s", self.peer_id[-6:], why)
            return
        self._urgent.append(frames.pack(frames.REFUSED, call, frames.pack_head({"why": why[:500]})))
        self._wake.set()

    def _on_answer(self, kind: int, call: int, payload: bytes) -> None:
        waiting = self._calls.get(call)
        if waiting is None or waiting.future.done():
            return  # we gave up on it: late bytes are read and dropped
        if kind == frames.REFUSED:
            why = frames.parse_head(payload).get("why")
            waiting.answered = True
            waiting.future.set_exception(PeerRefused(str(why)[:500]))
            return
        if kind == frames.ANSWER:
            head = frames.parse_head(payload)
            header, length = head.get("h"), head.get("n")
            if waiting.head is not None:
                raise BadMessage("a call is answered twice")
            if not (isinstance(header, dict) and isinstance(length, int) and 0 <= length <= waiting.max_answer):
                why = f"the limit is {waiting.max_answer} bytes"
                raise BadMessage("an answer that is too long or has no header", why=why)
            waiting.head, waiting.expected = header, length
            waiting.on_head()
        else:
            if waiting.head is None or len(waiting.body) + len(payload) > waiting.expected:
                raise BadMessage("a body that was not announced")
            waiting.body += payload
        if waiting.head is not None and len(waiting.body) == waiting.expected:
            waiting.answered = True
            waiting.future.set_result((waiting.head, bytes(waiting.body)))


async def _swallow(link: Link, header: dict[str, Any], body: bytes) -> Answer:
    """Stands for a refused method whose body is still on its way; never called."""
    raise AssertionError
