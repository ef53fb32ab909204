"""The libp2p daemon, its life tied to ours, and links between peers: real daemons and sockets on loopback."""

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest
from hivemind.p2p import PeerID

from swarm.errors import JoinError, NetworkError, PeerGone, PeerRefused
from swarm.network import endpoint as endpoints
from swarm.network.link import Link
from swarm.network.maddr import host_and_port, peer_id_of
from tests.swarm.network_support import (
    DEAD,
    KEY,
    LOOPBACK,
    PATIENCE_S,
    Nets,
    call,
    key,
    p2pd_of,
    soon,
    until,
)  # fmt: skip

ROOT = Path(__file__).parents[2]


def test_the_daemon_has_the_identity_of_our_key(nets):
    network = nets.start("one")
    assert network._daemon.p2p.peer_id.to_base58() == network.peer_id == key("one").peer_id
    assert network.maddrs and all(peer_id_of(maddr) == network.peer_id for maddr in network.maddrs)
    assert network.daemon_alive()


def test_a_port_in_use_is_a_clear_error_and_leaves_nothing(nets, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        maddr = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        with pytest.raises(NetworkError, match="cannot listen on") as caught:
            nets.start("one", listen=[maddr])
    assert maddr in str(caught.value) and "--listen" in caught.value.do
    assert list(folder.iterdir()) == []


def test_the_port_of_another_daemon_is_in_use_too(nets):
    """Two of them would share it without a word (SO_REUSEPORT), and each would get half of the connections."""
    host, port = host_and_port(nets.start("one").maddrs[0])
    with pytest.raises(NetworkError, match="cannot listen on"):
        nets.start("two", listen=[f"/ip4/{host}/tcp/{port}"])


@pytest.mark.parametrize(
    "maddr", ["/ip4/127.0.0.1/tcp/99999", "/ip4/127.0.0.1/tcp/x", "/ip4/8.8.8.8/tcp/31337", "nonsense"]
)
def test_an_address_to_listen_on_that_cannot_be_is_a_network_error(nets, folder, maddr):
    with pytest.raises(NetworkError):
        nets.start("one", listen=[maddr])
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_network_error(folder):
    with Nets(folder / "missing") as nets, pytest.raises(NetworkError, match="cannot write"):
        nets.start("one")


def test_a_start_that_is_called_off_leaves_nothing(nets, folder):
    network = nets.make("one")
    future = network.submit(
        network.start(folder=folder, listen=LOOPBACK, announce=[], initial_peers=[DEAD], join_timeout_s=600)
    )
    until(lambda: list(folder.iterdir()), "the daemon's folder")
    network.stop()
    with pytest.raises((concurrent.futures.CancelledError, NetworkError)):
        future.result(PATIENCE_S)
    assert list(folder.iterdir()) == []
    assert not network.daemon_alive()


def test_stop_is_safe_twice_from_any_thread_and_without_a_start(nets, folder):
    nets.make("never started").stop()
    network = nets.start("one")
    with pytest.raises(RuntimeError, match="own thread"):
        network.run(_stop_inside(network))
    threads = [threading.Thread(target=network.stop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    network.stop()
    assert not network.daemon_alive() and not network._thread.is_alive()
    assert list(folder.iterdir()) == []


async def _stop_inside(network):
    network.stop()


def test_the_secret_key_does_not_stay_on_the_disk(nets, folder):
    nets.start("one")
    assert [path for path in folder.rglob("*") if path.name == "key"] == []


def test_a_daemon_that_dies_is_noticed_and_stop_still_works(nets, folder):
    network = nets.start("one")
    lost = threading.Event()
    network.on_daemon_lost = lost.set
    p2pd_of(network).kill()
    assert lost.wait(PATIENCE_S)
    assert not network.daemon_alive()
    assert network.run(network.dht.publish(KEY, "x", ttl_s=30)) in (True, False)  # no exception, no wait without end
    with pytest.raises(PeerGone):
        network.run(network.endpoint.link_to(key("two").peer_id, maddrs=[DEAD]))
    network.stop()
    assert list(folder.iterdir()) == []


def test_a_watchdog_that_is_killed_takes_its_daemon_with_it(nets):
    if not sys.platform.startswith("linux"):
        pytest.skip("PR_SET_PDEATHSIG is Linux's")
    network = nets.start("one")
    lost = threading.Event()
    network.on_daemon_lost = lost.set
    p2pd = p2pd_of(network)
    network._daemon._process.kill()
    assert lost.wait(PATIENCE_S)
    until(lambda: not p2pd.is_running() or p2pd.status() == psutil.STATUS_ZOMBIE, "p2pd's end")


def test_a_stop_is_no_loss(nets):
    network = nets.start("one")
    lost = threading.Event()
    network.on_daemon_lost = lost.set
    network.stop()
    assert not lost.is_set()


def test_a_killed_process_leaves_no_daemon_no_watchdog_and_no_file(folder):
    home = folder / "home"
    home.mkdir()
    program = f"""
        import pathlib, sys, time
        from tests.swarm.network_support import Nets
        nets = Nets(pathlib.Path({str(home)!r}))
        print("ready", nets.start("one").maddrs[0], flush=True)
        time.sleep(600)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert child.stdout.readline().startswith("ready")
        family = psutil.Process(child.pid).children(recursive=True)
        assert {"p2pd"} <= {process.name() for process in family} and len(family) == 2
        assert list(home.iterdir())
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    until(lambda: not any(process.is_running() for process in family), "the end of p2pd and its watchdog")
    until(lambda: not list(home.iterdir()), "the end of their folder")
    assert child.stdout.read() == ""  # at once: nobody else holds its output open




# --- endpoint


def test_calls_go_both_ways_over_one_link(nets):
    one, two = nets.start("one"), nets.start("two")

    async def echo(link, header, body):
        return {"from": link.peer_id, **header}, body

    for network in (one, two):
        network.endpoint.on("echo", echo, max_body=10**6)
    assert call(one, two, "echo", {"a": 1}, b"x", max_answer=1) == ({"from": one.peer_id, "a": 1}, b"x")
    until(lambda: two.endpoint.is_linked(one.peer_id))
    answer = two.run(two.endpoint.call(one.peer_id, "echo", deadline_s=PATIENCE_S))  # no address: over the same link
    assert answer == ({"from": two.peer_id}, b"")
    assert one.endpoint.linked_peers() == [two.peer_id]
    assert len(one.endpoint._links[two.peer_id]) == 1
    until(lambda: one.endpoint.bytes_sent == two.endpoint.bytes_received > 0, "all bytes to arrive")
    large = os.urandom(10**6)
    assert call(one, two, "echo", body=large, max_answer=10**6)[1] == large


def test_many_callers_at_once_dial_once(nets):
    one, two = nets.start("one"), nets.start("two")

    async def ask():
        links = await asyncio.gather(
            *(one.endpoint.link_to(two.peer_id, maddrs=two.maddrs) for _ in range(20))
        )
        return len(set(links))

    assert one.run(ask()) == 1
    assert one.endpoint._dialling == {}


def test_both_may_dial_at_the_same_time(nets):
    one, two = nets.start("one"), nets.start("two")
    for _ in range(3):
        futures = [
            one.submit(one.endpoint.link_to(two.peer_id, maddrs=two.maddrs)),
            two.submit(two.endpoint.link_to(one.peer_id, maddrs=one.maddrs)),
        ]
        for future in futures:
            assert future.result(PATIENCE_S).greeted
        close_links(one, two)


def test_who_is_dialled_in_vain_may_be_quicker_itself(nets, monkeypatch):
    """A push to a member that the sender has no address of goes out as soon as that member dials."""
    monkeypatch.setattr(endpoints, "BLIND_S", 600.0)
    one, two = nets.start("one"), nets.start("two")

    async def never(*_):
        await asyncio.Event().wait()

    monkeypatch.setattr(one.endpoint._p2p, "call_binary_stream_handler", never)
    waiting = one.submit(one.endpoint.link_to(two.peer_id))
    until(lambda: two.peer_id in one.endpoint._dialling, "the dial")
    link = two.run(two.endpoint.link_to(one.peer_id, maddrs=one.maddrs))
    assert link.greeted and waiting.result(PATIENCE_S).peer_id == two.peer_id
    assert one.endpoint._dialling == {}
    assert one.run(one.endpoint.link_to(two.peer_id)) is waiting.result(), "the next one has it at once"


def test_without_an_address_a_dial_ends_soon(nets, monkeypatch):
    monkeypatch.setattr(endpoints, "BLIND_S", 0.05)
    monkeypatch.setattr(endpoints, "DIAL_S", 600.0)
    one, two = nets.start("one"), nets.start("two")

    async def never(*_):
        await asyncio.Event().wait()

    monkeypatch.setattr(one.endpoint._p2p, "call_binary_stream_handler", never)
    with pytest.raises(PeerGone, match="no answer in time"):
        one.run(one.endpoint.link_to(two.peer_id))
    monkeypatch.undo()
    assert one.run(one.endpoint.link_to(two.peer_id, maddrs=two.maddrs)).greeted, "and the next one is a new try"


def close_links(*networks):
    """Whoever is dialled by the other has a link before its own dial is through, and that opens another one: so this
    closes what is there again and again, until nothing is under way (a link and a dial are a task each)."""

    async def close(endpoint):
        for link in endpoint._all_links():
            link.close()
        return not endpoint._tasks

    until(lambda: all([network.run(close(network.endpoint)) for network in networks]), "the links' end")


@pytest.mark.parametrize(
    ("peer_id", "maddrs"),
    [
        ("", []), ("garbage", []), ("0OIl", ["nonsense"]), ("\ud800", []), ("1" * 60, ["/ip4/127.0.0.1/tcp/1"]),
        (key("dead").peer_id, []), (key("dead").peer_id, [DEAD]),
        (key("dead").peer_id, ["", "x", "/ip4", "/ip4/1/tcp/2"]),
        (key("dead").peer_id, ["/ip4/127.0.0.1/tcp/1" * 50]), (key("dead").peer_id, ["/unix/etc/passwd"]),
    ],
)  # fmt: skip
def test_whatever_strangers_say_of_others_a_dial_fails_as_peer_gone(nets, peer_id, maddrs):
    one = nets.start("one")
    with pytest.raises(PeerGone) as caught:
        one.run(one.endpoint.link_to(peer_id, maddrs=maddrs))
    assert caught.value.why
    assert one.endpoint._dialling == {}


def test_a_peer_does_not_dial_itself(nets):
    one = nets.start("one")
    with pytest.raises(PeerGone, match="this peer itself"):
        one.run(one.endpoint.link_to(one.peer_id, maddrs=one.maddrs))


def test_another_peer_at_the_address_is_not_taken_for_the_one_we_want(nets):
    one, two = nets.start("one"), nets.start("two")
    wanted = key("three").peer_id
    with pytest.raises(PeerGone):
        one.run(one.endpoint.link_to(wanted, maddrs=[two.maddrs[0].replace(two.peer_id, wanted)]))


def test_the_death_of_a_peer_ends_its_calls_at_once_and_is_told(nets):
    one, two = nets.start("one"), nets.start("two")
    closed, asked = [], []
    one.endpoint.on_link_closed = closed.append

    async def forever(link, header, body):
        asked.append(link.peer_id)
        await asyncio.Event().wait()

    two.endpoint.on("forever", forever)
    future = one.submit(
        one.endpoint.call(two.peer_id, "forever", deadline_s=3600, maddrs=two.maddrs)
    )
    until(lambda: asked == [one.peer_id])  # not merely a link that answers: that may be the hello, and no link yet
    p2pd_of(two).kill()
    with pytest.raises(PeerGone):
        future.result(PATIENCE_S)
    until(lambda: closed == [two.peer_id])
    assert not one.endpoint.is_linked(two.peer_id) and one.endpoint.linked_peers() == []
    assert one.endpoint.skews_s == {} and dict(one.endpoint._links) == {}
    assert one.endpoint.bytes_sent > 0  # of closed links too


def test_a_second_process_with_the_same_identity_is_refused_until_the_first_is_gone(nets):
    rendezvous, first = nets.start("rendezvous"), nets.start("twin")
    first.run(first.endpoint.link_to(rendezvous.peer_id, maddrs=rendezvous.maddrs))
    until(lambda: rendezvous.endpoint.is_linked(first.peer_id))
    with pytest.raises(JoinError, match="another peer with this identity") as caught:
        nets.start("twin", initial_peers=rendezvous.maddrs)
    assert "--home" in caught.value.do
    first.stop()
    until(lambda: not rendezvous.endpoint.is_linked(first.peer_id))
    again = nets.start("twin", initial_peers=rendezvous.maddrs)
    until(lambda: rendezvous.endpoint.is_linked(again.peer_id))


def open_stream(network, other):
    """A raw stream to another peer's endpoint, without its hello; returns the rude link."""

    async def go():
        target = PeerID.from_base58(other.peer_id)
        with contextlib.suppress(Exception):
            await network.endpoint.link_to(other.peer_id, maddrs=other.maddrs)  # p2pd then knows the way
        info, reader, writer = await network._daemon.p2p.call_binary_stream_handler(target, endpoints.PROTOCOL)
        return Link(other.peer_id, reader, writer, {}, str(info.addr))

    return network.run(go())


def test_nothing_is_answered_before_hello(nets):
    one, two = nets.start("one"), nets.start("two")
    link = open_stream(one, two)
    with pytest.raises(PeerRefused, match="say hello first"):
        one.run(link.call("probe", {"port": 2000}, deadline_s=PATIENCE_S))
    one.call_soon(link.close)


def test_who_does_not_say_hello_is_closed_and_forgotten(nets, monkeypatch):
    monkeypatch.setattr(endpoints, "HELLO_S", 0.3)
    one, two = nets.start("one"), nets.start("two")
    link = open_stream(one, two)
    until(link.closed.is_set)
    until(lambda: all(link.greeted for link in two.endpoint._all_links()))


@pytest.mark.parametrize(
    "greeting",
    [
        {}, {"v": 2, "session": "x", "time": 1.0}, {"v": 1, "session": 7, "time": 1.0}, {"v": 1, "session": "x"},
        {"v": 1, "session": "x" * 65, "time": 1.0}, {"v": 1, "session": "x", "time": "now"},
        {"v": 1, "session": "x", "time": 10**300}, {"v": 1, "session": "x", "time": -1e13},
        {"v": 1, "session": "x", "time": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_greeting_that_is_none_is_refused(greeting):
    async def test():
        endpoint = endpoints.Endpoint.__new__(endpoints.Endpoint)
        endpoint.skews_s = {}

        class Greeted:
            greeted, session, peer_id = False, "", "x"

        with pytest.raises(PeerRefused, match="version 1"):
            endpoint._greeted(Greeted(), greeting, 0.0)
        assert not Greeted.greeted and endpoint.skews_s == {}

    asyncio.run(test())


@pytest.mark.parametrize(("theirs", "unsure_s", "skew_s"), [
    (110.0, 0.0, 10.0), (110.0, 4.0, 6.0), (90.0, 4.0, -6.0), (103.0, 4.0, 0.0), (97.0, 4.0, 0.0),
])
def test_a_slow_greeting_says_less_of_a_clock(theirs, unsure_s, skew_s):
    """On a machine that starts dozens of peers an answer takes seconds; that is no wrong clock."""
    async def test():
        endpoint = endpoints.Endpoint.__new__(endpoints.Endpoint)
        endpoint.skews_s, endpoint._dialling = {}, {}

        class Link:
            greeted, session, peer_id = False, "", "x"

        endpoint._greeted(Link(), {"v": 1, "session": "s", "time": theirs}, 100.0, unsure_s=unsure_s)
        assert endpoint.skews_s == {"x": skew_s}

    asyncio.run(test())


def test_one_peer_gets_few_links_and_a_crowd_leaves_no_trace(nets, monkeypatch):
    one, two = nets.start("one"), nets.start("two")
    links = [open_stream(one, two) for _ in range(endpoints.MAX_LINKS_OF_ONE_PEER + 2)]
    until(lambda: sum(link.closed.is_set() for link in links) == 3)  # and one was greeted before
    assert len(two.endpoint._links[one.peer_id]) == endpoints.MAX_LINKS_OF_ONE_PEER
    monkeypatch.setattr(endpoints, "MAX_LINKS", 0)
    three = nets.start("three")
    with pytest.raises(PeerGone):
        call(three, two, "echo")
    assert three.peer_id not in two.endpoint._links
    for link in links:
        one.call_soon(link.close)




# --- the test helpers themselves


def test_closing_the_links_waits_for_dials_under_way(nets, monkeypatch):
    """A side that was quicker has its link closed before the other's dial gets anywhere, and that one opens another."""
    one, two = nets.start("one"), nets.start("two")

    async def late(peer_id):
        await soon(lambda: peer_id not in one.endpoint._dialling, "the link of the quicker side")
        await soon(lambda: not one.endpoint.is_linked(peer_id), "its end")

    monkeypatch.setattr(one.endpoint, "address_of", late)
    waiting = one.submit(one.endpoint.link_to(two.peer_id, maddrs=two.maddrs))
    until(lambda: two.peer_id in one.endpoint._dialling, "the dial")
    two.run(two.endpoint.link_to(one.peer_id, maddrs=one.maddrs))
    assert waiting.result(PATIENCE_S).greeted and one.endpoint._tasks
    close_links(one, two)
    assert not any(network.endpoint._tasks or network.endpoint._all_links() for network in (one, two))


def test_waiting_has_an_end(monkeypatch):
    monkeypatch.setattr("tests.swarm.network_support.PATIENCE_S", 0.02)
    with pytest.raises(AssertionError, match="in vain for godot"):
        until(lambda: False, "godot")
    with pytest.raises(AssertionError, match="in vain for godot"):
        asyncio.run(soon(lambda: False, "godot"))
