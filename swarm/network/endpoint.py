"""An endpoint: this peer's links to all others, dialled when needed, and the methods that others may call.

Every link starts with `hello` both ways: protocol version, session, clock. Two processes with one identity would each
get half of the streams, so the second is refused here while the first is alive; clocks are compared here because DHT
records of a peer that is seconds off expire at the wrong time for everyone else.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from hivemind.p2p import PeerID

from swarm.errors import PeerGone, PeerRefused
from swarm.network.daemon import Daemon
from swarm.network.line import Line
from swarm.network.link import Answer, Budget, Handler, Link, Method
from swarm.network.maddr import without_peer_id

PROTOCOL = "/swarm/1"
DIAL_S = 10.0
BLIND_S = 3.0
"""without an address: only a connection that is open already can carry the stream, so the answer comes soon or never"""
HELLO_S = 10.0
MAX_LINKS = 512
MAX_LINKS_OF_ONE_PEER = 4
MAX_ADDRESSES_DIALLED = 8
MAX_CLOCK_S = 1e12
SAME_IDENTITY = "this identity is in use"
TWIN_ALIVE_S = 5.0
"""a peer heard from within this time is alive (heartbeats come every 1.5 s)"""

log = logging.getLogger(__name__)


class Endpoint:
    def __init__(self, daemon: Daemon, peer_id: str, *, clock: Callable[[], float]) -> None:
        self.peer_id = peer_id
        self.session = secrets.token_hex(8)
        self.skews_s: dict[str, float] = {}
        """each linked peer's clock minus ours, by at least so much"""
        self.on_link_closed: Callable[[str], None] = lambda peer_id: None
        self.address_of: Callable[[str], Awaitable[str | None]] = _nowhere
        """where a peer behind a router can be dialled, once somebody has introduced us; see introductions.py"""
        self._p2p, self._clock = daemon.p2p, clock
        self._links: defaultdict[str, list[Link]] = defaultdict(list)
        self._dialling: dict[str, asyncio.Future[Link]] = {}
        self._methods: dict[str, Method] = {"hello": Method(self._on_hello, 0)}
        self._budget = Budget()
        self._lines = Line(), Line()
        self._closed_bytes = [0, 0]
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        await self._p2p.add_binary_stream_handler(PROTOCOL, self._on_stream)

    def on(self, method: str, handler: Handler, *, max_body: int = 0, steady: bool = False) -> None:
        """Let others call `method`. `handler(link, header, body)` answers (header, body) or raises NetworkError."""
        self._methods[method] = Method(handler, max_body, steady)

    @property
    def bytes_sent(self) -> int:
        return self._closed_bytes[0] + sum(link.bytes_sent for link in self._all_links())

    @property
    def bytes_received(self) -> int:
        return self._closed_bytes[1] + sum(link.bytes_received for link in self._all_links())

    def is_linked(self, peer_id: str) -> bool:
        return any(link.greeted and not link.closed.is_set() for link in self._links.get(peer_id, ()))

    def observed_maddr(self, peer_id: str) -> str | None:
        """Where a linked peer's connection comes from."""
        links = [link for link in self._links.get(peer_id, ()) if link.greeted and not link.closed.is_set()]
        return links[-1].observed_maddr if links else None

    def waiting_bytes(self, peer_id: str) -> int:
        """Of bodies that wait here for their turn on the line to that peer."""
        return sum(link.waiting_bytes for link in self._links.get(peer_id, ()) if not link.closed.is_set())

    def last_heard(self, peer_id: str) -> float:
        """When anything came from that peer last, by the event loop's clock."""
        return max((link.last_heard for link in self._links.get(peer_id, ())), default=float("-inf"))

    def linked_peers(self) -> list[str]:
        return [peer_id for peer_id in list(self._links) if self.is_linked(peer_id)]

    async def call(
        self, peer_id: str, method: str, header: dict[str, Any] | None = None, body: bytes = b"", *,
        deadline_s: float, max_answer: int = 0, maddrs: Iterable[str] = (), steady: bool = False,
        on_head: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Ask one peer, over an open link or a new one; see `Link.call`. Raises PeerGone or PeerRefused."""
        link = await self.link_to(peer_id, maddrs=maddrs)
        return await link.call(
            method, header, body, deadline_s=deadline_s, max_answer=max_answer, steady=steady, on_head=on_head
        )

    async def notify(
        self, peer_id: str, method: str, header: dict[str, Any] | None = None, body: bytes = b"", *,
        deadline_s: float, maddrs: Iterable[str] = (),
    ) -> None:
        """Tell one peer without being answered; see `Link.notify`. Raises PeerGone."""
        link = await self.link_to(peer_id, maddrs=maddrs)
        await link.notify(method, header, body, deadline_s=deadline_s)

    async def link_to(self, peer_id: str, *, maddrs: Iterable[str] = ()) -> Link:
        """The link to a peer; dialled once even when many ask at the same time. Raises PeerGone with the reason."""
        for link in reversed(self._links.get(peer_id, ())):
            if link.greeted and not link.closed.is_set():
                return link
        if peer_id not in self._dialling:
            self._start_dialling(peer_id, list(maddrs))
        return await asyncio.shield(self._dialling[peer_id])

    def _start_dialling(self, peer_id: str, maddrs: list[str]) -> None:
        """`_dialling` gets the link that is there first: this one, or that of the other side dialling us."""
        first: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._dialling[peer_id] = first
        task = asyncio.create_task(self._dial(peer_id, maddrs))
        self._tasks.add(task)

        def dialled(done: asyncio.Task[Link]) -> None:
            self._tasks.discard(task)
            error = None if done.cancelled() else done.exception()
            if first.done():
                return
            del self._dialling[peer_id]
            if done.cancelled():
                first.cancel()
            elif error is not None:
                first.set_exception(error)
                first.exception()  # seen, also when nobody waits any more
            else:
                first.set_result(done.result())

        task.add_done_callback(dialled)

    async def _dial(self, peer_id: str, maddrs: list[str]) -> Link:
        if peer_id == self.peer_id:
            raise PeerGone("that is this peer itself")
        why = ""
        try:
            introduced = await self.address_of(peer_id)
            maddrs = [*([introduced] if introduced else []), *maddrs]
            target = PeerID.from_base58(peer_id)
            places = [place for maddr in maddrs if (place := without_peer_id(maddr, peer_id)) is not None]
            if places:
                try:
                    connecting = self._p2p._client.connect(target, places[:MAX_ADDRESSES_DIALLED])
                    await asyncio.wait_for(connecting, DIAL_S)
                except Exception as error:  # its routing table may still know a better address
                    why = _reason(error)
            opening = self._p2p.call_binary_stream_handler(target, PROTOCOL)
            info, reader, writer = await asyncio.wait_for(opening, DIAL_S if places else BLIND_S)
            observed_maddr = str(info.addr)
        except Exception as error:  # hivemind and its libraries raise many kinds, also for a peer id that is none
            raise PeerGone(f"cannot reach {peer_id[:80]}", why=why or _reason(error)) from None
        link = self._add(peer_id, reader, writer, observed_maddr, dialled=True)
        asked = self._clock()
        try:
            answer, _ = await link.call("hello", {"v": 1, "session": self.session, "time": asked}, deadline_s=HELLO_S)
            answered = self._clock()
            self._greeted(link, answer, (asked + answered) / 2, unsure_s=(answered - asked) / 2)
        except BaseException:
            link.close("no greeting")
            raise
        return link

    async def _on_stream(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer_id = info.peer_id.to_base58()
        crowded = len(self._links.get(peer_id, ())) >= MAX_LINKS_OF_ONE_PEER or len(self._all_links()) >= MAX_LINKS
        if crowded:
            writer.transport.abort()
            return
        link = self._add(peer_id, reader, writer, str(info.addr))
        try:
            await asyncio.wait_for(link.closed.wait(), HELLO_S)
        except asyncio.TimeoutError:
            if not link.greeted:
                link.close("it did not say hello")
        except asyncio.CancelledError:
            link.close("leaving")

    async def _on_hello(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        now = asyncio.get_running_loop().time()
        for other in self._links.get(link.peer_id, ()):
            alive = not other.closed.is_set() and now - other.last_heard < TWIN_ALIVE_S
            if other is not link and alive and other.greeted and other.session != header.get("session"):
                raise PeerRefused(SAME_IDENTITY)
        self._greeted(link, header, self._clock())
        return {"v": 1, "session": self.session, "time": self._clock()}, b""

    def _greeted(self, link: Link, header: dict[str, Any], now: float, *, unsure_s: float = 0.0) -> None:
        """`now`: by our clock, give or take `unsure_s`, when the other looked at its own: on a busy machine an answer
        takes seconds, and says no more of a clock than that."""
        version, session, theirs = header.get("v"), header.get("session"), header.get("time")
        understood = (
            version == 1 and isinstance(session, str) and len(session) <= 64
            and isinstance(theirs, (int, float)) and abs(theirs) < MAX_CLOCK_S
        )
        if not understood:  # who dialled closes the link; where that is not us, it is closed for want of a greeting
            raise PeerRefused("we speak version 1 of the protocol", do="use the same version of this program")
        link.session = str(session)
        link.greeted = True
        awaited = self._dialling.pop(link.peer_id, None)
        if awaited is not None and not awaited.done():
            awaited.set_result(link)
        skew_s = float(theirs or 0) - now
        self.skews_s[link.peer_id] = math.copysign(max(0.0, abs(skew_s) - unsure_s), skew_s)

    def _add(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, observed_maddr: str, *,
        dialled: bool = False,
    ) -> Link:
        link = Link(
            peer_id, reader, writer, self._methods, observed_maddr, dialled=dialled, budget=self._budget,
            lines=self._lines,
        )
        self._links[peer_id].append(link)
        task = asyncio.create_task(self._forget_when_closed(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return link

    async def _forget_when_closed(self, link: Link) -> None:
        await link.closed.wait()
        self._links[link.peer_id].remove(link)
        self._closed_bytes[0] += link.bytes_sent
        self._closed_bytes[1] += link.bytes_received
        if not self._links[link.peer_id]:
            del self._links[link.peer_id]
        if link.greeted and not self.is_linked(link.peer_id):
            self.skews_s.pop(link.peer_id, None)
            self.on_link_closed(link.peer_id)

    def _all_links(self) -> list[Link]:
        return [link for links in self._links.values() for link in links]

    async def stop(self) -> None:
        for link in self._all_links():
            link.close("leaving")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _nowhere(peer_id: str) -> None:
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return str(error)[:2000] or type(error).__name__
