"""The DHT between real daemons: what is found, and what a stranger cannot do to it."""

import asyncio
import contextlib
import time

import hivemind
import msgpack
import pytest
from hivemind.dht.routing import DHTID

from swarm.network import dht
from swarm.network.neighbourhood import Neighbourhood
from swarm.network.prefixes import place
from tests.swarm.network_support import (
    KEY,
    OTHER_RUN,
    RUN,
    key_of,
    sealed,
    status,
    store,
)  # fmt: skip


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
    now[0] += 1
    assert one.run(one.dht.publish(KEY, "x" * 9_000, ttl_s=60))
    with pytest.raises(ValueError, match="limit"):
        one.run(one.dht.publish(KEY, "x" * 9_500, ttl_s=60))


def test_what_a_stranger_may_and_may_not_store(nets):
    one = nets.start("one")
    one.run(one.dht.publish(KEY, "mine", ttl_s=60))
    soon = time.time() + 60.5
    good = sealed(expires=soon)
    mine = msgpack.packb(one.peer_id)
    assert store(one, value=good, expires=soon) == [True]
    assert store(one, value=good, expires=soon, subkey=mine) == [False]  # under another's name
    assert store(one, value=good, expires=soon + 1) == [False]  # kept alive
    assert store(one, value=good, expires=soon, at="other/key") == [False]  # replayed elsewhere
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
    one = nets.start("one")
    storage = one.dht._node.protocol.storage
    assert isinstance(storage, dht.BoundedStorage)
    one.run(one.dht.publish(KEY, "mine", ttl_s=60))
    soon = time.time() + 60.5
    monkeypatch.setattr(dht, "MAX_KEYS_STORED", 3)
    stored = [
        store(one, value=sealed(at=f"key {n}", expires=soon), expires=soon, at=f"key {n}") for n in range(5)
    ]
    assert stored == [[True], [True], [False], [False], [False]] and len(storage) == 3
    monkeypatch.setattr(dht, "MAX_BYTES_OF_KEY", 1_000)
    accepted = [
        store(one, value=sealed("x" * 300, name=n, expires=soon), expires=soon, signer=n) for n in range(5)
    ].count([True])
    assert accepted == 1
    assert one.run(one.dht.publish(KEY, "renewed", ttl_s=90))
    assert one.run(one.dht.entries(KEY))[one.peer_id] == "renewed"


def test_statuses_come_from_those_they_speak_of(nets):
    one = nets.start("one")
    soon = time.time() + 60.5
    peers = f"{RUN.run_id}/peers"
    one.run(one.dht.publish(peers, status("one").model_dump_json(), ttl_s=60))
    elsewhere = status("c", run=OTHER_RUN).model_dump_json()
    for name, text in (("a", "{"), ("b", "{}"), ("c", elsewhere), ("d", "[" * 5000)):
        value = sealed(text, name=name, at=peers, expires=soon)
        assert store(one, value=value, expires=soon, at=peers, signer=name) == [True]
    assert one.run(one.dht.statuses(RUN.run_id)) == {one.peer_id: status("one")}


def test_the_dht_never_raises_and_never_waits_for_ever(nets, monkeypatch):
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


def test_records_of_a_large_swarm_are_spread_over_keys(nets):
    """Two to a record, so that five peers are many."""
    networks = [nets.start("n0")]
    networks += [nets.start(f"n{n}", initial_peers=networks[0].maddrs) for n in range(1, 5)]
    trees = {
        network: Neighbourhood(
            KEY, me=network.peer_id, entries=network.dht.entries, publish=network.dht.publish, most=2
        ) for network in networks
    }
    for _ in range(3):
        for network, tree in trees.items():
            assert network.run(tree.publish("here", ttl_s=60))
            network.run(tree.look())
    assert all(tree.depth > 0 for tree in trees.values())
    for network, tree in trees.items():
        assert network.run(tree.publish("settled", ttl_s=90))
    for network, tree in trees.items():
        found = network.run(network.dht.entries(tree.key_at(tree.depth)))
        there = [peer_id for peer_id, payload in found.items() if payload == "settled"]
        assert network.peer_id in there and len(there) <= 2
        assert all(place(peer_id)[:tree.depth] == place(network.peer_id)[:tree.depth] for peer_id in there)
    assert trees[networks[0]] is not networks[0].dht.peers(RUN.run_id) is networks[0].dht.peers(RUN.run_id)
