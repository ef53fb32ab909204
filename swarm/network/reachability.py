"""Can others dial this peer? Asked of other peers, since no machine can know it of itself.

A peer asks a few others to open a plain TCP connection to the address that they see it come from, at the port it
listens on, and to look for libp2p's greeting there. The prober connects nowhere else, so a stranger cannot use it to
scan other machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from typing import Any

from swarm.errors import NetworkError, PeerRefused
from swarm.network.endpoint import Endpoint
from swarm.network.link import Answer, Link
from swarm.network.maddr import host_and_port

PROBE_S = 5.0
GREETING = b"/multistream/1.0.0"


def serve(endpoint: Endpoint) -> None:
    """Probe for others: one at a time for each, so that nobody scans machines behind their own address through us."""
    probing: set[str] = set()

    async def probe(link: Link, header: dict[str, Any], body: bytes) -> Answer:
        port, seen = header.get("port"), host_and_port(link.observed_maddr)
        if not isinstance(port, int) or not 1024 <= port <= 65535 or seen is None:
            raise PeerRefused("need a port from 1024 to 65535 and a direct connection")
        if link.peer_id in probing:
            raise PeerRefused("one probe at a time")
        probing.add(link.peer_id)
        try:
            return {"reached": await dial(seen[0], port), "from": seen[0]}, b""
        finally:
            probing.discard(link.peer_id)

    endpoint.on("probe", probe)


async def dial(host: str, port: int) -> bool:
    """True where libp2p answers at host:port within `PROBE_S`."""
    writer = None
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), PROBE_S)
        return GREETING in await asyncio.wait_for(reader.read(64), PROBE_S)
    except (OSError, asyncio.TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()


async def ask(endpoint: Endpoint, peers: list[str], *, port: int | None) -> tuple[bool | None, str]:
    """(reachable, reason); None where nobody could tell."""
    if port is None:
        return False, "it listens nowhere: outgoing connections only, which is fine for training"
    for peer_id in peers[:3]:
        with contextlib.suppress(NetworkError):
            answer, _ = await endpoint.call(peer_id, "probe", {"port": port}, deadline_s=PROBE_S + 2)
            at = f"{_address(answer.get('from'))} port {port}"
            if answer.get("reached") is True:
                return True, f"others reach it at {at}"
            return False, f"nobody gets in at {at}: outgoing connections only, which is fine for training"
    return None, "nobody to ask yet"


def _address(seen: object) -> str:
    """A stranger's text goes to the screen only if it is an address."""
    try:
        return str(ipaddress.ip_address(str(seen)[:60]))
    except ValueError:
        return "its address"
