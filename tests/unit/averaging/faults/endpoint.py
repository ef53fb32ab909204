"""In place of an endpoint: calls and messages over the simulated network, served by a task each, as in the product."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from swarm.errors import BadMessage, NetworkError, PeerGone, PeerRefused
from swarm.network.link import Handler
from tests.unit.averaging.faults.loop import Process, StepLoop
from tests.unit.averaging.faults.network import Link, Network

Answer = tuple[dict[str, Any], bytes]


class Endpoint:
    """Of one process."""

    bytes_sent = bytes_received = 0

    def __init__(self, loop: StepLoop, network: Network, peer_id: str, process: Process) -> None:
        self.id, self.process, self.network = peer_id, process, network
        self._loop = loop
        self._methods: dict[str, tuple[Handler, int]] = {}
        self._asking: dict[asyncio.Future[Answer], Link] = {}
        self._serving: dict[object, list[asyncio.Task[None]]] = {}

    def lost(self, peer_id: str) -> None:
        """The link to a peer has ended."""

    def on(self, method: str, handler: Handler, *, max_body: int = 0) -> None:
        self._methods[method] = handler, max_body

    def is_linked(self, peer_id: str) -> bool:
        return self.network.is_linked(self, peer_id)

    def on_link_closed(self, link: Link) -> None:
        peer_id = link.other(self).id
        self.lost(peer_id)
        for waiting, through in list(self._asking.items()):
            if through is link and not waiting.done():
                waiting.set_exception(PeerGone("the link ended"))

    async def call(
        self, peer_id: str, method: str, header: Mapping[str, Any] | None = None, body: bytes = b"", *,
        deadline_s: float, max_answer: int = 0, maddrs: Iterable[str] = (),
    ) -> Answer:
        network = self.network
        link = await network.dial(self, peer_id)
        other = link.other(self)
        assert isinstance(other, Endpoint)
        waiting: asyncio.Future[Answer] = self._loop.create_future()

        def answered(answer: Answer | NetworkError) -> None:
            if waiting.done():
                return
            if isinstance(answer, NetworkError):
                waiting.set_exception(answer)
            elif len(answer[1]) > max_answer:
                waiting.set_exception(BadMessage("an answer that is too long"))
            else:
                waiting.set_result(answer)

        def answer(content: Answer | NetworkError) -> None:
            network.send(link, other, lambda: self.process.post(answered, content))

        self._asking[waiting] = link
        network.send(link, self, partial(
            other.process.post, other.serve, self.id, waiting, method, dict(header or {}), body, answer
        ))
        try:
            return await asyncio.wait_for(waiting, deadline_s)
        except asyncio.TimeoutError:
            raise PeerGone(f"{method}: no answer within {deadline_s:.1f} s") from None
        finally:
            del self._asking[waiting]
            if waiting.cancelled():
                network.send(link, self, partial(other.process.post, other.cancel, waiting))

    async def notify(
        self, peer_id: str, method: str, header: Mapping[str, Any] | None = None, body: bytes = b"", *,
        deadline_s: float, maddrs: Iterable[str] = (),
    ) -> None:
        link = await self.network.dial(self, peer_id)
        other = link.other(self)
        assert isinstance(other, Endpoint)
        self.network.send(link, self, partial(
            other.process.post, other.serve, self.id, None, method, dict(header or {}), body, lambda content: None
        ))

    def serve(
        self, asker: str, call: object, method: str, header: dict[str, Any], body: bytes,
        answer: Callable[[Answer | NetworkError], None],
    ) -> None:
        """A request has come."""
        task = asyncio.get_running_loop().create_task(self._serve(asker, method, header, body, answer))
        if call is not None:
            self._serving.setdefault(call, []).append(task)
            task.add_done_callback(lambda done: self._serving.pop(call, None))

    def cancel(self, call: object) -> None:
        """Who asked does not wait any more."""
        for task in self._serving.get(call, ()):
            task.cancel()

    async def _serve(
        self, asker: str, method: str, header: dict[str, Any], body: bytes,
        answer: Callable[[Answer | NetworkError], None],
    ) -> None:
        handler, max_body = self._methods.get(method, (None, 0))
        try:
            if handler is None or len(body) > max_body:
                raise PeerRefused("no such method, or a body that is too long")
            answer(await handler(_Caller(asker), header, body))  # type: ignore[arg-type]
        except NetworkError as error:
            answer(PeerRefused(str(error)))


@dataclass(frozen=True)
class _Caller:
    """What a handler sees of a link."""

    peer_id: str
