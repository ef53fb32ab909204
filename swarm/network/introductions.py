"""Hole punching by introduction: two peers behind routers come together through a third that both are linked to.

    asker  -- introduce(other) -->  third  -- knock(asker's address) -->  other: dials the asker, in vain at first, from
           <-- other's address ---         <-- done -------------------          the port that it listens on
    asker dials other, from the port that it listens on

Both routers have now seen a connection from inside to just that outside, and take the other side's packets for its
answers: a simultaneous open (RFC 9293, 3.5; RFC 5128, 3.4), as long as they keep a connection's port ("cone"). Both
ends have dialled, and libp2p needs one to have listened: the other hands its socket on to its own p2pd's listening
port.

libp2p's own way leads through relays (https://libp2p.io/docs/dcutr/), but p2pd reserves a relay only once it has four
candidates or after three minutes, and a relay cuts streams after 128 KiB (both measured). Here nothing is relayed: the
third peer passes on two addresses. A mere SYN from another socket than the one that answers does not do: Linux routers
check sequence numbers (measured).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from typing import TYPE_CHECKING, Any

from swarm.errors import BadMessage, NetworkError, PeerRefused
from swarm.network.link import Answer, Link
from swarm.network.maddr import host_and_port

if TYPE_CHECKING:
    from swarm.network.endpoint import Endpoint

INTRODUCE_S = 5.0
KNOCK_S = 8.0
"""how long the other's dial may take to come"""
MAX_ASKED = 3
MAX_LET_IN = 32
MIN_PORT = 1024
CHUNK_BYTES = 64 * 1024


class Introductions:
    def __init__(self, endpoint: Endpoint, *, inside: tuple[str, int] | None, willing: bool) -> None:
        """`inside`: host and port at which p2pd listens; `willing`: introduce others to each other. Whatever that is,
        this peer can be introduced itself."""
        self._endpoint, self._inside = endpoint, inside
        self._busy: set[str] = set()
        self._let_in: set[asyncio.Task[None]] = set()
        if willing:
            endpoint.on("introduce", self._on_introduce)
        if inside is not None:
            endpoint.on("knock", self._on_knock)

    async def address_of(self, peer_id: str) -> str | None:
        """Where `peer_id` can be dialled from now on; None where nobody could introduce us."""
        for third in [p for p in self._endpoint.linked_peers() if p != peer_id][:MAX_ASKED]:
            with contextlib.suppress(NetworkError):
                answer, _ = await self._endpoint.call(third, "introduce", {"to": peer_id}, deadline_s=INTRODUCE_S)
                host, port = _place(answer)
                return f"/ip{ipaddress.ip_address(host).version}/{host}/tcp/{port}"
        return None

    async def _on_introduce(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        wanted = header.get("to")
        asker = host_and_port(link.observed_maddr)
        seen = self._endpoint.observed_maddr(wanted) if isinstance(wanted, str) else None
        place = host_and_port(seen) if seen is not None else None
        if asker is None or place is None or not isinstance(wanted, str):
            raise PeerRefused("this peer is not linked to it directly")
        if link.peer_id in self._busy:
            raise PeerRefused("one introduction at a time")
        self._busy.add(link.peer_id)
        try:
            await self._endpoint.call(
                wanted, "knock", {"host": asker[0], "port": asker[1]}, deadline_s=INTRODUCE_S - 1
            )
        finally:
            self._busy.discard(link.peer_id)
        return {"host": place[0], "port": place[1]}, b""

    async def _on_knock(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        """Only one dial, and nothing is sent on it before libp2p's handshake: of no use to attack somebody with."""
        host, port = _place(header)
        if not may_knock(host, seen=host_and_port(link.observed_maddr)):
            raise PeerRefused("a place in this peer's own network, asked for from outside")
        if len(self._let_in) >= MAX_LET_IN:
            raise PeerRefused("too many introductions at once")
        assert self._inside is not None
        try:
            knocking = _socket_at(self._inside[1], host)
        except OSError as error:
            raise PeerRefused(f"cannot knock: {error.strerror or error}") from None
        task = asyncio.create_task(_let_in(knocking, (host, port), self._inside))
        self._let_in.add(task)
        task.add_done_callback(self._let_in.discard)
        await asyncio.sleep(0)  # it has run up to its first wait: the SYN is on its way
        return {}, b""

    async def stop(self) -> None:
        for task in self._let_in:
            task.cancel()
        await asyncio.gather(*self._let_in, return_exceptions=True)


def may_knock(host: str, *, seen: tuple[str, int] | None) -> bool:
    """Whoever comes from the internet (`seen`: where its link comes from) sends nobody to machines of a local network,
    which it could not reach itself."""
    if ipaddress.ip_address(host).is_global:
        return True
    return seen is not None and not ipaddress.ip_address(seen[0]).is_global


async def _let_in(knocking: socket.socket, outside: tuple[str, int], inside: tuple[str, int]) -> None:
    """Dial `outside` until it dials too, then hand the connection on to `inside`."""
    writers: list[asyncio.StreamWriter] = []
    try:
        with knocking:
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(knocking, outside), KNOCK_S)
            theirs, to_them = await asyncio.open_connection(sock=knocking)
            writers.append(to_them)
            ours, to_us = await asyncio.open_connection(*inside)
            writers.append(to_us)
            pumps = [asyncio.ensure_future(_pump(theirs, to_us)), asyncio.ensure_future(_pump(ours, to_them))]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
    except (OSError, asyncio.TimeoutError):
        pass  # no hole came to be; the asker sees that its own dial fails
    finally:
        for writer in writers:
            writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()


def _socket_at(port: int, host: str) -> socket.socket:
    """A socket at the port that p2pd listens on; p2pd dials from there too. Raises OSError."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.setblocking(False)
        made.bind(("", port))
    except OSError:
        made.close()
        raise
    return made


def _place(header: dict[str, Any]) -> tuple[str, int]:
    """(IP address, port) from a stranger's header. Raises BadMessage."""
    host, port = header.get("host"), header.get("port")
    try:
        ip = ipaddress.ip_address(str(host)[:60])
    except ValueError:
        raise BadMessage("a place without an address") from None
    if type(port) is not int or not MIN_PORT <= port <= 65535 or ip.is_multicast or ip.is_unspecified:
        raise BadMessage("a place that nobody should knock at")
    return str(ip), port
