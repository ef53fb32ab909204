"""What kind of place on the internet is this? Asked of other peers, since no machine can know it of itself.

A peer asks a few others to open a plain TCP connection to the address that they see it come from, at the port it
listens on, and to look for libp2p's greeting there. The prober connects nowhere else, so a stranger cannot use it to
scan other machines. From what they say follows one of three situations:

    public     others get in. Opens rounds, owns parts, and introduces those behind routers to each other
    punched    behind a router that keeps a connection's port whoever is at the other end ("cone"): others dial it once
               a third peer has introduced them (introductions.py)
    outbound   behind a router that picks a new port for each other end ("symmetric"), where that fails: it dials, and
               is dialled by nobody. It trains and contributes all the same, but opens no rounds and owns no parts
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import NetworkError, PeerRefused
from swarm.network.endpoint import Endpoint
from swarm.network.link import Answer, Link
from swarm.network.maddr import host_and_port

PROBE_S = 5.0
GREETING = b"/multistream/1.0.0"
MAX_ASKED = 3

PUBLIC, PUNCHED, OUTBOUND, UNKNOWN = "public", "punched", "outbound", ""


@dataclass(frozen=True)
class Sighting:
    """What another peer says of this one."""

    reached: bool
    """it got in"""
    host: str
    port: int
    """where it sees our connection come from; port 0: it does not say"""


@dataclass(frozen=True)
class Situation:
    reach: str
    text: str
    """what that means, for a person"""


def judge(sightings: Sequence[Sighting], *, port: int | None) -> Situation:
    """The situation that others' sightings amount to; `port`: the one we listen on."""
    if port is None:
        return Situation(OUTBOUND, "it listens nowhere: outgoing connections only, which is fine for training")
    if not sightings:
        return Situation(UNKNOWN, "nobody to ask yet")
    for seen in sightings:
        if seen.reached:
            return Situation(PUBLIC, f"others reach it at {seen.host} port {port}")
    ports = {seen.port for seen in sightings}
    kept = ports == {port} or (len(sightings) > 1 and len(ports) == 1 and 0 not in ports)
    if kept:
        return Situation(
            PUNCHED, f"behind a router at {sightings[0].host} that keeps ports: others get in once somebody has "
            "introduced them (hole punching)",
        )
    return Situation(
        OUTBOUND, f"nobody gets in at {sightings[0].host} port {port}, and the router changes ports: outgoing "
        "connections only. It trains and contributes in full, others do the adding up",
    )


def can_meet(mine: str, theirs: str) -> bool:
    """Can a peer of reach `mine` dial one of reach `theirs`?"""
    if theirs == OUTBOUND:
        return False
    return not (mine == OUTBOUND and theirs == PUNCHED)


def serve(endpoint: Endpoint) -> None:
    """Probe for others: one at a time for each, so that nobody scans machines behind their own address through us."""
    probing: set[str] = set()

    async def probe(link: Link, header: dict[str, object], body: bytes) -> Answer:
        port, seen = header.get("port"), host_and_port(link.observed_maddr)
        if not isinstance(port, int) or not 1024 <= port <= 65535 or seen is None:
            raise PeerRefused("need a port from 1024 to 65535 and a direct connection")
        if link.peer_id in probing:
            raise PeerRefused("one probe at a time")
        probing.add(link.peer_id)
        try:
            return {"reached": await dial(seen[0], port), "from": seen[0], "port": seen[1]}, b""
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


async def ask(endpoint: Endpoint, peers: list[str], *, port: int | None) -> Situation:
    """This peer's situation, as up to three others see it."""
    answers = [] if port is None else await asyncio.gather(*(_sighting(endpoint, p, port) for p in peers[:MAX_ASKED]))
    return judge([seen for seen in answers if seen is not None], port=port)


async def _sighting(endpoint: Endpoint, peer_id: str, port: int) -> Sighting | None:
    with contextlib.suppress(NetworkError):
        answer, _ = await endpoint.call(peer_id, "probe", {"port": port}, deadline_s=PROBE_S + 2)
        seen = answer.get("port")
        return Sighting(
            answer.get("reached") is True, _address(answer.get("from")), seen if type(seen) is int else 0
        )
    return None


def _address(seen: object) -> str:
    """A stranger's text goes to the screen only if it is an address."""
    try:
        return str(ipaddress.ip_address(str(seen)[:60]))
    except ValueError:
        return "its address"
