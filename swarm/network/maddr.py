"""libp2p multiaddresses as people meet them: parse, rank, and the line to send to a friend.

Format: https://multiformats.io/multiaddr/ - /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...
"""

from __future__ import annotations

import ipaddress
import re
import shlex

from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from swarm.errors import ConfigError
from swarm.network.keys import MAX_PEER_ID_CHARACTERS

EXAMPLE = "/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW..."
MAX_MADDR_CHARACTERS = 400


def peer_id_of(maddr: str) -> str:
    """The peer id at the end of a full address; ConfigError where there is none or the rest is no address."""
    try:
        if len(maddr) > MAX_MADDR_CHARACTERS:
            raise ValueError(f"it is longer than {MAX_MADDR_CHARACTERS} characters")
        place, found, peer_id = maddr.rpartition("/p2p/")  # the last one: through a relay there are two
        if not found:
            raise ValueError("it does not end with /p2p/ and a peer id")
        _check_peer_id(peer_id)
        Multiaddr(place)
    except Exception as error:  # the multiaddr library raises many kinds
        raise ConfigError(
            f"{maddr[:300]!r} is not the address of a peer", why=str(error)[:300] or type(error).__name__,
            do=f"copy the whole line that the other peer printed; an address looks like {EXAMPLE}",
        ) from None
    return peer_id


def host_and_port(maddr: str) -> tuple[str, int] | None:
    """(IP address, TCP port) where the address has them."""
    parts = maddr.split("/")
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp" or "p2p-circuit" in parts:
        return None  # through a relay the first address is the relay's
    return (parts[2], int(parts[4])) if re.fullmatch("[0-9]{1,5}", parts[4]) else None


def without_peer_id(maddr: str, peer_id: str) -> Multiaddr | None:
    """Where to dial `peer_id`, from a stranger's text; None where that is no address or another peer's."""
    place = maddr.removesuffix(f"/p2p/{peer_id}")
    if len(maddr) > MAX_MADDR_CHARACTERS or ("/p2p/" in place and not place.endswith("/p2p-circuit")):
        return None
    try:
        return Multiaddr(place)
    except Exception:  # the multiaddr library raises many kinds
        return None


def _check_peer_id(text: str) -> None:
    if len(text) > MAX_PEER_ID_CHARACTERS:
        raise ValueError("the peer id is too long")
    raw = PeerID.from_base58(text)
    if len(raw.to_bytes()) not in (34, 38) or raw.to_base58() != text:
        raise ValueError("the peer id is not whole")


def reach(maddr: str) -> int:
    """How far an address reaches: 3 the internet, 2 the local network, 1 containers and the like, 0 this machine."""
    place = host_and_port(maddr)
    if place is None:
        return 3 if maddr.startswith("/dns") else 1
    try:
        ip = ipaddress.ip_address(place[0])
    except ValueError:
        return 1
    if ip.is_loopback or ip.is_unspecified:
        return 0
    if ip.is_link_local or ip in ipaddress.ip_network("172.17.0.0/16"):
        return 1  # docker's default bridge: nobody outside gets in there
    return 3 if ip.is_global else 2  # a carrier's 100.64.0.0/10 is not the internet


def ranked(maddrs: list[str]) -> list[str]:
    """Farthest-reaching first; the order within a class is kept."""
    return sorted(maddrs, key=lambda maddr: -reach(maddr))


def join_command(maddrs: list[str], *, run_id: str | None = None) -> str:
    """What a friend types: at most two addresses, of the farthest class and the next one."""
    chosen: list[str] = []
    for maddr in ranked(maddrs):
        if reach(maddr) not in [reach(other) for other in chosen]:
            chosen.append(maddr)
    words = ["python", "-m", "swarm.peer", "--initial-peers", *chosen[:2]]
    if run_id is not None:
        words += ["--run-id", run_id]
    return shlex.join(words)
