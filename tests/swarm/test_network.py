"""Networking over real libp2p daemons and sockets on loopback: links, the DHT, the directory, joining."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import hivemind
import msgpack
import psutil
import pytest
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2

from swarm.config import canonical_json
from swarm.errors import JoinError, NetworkError, PeerGone, PeerRefused
from swarm.network import directory as directories
from swarm.network import endpoint as endpoints
from swarm.network import join, reachability, records
from swarm.network.link import Link
from swarm.network.maddr import host_and_port, peer_id_of
from tests.swarm.network_support import (
    LOOPBACK, OTHER_RUN, PATIENCE_S, RUN, Nets, alive, key, meet, p2pd_of, soon, start_directory, status, until,
)  # fmt: skip

ROOT = Path(__file__).parents[2]
KEY = "some/key"
DEAD = f"/ip4/127.0.0.1/tcp/1/p2p/{key('dead').peer_id}"


@pytest.fixture
def nets(tmp_path):
    with Nets(tmp_path) as nets:
        yield nets


def call(network, other, method, header=None, body=b"", **more):
    more = {"deadline_s": PATIENCE_S, "maddrs": other.maddrs, **more}
    return network.run(network.endpoint.call(other.peer_id, method, header, body, **more))


# --- daemon


def test_the_daemon_has_the_identity_of_our_key(nets):
    network = nets.start("one")
    assert network._daemon.p2p.peer_id.to_base58() == network.peer_id == key("one").peer_id
    assert network.maddrs and all(peer_id_of(maddr) == network.peer_id for maddr in network.maddrs)
    assert network.daemon_alive()


def test_a_port_in_use_is_a_clear_error_and_leaves_nothing(nets, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        maddr = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        with pytest.raises(NetworkError, match="cannot listen on") as caught:
            nets.start("one", listen=[maddr])
    assert maddr in str(caught.value) and "--listen" in caught.value.do
    assert list(tmp_path.iterdir()) == []


def test_the_port_of_another_daemon_is_in_use_too(nets):
    """Two of them would share it without a word (SO_REUSEPORT), and each would get half of the connections."""
    host, port = host_and_port(nets.start("one").maddrs[0])
    with pytest.raises(NetworkError, match="cannot listen on"):
        nets.start("two", listen=[f"/ip4/{host}/tcp/{port}"])


@pytest.mark.parametrize("maddr", ["/ip4/127.0.0.1/tcp/99999", "/ip4/127.0.0.1/tcp/x", "/ip4/8.8.8.8/tcp/31337", "nonsense"])
def test_an_address_to_listen_on_that_cannot_be_is_a_network_error(nets, tmp_path, maddr):
    with pytest.raises(NetworkError):
        nets.start("one", listen=[maddr])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_network_error(tmp_path):
    with Nets(tmp_path / "missing") as nets, pytest.raises(NetworkError, match="cannot write"):
        nets.start("one")


def test_a_start_that_is_called_off_leaves_nothing(nets, tmp_path):
    network = nets.make("one")
    future = network.submit(
        network.start(folder=tmp_path, listen=LOOPBACK, announce=[], initial_peers=[DEAD], join_timeout_s=600)
    )
    until(lambda: list(tmp_path.iterdir()), "the daemon's folder")
    network.stop()
    with pytest.raises(BaseException):  # noqa: B017 - cancelled
        future.result(PATIENCE_S)
    assert list(tmp_path.iterdir()) == []
    assert not network.daemon_alive()


def test_stop_is_safe_twice_from_any_thread_and_without_a_start(nets, tmp_path):
    nets.make("never started").stop()
    network = nets.start("one")
    with pytest.raises(RuntimeError, match="own thread"):
        network.run(asyncio.to_thread(lambda: None))
        network.run(_stop_inside(network))
    threads = [threading.Thread(target=network.stop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    network.stop()
    assert not network.daemon_alive() and not network._thread.is_alive()
    assert list(tmp_path.iterdir()) == []


async def _stop_inside(network):
    network.stop()


def test_the_secret_key_does_not_stay_on_the_disk(nets, tmp_path):
    nets.start("one")
    assert [path for path in tmp_path.rglob("*") if path.name == "key"] == []


def test_a_daemon_that_dies_is_noticed_and_stop_still_works(nets, tmp_path):
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
    assert list(tmp_path.iterdir()) == []


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


def test_a_killed_process_leaves_no_daemon_no_watchdog_and_no_file(tmp_path):
    home = tmp_path / "home"
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
    assert one.endpoint.bytes_sent == two.endpoint.bytes_received > 0
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


def close_links(*networks):
    for network in networks:
        network.call_soon(lambda network=network: [link.close() for link in network.endpoint._all_links()])
    until(lambda: not any(network.endpoint._all_links() for network in networks), "the links' end")


@pytest.mark.parametrize(
    ("peer_id", "maddrs"),
    [
        ("", []), ("garbage", []), ("0OIl", ["nonsense"]), ("\ud800", []), ("1" * 60, ["/ip4/127.0.0.1/tcp/1"]),
        (key("dead").peer_id, []), (key("dead").peer_id, [DEAD]), (key("dead").peer_id, ["", "x", "/ip4", "/ip4/1/tcp/2"]),
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
    closed = []
    one.endpoint.on_link_closed = closed.append

    async def forever(link, header, body):
        await asyncio.Event().wait()

    two.endpoint.on("forever", forever)
    future = one.submit(
        one.endpoint.call(two.peer_id, "forever", deadline_s=3600, maddrs=two.maddrs)
    )
    until(lambda: any(link._answering for link in two.endpoint._all_links()))
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


# --- DHT


def test_records_are_found_by_others_under_their_signers(nets):
    one = nets.start("one")
    two = nets.start("two", initial_peers=one.maddrs)
    assert two.run(two.dht.publish(KEY, "text of two", ttl_s=60))
    assert one.run(one.dht.publish(KEY, "text of one", ttl_s=60))
    expected = {one.peer_id: "text of one", two.peer_id: "text of two"}
    assert one.run(one.dht.entries(KEY)) == two.run(two.dht.entries(KEY)) == expected
    assert one.run(one.dht.entries("nothing here")) == {}


def test_a_renewal_replaces_and_an_observer_only_reads(nets):
    now = [time.time()]
    one = nets.start("one", clock=lambda: now[0])
    two = nets.start("two", initial_peers=one.maddrs, observe=True)
    assert one.run(one.dht.publish(KEY, "first", ttl_s=60))
    assert two.run(two.dht.entries(KEY)) == {one.peer_id: "first"}
    now[0] += 1
    assert one.run(one.dht.publish(KEY, "second", ttl_s=60))
    assert two.run(two.dht.entries(KEY)) == {one.peer_id: "second"}
    assert two.maddrs == []
    assert one.run(one.dht.publish(KEY, "x" * 9_000, ttl_s=60))
    with pytest.raises(ValueError, match="limit"):
        one.run(one.dht.publish(KEY, "x" * 9_500, ttl_s=60))


def store(network, *, key=KEY, subkey=None, value, expires, signer="stranger"):
    """What a stranger's rpc_store does to a live DHT node."""
    protocol = network.dht._node.protocol
    request = dht_pb2.StoreRequest(
        keys=[DHTID.generate(source=key).to_bytes()], values=[value], expiration_time=[expires], in_cache=[False],
        subkeys=[subkey if subkey is not None else msgpack.packb(key_of(signer))],
    )  # fmt: skip
    context = P2PContext("store", None, PeerID.from_base58(key_of(signer)))
    return list(network.run(protocol.rpc_store(request, context)).store_ok)


def key_of(name):
    return key(name).peer_id


def sealed(payload="evil", *, name="stranger", at=KEY, expires):
    value = records.seal(key(name), DHTID.generate(source=at).to_bytes(), payload, expires=expires)
    return msgpack.packb(value)


def test_what_a_stranger_may_and_may_not_store(nets):
    one = nets.start("one")
    one.run(one.dht.publish(KEY, "mine", ttl_s=60))
    soon = time.time() + 60.5
    good = sealed(expires=soon)
    mine = msgpack.packb(one.peer_id)
    assert store(one, value=good, expires=soon) == [True]
    assert store(one, value=good, expires=soon, subkey=mine) == [False]  # under another's name
    assert store(one, value=good, expires=soon + 1) == [False]  # kept alive
    assert store(one, value=good, expires=soon, key="other/key") == [False]  # replayed elsewhere
    for expires in (float("nan"), float("inf"), -float("inf"), 0.0, time.time() + 10_000):
        assert store(one, value=sealed(expires=expires), expires=expires) == [False]
    regular = hivemind.dht.protocol.DHTProtocol.IS_REGULAR_VALUE
    for value in (good, b"", msgpack.packb(None), msgpack.packb({"a": 1}), b"\xff" * 50):
        assert store(one, value=value, expires=soon, subkey=regular) == [False]  # would replace all entries
    for value in (b"", msgpack.packb("text"), msgpack.packb([b"x"]), msgpack.packb(b"x" * 20_000), b"\xc1"):
        assert store(one, value=value, expires=soon) == [False]
    for subkey in (msgpack.packb(7), msgpack.packb(["x"]), msgpack.packb("x" * 300), b"\xc1", b"\xc7\x00\x40"):
        assert store(one, value=good, expires=soon, subkey=subkey) == [False]
    assert one.run(one.dht.entries(KEY)) == {one.peer_id: "mine", key_of("stranger"): "evil"}


def bomb(levels):
    data = b"\x90"
    for _ in range(levels):
        size = len(data)
        data = (b"\xc7" + bytes([size]) if size < 256 else b"\xc8" + size.to_bytes(2, "big")) + b"\x40" + data
        data = b"\x91" + data
    return data


def test_a_nesting_bomb_does_not_end_the_process(nets):
    """1.2 kB from any stranger kill a bare hivemind DHT (F1 in notes/reliability.md)."""
    one = nets.start("one")
    data = bomb(250)
    assert 1_000 < len(data) < 1_500
    dictionary = hivemind.dht.protocol.DHTProtocol.IS_DICTIONARY
    for tag in (dictionary, data, msgpack.packb(key_of("stranger"))):
        try:
            assert store(one, value=data, expires=time.time() + 60, subkey=tag) == [False]
        except ValueError as error:
            assert "nested" in str(error)  # hivemind hands it to the stranger
    with pytest.raises(ValueError, match="unknown type"):
        store(one, value=b"\xc7\x01\x51\x90", expires=time.time() + 60, subkey=dictionary)
    assert one.run(one.dht.publish(KEY, "still here", ttl_s=60))
    assert one.run(one.dht.entries(KEY)) == {one.peer_id: "still here"}


def test_a_whole_dictionary_from_a_stranger_is_checked_entry_by_entry(nets):
    one = nets.start("one")
    soon = time.time() + 60.5
    dictionary = hivemind.dht.protocol.DHTProtocol.IS_DICTIONARY

    def offered(*entries):
        inner = msgpack.packb([None, soon, [list(entry) for entry in entries]])
        return store(one, value=msgpack.packb(msgpack.ExtType(0x50, inner)), expires=soon, subkey=dictionary)

    good = (key_of("stranger"), sealed(expires=soon), soon)
    assert offered(good, (one.peer_id, sealed(expires=soon), soon)) == [False]
    assert one.run(one.dht.entries(KEY)) == {}
    for expires in (int(soon), None, "x", float("nan")):
        with contextlib.suppress(Exception):
            assert offered((good[0], good[1], expires)) == [False]
    assert one.run(one.dht.entries(KEY)) == {}
    assert offered(good) == [True]
    assert one.run(one.dht.entries(KEY)) == {key_of("stranger"): "evil"}


def test_an_old_record_replayed_changes_nothing(nets):
    one = nets.start("one")
    soon = time.time() + 30.5
    assert store(one, value=sealed("new", expires=soon + 30), expires=soon + 30) == [True]
    assert store(one, value=sealed("old", expires=soon), expires=soon) == [False]
    kept = one.dht._node.protocol.storage.get(DHTID.generate(source=KEY)).value
    assert {entry.expiration_time for entry in kept.key_to_heap.values()} == {soon + 30}


def test_a_flood_of_records_is_bounded_and_pushes_nobody_out(nets, monkeypatch):
    from swarm.network import dht

    one = nets.start("one")
    storage = one.dht._node.protocol.storage
    assert isinstance(storage, dht.BoundedStorage)
    one.run(one.dht.publish(KEY, "mine", ttl_s=60))
    soon = time.time() + 60.5
    monkeypatch.setattr(dht, "MAX_KEYS_STORED", 3)
    stored = [
        store(one, value=sealed(at=f"key {n}", expires=soon), expires=soon, key=f"key {n}") for n in range(5)
    ]
    assert stored == [[True], [True], [False], [False], [False]] and len(storage) == 3
    monkeypatch.setattr(dht, "MAX_BYTES_OF_KEY", 1_000)
    accepted = [
        store(one, value=sealed("x" * 300, name=n, expires=soon), expires=soon, signer=n) for n in range(5)
    ].count([True])
    assert accepted == 1
    one.clock = time.time
    assert one.run(one.dht.publish(KEY, "renewed", ttl_s=90))
    assert one.run(one.dht.entries(KEY))[one.peer_id] == "renewed"


def test_statuses_come_from_those_they_speak_of(nets):
    one = nets.start("one")
    soon = time.time() + 60.5
    peers = f"{RUN.run_id}/peers"
    one.run(one.dht.publish(peers, status("one").model_dump_json(), ttl_s=60))
    for name, text in (("a", "{"), ("b", "{}"), ("c", status("c", run=OTHER_RUN).model_dump_json()), ("d", "[" * 5000)):
        assert store(one, value=sealed(text, name=name, at=peers, expires=soon), expires=soon, key=peers, signer=name) == [True]
    assert one.run(one.dht.statuses(RUN.run_id)) == {one.peer_id: status("one")}


def test_the_dht_never_raises_and_never_waits_for_ever(nets, monkeypatch):
    from swarm.network import dht

    one = nets.start("one")
    monkeypatch.setattr(dht, "CALL_S", 0.05)

    async def never(*_, **__):
        await asyncio.Event().wait()

    async def fails(*_, **__):
        raise AssertionError("hivemind's")

    for stand_in in (never, fails):
        monkeypatch.setattr(one.dht._node, "store", stand_in)
        monkeypatch.setattr(one.dht._node, "get", stand_in)
        monkeypatch.setattr(one.dht._node.protocol, "call_ping", stand_in)
        assert one.run(one.dht.publish(KEY, "x", ttl_s=60)) is False
        assert one.run(one.dht.entries(KEY)) == {}
        one.run(one.dht.meet(one.peer_id))
    one.run(one.dht.meet("garbage"))


# --- directory


def test_peers_learn_of_each_other_through_those_between_them(nets):
    """C has met B only, and B tells it of A (the DHT is not asked)."""
    a, b, c = nets.start("a"), nets.start("b"), nets.start("c")
    heard = []
    for network, name in ((a, "a"), (b, "b"), (c, "c")):
        start_directory(network, name=name)
    c.directory.on_new_address = heard.append
    meet(b, a)
    until(lambda: a.peer_id in alive(b))
    meet(c, b)
    until(lambda: set(alive(c)) == {a.peer_id, b.peer_id}, "gossip")
    until(lambda: set(alive(a)) == {b.peer_id, c.peer_id}, "gossip")
    assert alive(c)[a.peer_id].name == "a"
    assert a.maddrs in heard and b.maddrs in heard
    assert c.run(_maddrs(c, a.peer_id)) == a.maddrs and c.run(_maddrs(c, "nobody")) == []


async def _maddrs(network, peer_id):
    return network.directory.maddrs(peer_id)


def test_observers_see_everybody_and_are_never_counted(nets):
    a, b = nets.swarm("a", "b")
    watcher = nets.start("watcher", initial_peers=a.maddrs, observe=True)
    start_directory(watcher, role="observer", name="watcher")
    meet(watcher, a)
    until(lambda: set(alive(watcher)) == {a.peer_id, b.peer_id}, "the observer's view")
    until(lambda: a.endpoint.is_linked(watcher.peer_id))
    watcher.run(watcher.directory.tell_all())
    for network in (a, b):
        assert watcher.peer_id not in alive(network)
        assert watcher.peer_id not in network.directory._known
    assert watcher.peer_id not in a.run(a.dht.statuses(RUN.run_id))


def test_a_dead_peer_is_not_counted_from_the_moment_its_link_ends(nets, monkeypatch):
    monkeypatch.setattr(directories, "ALIVE_S", 3600.0)  # silence alone would not do it
    a, b = nets.swarm("a", "b")
    until(lambda: b.peer_id in alive(a) and a.peer_id in alive(b))
    p2pd_of(b).kill()
    until(lambda: alive(a) == {}, "the news of a death")
    assert b.peer_id in a.directory._known  # and it is tried again


def test_a_peer_that_comes_back_is_counted_again(nets):
    a, b = nets.swarm("a", "b")
    until(lambda: b.peer_id in alive(a))
    b.stop()
    until(lambda: alive(a) == {})
    again = nets.start("b", initial_peers=a.maddrs)
    start_directory(again, name="back")
    meet(again, a)
    until(lambda: alive(a).get(b.peer_id) is not None and alive(a)[b.peer_id].name == "back")
    assert a.run(_maddrs(a, b.peer_id)) == again.maddrs


def test_peers_of_another_run_are_no_peers(nets):
    a, b = nets.start("a"), nets.start("b")
    start_directory(a)
    start_directory(b, run=OTHER_RUN)
    meet(b, a)
    header = {"status": status("b", run=OTHER_RUN).model_dump(exclude_defaults=True)}
    with pytest.raises(PeerRefused, match=f"this peer trains {RUN.run_id}"):
        call(b, a, "status", header)
    assert alive(a) == alive(b) == {} and b.peer_id not in a.directory._known


def test_a_malformed_status_is_refused_and_changes_nothing(nets):
    a, b = nets.start("a"), nets.start("b")
    start_directory(a)
    for header in ({}, {"status": {}}, {"status": status().model_dump(), "more": 1}, {"status": {"run_id": RUN.run_id}}):
        with pytest.raises(PeerRefused, match="malformed Beat"):
            call(b, a, "status", header)
    assert a.directory._known == {}


def contacts(prefix, count):
    return [{"peer_id": key_of(f"{prefix} {n}"), "maddrs": ["/ip4/127.0.0.1/tcp/1"]} for n in range(count)]


def test_one_stranger_cannot_flood_the_directory(nets, monkeypatch):
    monkeypatch.setattr(directories, "MAX_HEARSAY", 20)
    a, b, c = nets.start("a"), nets.start("b"), nets.start("c")
    start_directory(a)
    saved = []
    a.directory.on_new_address = saved.append
    for n in range(6):
        beat = {"status": status("b").model_dump(exclude_defaults=True), "contacts": contacts(n, 8)}
        call(b, a, "status", beat)
    known = a.directory._known
    assert len(known) == 21 and saved == []  # 20 that nobody has heard, and the flooder; none of them is remembered
    start_directory(c)
    meet(c, a)
    until(lambda: c.peer_id in alive(a), "an honest newcomer")
    monkeypatch.setattr(directories, "MAX_PEERS", len(known))
    d = nets.start("d")
    start_directory(d)
    meet(d, a)
    until(lambda: d.peer_id in alive(a), "who speaks takes the place of hearsay")


def directory_alone(**more):
    """A directory whose network is never asked: for its own arithmetic. On a running loop."""

    class NoEndpoint:
        peer_id = key_of("me")
        on_link_closed = None

        def on(self, *_, **__):
            pass

    import random

    return directories.Directory(
        NoEndpoint(), None, run_id=RUN.run_id, my_status=lambda: status("me"), rng=random.Random(0)
    )


def test_the_silent_are_tried_less_and_less_and_forgotten_but_for_the_last():
    async def test():
        directory = directory_alone()
        loop = asyncio.get_running_loop()
        now = [loop.time()]
        loop.time = lambda: now[0]  # no timer is set in here
        for n in range(50):
            directory._hear(key_of(f"heard {n}"), directories.Beat(status=status(maddrs=["/ip4/127.0.0.1/tcp/1"])))
        directory.meet(key_of("hearsay"), ["/ip4/127.0.0.1/tcp/1"])
        directory.meet(key_of("me"), ["/ip4/127.0.0.1/tcp/1"])
        assert len(directory.alive()) == 50 and len(directory._known) == 51
        assert directory._due() == [key_of("hearsay")]
        directory._on_link_closed(key_of("heard 7"))
        assert len(directory.alive()) == 49
        now[0] += directories.ALIVE_S + 1
        assert directory.alive() == {}
        now[0] += directories.FORGET_S
        directory._hear(key_of("heard 3"), directories.Beat(status=status()))
        directory._forget()
        assert len(directory._known) == directories.REMEMBERED
        assert key_of("heard 3") in directory._known and key_of("hearsay") not in directory._known
        waits = set()
        for known in directory._known.values():
            known.tried_at = now[0]
        for wait_s in (1, 5, 29, 31):
            now[0] += wait_s - sum(waits)
            waits = {wait_s}
            waits = {sum(waits)}
            due = directory._due()
            assert (key_of("heard 9") in due) == (wait_s >= directories.RETRY_S)
        del loop.time

    asyncio.run(test())


def test_hearsay_does_not_move_a_live_peer():
    async def test():
        directory = directory_alone()
        mine, told = ["/ip4/127.0.0.1/tcp/1"], ["/ip4/127.0.0.1/tcp/2"]
        directory._hear(key_of("a"), directories.Beat(status=status(maddrs=mine)))
        directory.meet(key_of("a"), told)
        assert directory.maddrs(key_of("a")) == mine
        directory._on_link_closed(key_of("a"))
        directory.meet(key_of("a"), told)  # it may have moved
        assert directory.maddrs(key_of("a")) == told

    asyncio.run(test())


# --- joining


def published(nets, name="first", run=RUN):
    network = nets.start(name)
    network.run(join.publish_run(network.dht, run, [], network.peer_id))
    return network


def find(network, run_id=None, deadline_s=PATIENCE_S):
    return network.run(join.find_run(network.dht, run_id=run_id, deadline_s=deadline_s))


def test_a_joiner_finds_the_run_and_checks_it(nets):
    first = published(nets)
    joiner = nets.start("joiner", initial_peers=[DEAD, *first.maddrs])
    assert find(joiner) == find(joiner, RUN.run_id) == RUN
    answered = joiner.run(join.connect(joiner.endpoint, [DEAD, *first.maddrs], deadline_s=PATIENCE_S))
    assert answered == [first.peer_id]


def test_when_nobody_answers_each_address_has_its_own_reason(nets):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}/p2p/{key_of('silent')}"
        with pytest.raises(JoinError, match="none of the 2 initial peers answered") as caught:
            nets.start("one", initial_peers=[DEAD, silent], join_timeout_s=1.0)
    lines = {line.strip().split(": ", 1)[0]: line for line in caught.value.why.splitlines()}
    assert "refused" in lines[DEAD]
    assert silent in lines and "refused" not in lines[silent]
    assert "--new-swarm" in caught.value.do


def test_the_second_address_of_one_peer_is_tried_too(nets):
    first = published(nets)
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{first.peer_id}"
    joiner = nets.start("joiner", initial_peers=[dead, first.maddrs[0]])
    assert find(joiner) == RUN


def test_a_swarm_that_comes_back_goes_on_alone_when_nobody_answers(nets):
    one = nets.start("one", initial_peers=[DEAD], ask_initial_peers=False)
    assert one.run(one.dht.publish(KEY, "alone", ttl_s=60))
    assert one.run(one.dht.entries(KEY)) == {one.peer_id: "alone"}


@pytest.mark.parametrize(("off_s", "word"), [(10, "ahead of"), (-10, "behind")])
def test_a_clock_that_is_10_s_off_is_named(nets, off_s, word):
    first = nets.start("first")
    with pytest.raises(JoinError, match=f"clock is 10 s {word}") as caught:
        nets.start("off", initial_peers=first.maddrs, clock=lambda: time.time() + off_s)
    assert "timedatectl" in caught.value.do


@pytest.mark.parametrize(
    ("skews_s", "accepted"),
    [
        ([], True), ([0.1], True), ([2.9], True), ([3.1], False), ([-3.1], False), ([0.0, 100.0], True),
        ([0.0, 100.0, 100.0], False), ([0.0, 0.0, 1e9], True), ([-50.0, 50.0, 0.0], False),
    ],
)  # fmt: skip
def test_one_wrong_clock_among_others_is_outvoted(skews_s, accepted):
    with contextlib.nullcontext() if accepted else pytest.raises(JoinError):
        join.check_clock(skews_s)


def test_no_run_is_an_error_and_never_a_start(nets):
    first = nets.start("first")
    joiner = nets.start("joiner", initial_peers=first.maddrs)
    with pytest.raises(JoinError, match="found no run within"):
        find(joiner, deadline_s=0.1)
    with pytest.raises(JoinError, match=f"found no run {RUN.run_id}"):
        find(joiner, RUN.run_id, deadline_s=0.1)


def test_a_tampered_run_config_is_refused_and_an_honest_copy_still_found(nets):
    evil, honest = nets.start("evil"), None
    tampered = canonical_json(RUN).replace(b'"seed":0', b'"seed":1').decode()
    evil.run(evil.dht.publish(f"{RUN.run_id}/config", tampered, ttl_s=60))
    evil.run(evil.dht.publish(join.RUNS_KEY, RUN.run_id, ttl_s=60))
    joiner = nets.start("joiner", initial_peers=evil.maddrs)
    with pytest.raises(JoinError, match="cannot be used") as caught:
        find(joiner, deadline_s=0.1)
    assert "tampered" in caught.value.why
    honest = nets.start("honest", initial_peers=evil.maddrs)
    honest.run(join.publish_run(honest.dht, RUN, [], honest.peer_id))
    assert find(joiner) == RUN


def test_two_runs_need_a_choice_and_made_up_ones_do_not_count(nets):
    first = published(nets)
    for name, text in (("a", "made-up-0123456789ab"), ("b", "\x1b[2J"), ("c", "x" * 5000)):
        soon = time.time() + 60.5
        value = sealed(text, name=name, at=join.RUNS_KEY, expires=soon)
        assert store(first, value=value, expires=soon, key=join.RUNS_KEY, signer=name) == [True]
    assert find(first) == RUN
    second = nets.start("second", initial_peers=first.maddrs)
    second.run(join.publish_run(second.dht, OTHER_RUN, [], second.peer_id))
    with pytest.raises(JoinError, match="2 runs") as caught:
        find(first)
    assert RUN.run_id in caught.value.why and OTHER_RUN.run_id in caught.value.why and "\x1b" not in str(caught.value)
    assert "--run-id" in caught.value.do
    assert find(second, RUN.run_id) == RUN and find(first, OTHER_RUN.run_id) == OTHER_RUN


def test_few_peers_keep_the_run_but_all_do_where_nobody_does(nets):
    one = nets.start("one")
    low = ["1" * 52] * join.CONFIG_COPIES  # strangers with low peer ids that keep quiet
    one.run(join.publish_run(one.dht, RUN, low, one.peer_id))
    assert find(one) == RUN
    two = nets.start("two", initial_peers=one.maddrs)
    two.run(join.publish_run(two.dht, RUN, low, two.peer_id))
    assert list(two.run(two.dht.entries(f"{RUN.run_id}/config"))) == [one.peer_id]


def test_three_peers_that_start_at_the_same_moment_are_one_swarm(nets):
    first = published(nets)
    start_directory(first, name="first")
    joiners = [nets.make(name) for name in ("a", "b", "c")]
    starting = [
        joiner.submit(
            joiner.start(
                folder=nets._folder, listen=LOOPBACK, announce=[], initial_peers=first.maddrs,
                join_timeout_s=PATIENCE_S,
            )
        )
        for joiner in joiners
    ]  # fmt: skip
    for joiner, future in zip(joiners, starting, strict=True):
        assert future.result(2 * PATIENCE_S) == [first.peer_id]
        assert find(joiner) == RUN
        start_directory(joiner)
        meet(joiner, first)
    everybody = {network.peer_id for network in (first, *joiners)}
    for network in (first, *joiners):
        until(lambda network=network: set(alive(network)) == everybody - {network.peer_id}, "one swarm")


def test_the_first_peer_may_go_and_a_newcomer_joins_through_another(nets):
    first, second, third = nets.swarm("first", "second", "third")
    until(lambda: all(len(alive(network)) == 2 for network in (first, second, third)))
    second.run(join.publish_run(second.dht, RUN, [], second.peer_id))
    p2pd_of(first).kill()
    first.stop()
    newcomer = nets.start("newcomer", initial_peers=third.maddrs)
    assert find(newcomer) == RUN
    start_directory(newcomer)
    newcomer.run(third_told := newcomer.directory.refresh()) if False else meet(newcomer, third)
    until(lambda: set(alive(newcomer)) == {second.peer_id, third.peer_id}, "the rest of the swarm")


def test_the_dht_alone_brings_peers_together(nets):
    a, b = nets.start("a"), None
    start_directory(a)
    b = nets.start("b", initial_peers=a.maddrs)
    start_directory(b)
    a.run(a.directory.tell_all())
    b.run(b.directory.refresh())
    until(lambda: a.peer_id in alive(b))


# --- reachability


def port_of(network):
    return host_and_port(network.maddrs[0])[1]


def test_a_peer_that_listens_is_reachable(nets):
    one = nets.start("one")
    two = nets.start("two", initial_peers=one.maddrs)
    reachable, reason = two.run(reachability.ask(two.endpoint, [one.peer_id], port=port_of(two)))
    assert reachable is True and f"127.0.0.1 port {port_of(two)}" in reason


def test_a_port_with_nothing_or_something_else_behind_it_is_not(nets):
    one = nets.start("one")
    two = nets.start("two", initial_peers=one.maddrs)
    with socket.create_server(("127.0.0.1", 0)) as other:
        thread = threading.Thread(target=lambda: other.accept()[0].sendall(b"SSH-2.0-OpenSSH\r\n"), daemon=True)
        thread.start()
        assert two.run(reachability.ask(two.endpoint, [one.peer_id], port=other.getsockname()[1]))[0] is False
        thread.join(PATIENCE_S)
        free = other.getsockname()[1]
    assert two.run(reachability.ask(two.endpoint, [one.peer_id], port=free))[0] is False
    assert two.run(reachability.ask(two.endpoint, [one.peer_id], port=None))[0] is False
    assert two.run(reachability.ask(two.endpoint, [], port=5000))[0] is None


def test_the_prober_dials_the_host_it_sees_and_no_other(nets, monkeypatch):
    dialled = []
    gate = asyncio.Event()

    async def dial(host, port):
        dialled.append((host, port))
        await asyncio.wait_for(gate.wait(), PATIENCE_S)
        return True

    monkeypatch.setattr(reachability, "dial", dial)
    one = nets.start("one")
    two = nets.start("two", initial_peers=one.maddrs)
    first = two.submit(
        two.endpoint.call(one.peer_id, "probe", {"port": 5000, "host": "10.0.0.1", "from": "x"}, deadline_s=PATIENCE_S)
    )
    until(lambda: dialled)
    with pytest.raises(PeerRefused, match="one probe at a time"):
        call(two, one, "probe", {"port": 5001})
    one.call_soon(gate.set)
    assert first.result(PATIENCE_S)[0] == {"reached": True, "from": "127.0.0.1"}
    assert dialled == [("127.0.0.1", 5000)]
    for port in (0, 22, 1023, 65536, "5000", None, True, 5000.0):
        with pytest.raises(PeerRefused, match="need a port"):
            call(two, one, "probe", {"port": port})
    assert len(dialled) == 1


def test_what_a_prober_answers_reaches_the_screen_only_as_an_address(nets):
    one = nets.start("one")

    async def lie(link, header, body):
        return {"reached": True, "from": "\x1b[2Jevil"}, b""

    one.endpoint.on("probe", lie)
    two = nets.start("two", initial_peers=one.maddrs)
    reachable, reason = two.run(reachability.ask(two.endpoint, [one.peer_id], port=5000))
    assert reachable is True and "\x1b" not in reason


# --- the test helpers themselves


def test_waiting_has_an_end(monkeypatch):
    monkeypatch.setattr("tests.swarm.network_support.PATIENCE_S", 0.02)
    with pytest.raises(AssertionError, match="in vain for godot"):
        until(lambda: False, "godot")
    with pytest.raises(AssertionError, match="in vain for godot"):
        asyncio.run(soon(lambda: False, "godot"))
