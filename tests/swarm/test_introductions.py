"""Introductions between real peers on loopback, where there is no router to open: who is asked what, and what is
refused. The routers are in tests/lab/test_nat.py."""

import asyncio
import socket

import pytest

from swarm.errors import NetworkError, PeerRefused
from swarm.network import introductions
from swarm.network.maddr import host_and_port
from tests.swarm.network_support import PATIENCE_S, call, soon


def three(nets, **more):
    third = nets.start("third", **more)
    one = nets.start("one", initial_peers=third.maddrs)
    two = nets.start("two", initial_peers=third.maddrs)
    return third, one, two


def test_two_that_are_linked_to_a_third_are_introduced_and_linked(nets):
    third, one, two = three(nets)
    maddr = one.run(one.introductions.address_of(two.peer_id))
    seen = third.endpoint.observed_maddr(two.peer_id)
    assert maddr is not None and host_and_port(maddr) == host_and_port(seen)

    async def nobody_knows(peer_id):
        assert await one.introductions.address_of(peer_id)
        return f"/ip4/127.0.0.1/tcp/{host_and_port(two.maddrs[0])[1]}"

    one.endpoint.address_of = nobody_knows
    link = one.run(one.endpoint.link_to(two.peer_id))
    assert link.peer_id == two.peer_id and two.endpoint.is_linked(one.peer_id)


def test_who_knocks_hands_its_connection_on_to_its_own_daemon(nets):
    """The knocking end dials, and yet behaves as if it had listened: libp2p's greeting comes from it."""
    third, one, _ = three(nets)
    with socket.create_server(("127.0.0.1", 0)) as outside:
        call(third, one, "knock", {"host": "127.0.0.1", "port": outside.getsockname()[1]})
        outside.settimeout(PATIENCE_S)
        connection, (_, port) = outside.accept()
        with connection:
            assert port == host_and_port(one.maddrs[0])[1], "from the port that it listens on"
            connection.settimeout(PATIENCE_S)
            assert b"/multistream/1.0.0" in connection.recv(64)
        one.run(soon(lambda: not one.introductions._let_in))


def test_a_knock_that_nobody_answers_ends_by_itself(nets, monkeypatch):
    monkeypatch.setattr(introductions, "KNOCK_S", 0.2)
    third, one, _ = three(nets)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    call(third, one, "knock", {"host": "127.0.0.1", "port": port})
    one.run(soon(lambda: not one.introductions._let_in))


@pytest.mark.parametrize("place", [
    {}, {"host": "127.0.0.1"}, {"host": "evil.example", "port": 5000}, {"host": "127.0.0.1", "port": 22},
    {"host": "127.0.0.1", "port": 65536}, {"host": "127.0.0.1", "port": True}, {"host": "224.0.0.1", "port": 5000},
    {"host": "0.0.0.0", "port": 5000}, {"host": ["127.0.0.1"], "port": 5000},
])  # fmt: skip
def test_nobody_knocks_at_places_that_are_none(nets, place):
    third, one, _ = three(nets)
    with pytest.raises(PeerRefused, match="place"):
        call(third, one, "knock", place)
    assert not one.introductions._let_in


@pytest.mark.parametrize(("host", "seen", "allowed"), [
    ("198.41.0.4", "8.8.8.8", True), ("192.168.1.1", "8.8.8.8", False), ("127.0.0.1", "8.8.8.8", False),
    ("100.64.0.1", "8.8.8.8", False), ("192.168.1.7", "192.168.1.5", True), ("fe80::1", "2001:4860:4860::8888", False),
])
def test_strangers_send_nobody_into_its_own_network(host, seen, allowed):
    assert introductions.may_knock(host, seen=(seen, 5000)) is allowed
    assert introductions.may_knock(host, seen=None) is (host == "198.41.0.4")


def test_the_number_of_knocks_is_bounded(nets, monkeypatch):
    monkeypatch.setattr(introductions, "MAX_LET_IN", 2)
    third, one, _ = three(nets)
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    try:
        places = [{"host": "127.0.0.1", "port": server.getsockname()[1]} for server in servers]
        for place in places[:2]:
            call(third, one, "knock", place)
        held = [server.accept() for server in servers[:2]]
        with pytest.raises(PeerRefused, match="too many"):
            call(third, one, "knock", places[2])
        assert len(held) == 2
    finally:
        for server in servers:
            server.close()


def test_who_is_not_linked_or_not_willing_introduces_nobody(nets):
    third, one, two = three(nets, introduce=False)
    with pytest.raises(PeerRefused, match="no such method"):
        call(one, third, "introduce", {"to": two.peer_id})
    assert one.run(one.introductions.address_of(two.peer_id)) is None
    with pytest.raises(NetworkError):
        call(two, one, "introduce", {"to": "nonsense"}, maddrs=one.maddrs)


def test_stopping_ends_what_is_under_way(nets):
    third, one, _ = three(nets)
    with socket.create_server(("127.0.0.1", 0)) as outside:
        call(third, one, "knock", {"host": "127.0.0.1", "port": outside.getsockname()[1]})
        connection, _ = outside.accept()
        with connection:
            assert one.introductions._let_in
            one.run(asyncio.wait_for(one.introductions.stop(), PATIENCE_S))
            assert not one.introductions._let_in
