"""libp2p multiaddresses as people meet them: parse, rank, and the line to send to a friend.

Format: https://multiformats.io/multiaddr/ - /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...
"""

from __future__ import annotations

import ipaddress
import shlex

from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from swarm.errors import ConfigError

EXAMPLE = "/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW..."


def peer_id_of(maddr: str) -> str:
    """The peer id at the end of a full address; ConfigError where there is none or the rest is no address."""
    try:
        peer_id: str = Multiaddr(maddr)["p2p"]
        if len(PeerID.from_base58(peer_id).to_bytes()) not in (34, 38):
            raise ValueError("the peer id has a wrong length")
    except Exception as error:  # the multiaddr library raises many kinds
        raise ConfigError(
            f"{maddr!r} is not the address of a peer", why=str(error) or type(error).__name__,
            do=f"copy the whole line that the other peer printed; an address looks like {EXAMPLE}",
        ) from None
    return peer_id


def host_and_port(maddr: str) -> tuple[str, int] | None:
    """(IP address, TCP port) where the address has them."""
    parts = maddr.split("/")
    if len(parts) >= 5 and parts[1] in ("ip4", "ip6") and parts[3] == "tcp" and parts[4].isdigit():
        return parts[2], int(parts[4])
    return None


def reach(maddr: str) -> int:
    """How far an address reaches: 3 the internet, 2 the local network, 1 containers and the like, 0 this machine."""
    place = host_and_port(maddr)
    if place is None:
        return 3 if maddr.startswith("/dns") else 1
    try:
        ip = ipaddress.ip_address(place[0])
    except ValueError:
        return 1
    if ip.is_loopback:
        return 0
    if ip.is_link_local or ip in ipaddress.ip_network("172.17.0.0/16"):
        return 1  # docker's default bridge: nobody outside gets in there
    return 2 if ip.is_private else 3


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
