"""Who is in the swarm: heartbeats, gossip, the dead and the made up."""

import asyncio
import random

import pytest

from swarm.errors import PeerRefused
from swarm.network import directory as directories
from swarm.network import prefixes
from swarm.network.records import Head
from tests.swarm.network_support import (
    OTHER_RUN,
    RUN,
    alive,
    call,
    key_of,
    meet,
    p2pd_of,
    start_directory,
    status,
    until,
)  # fmt: skip


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


def test_the_dht_is_read_every_time_by_who_hears_nobody_and_seldom_by_others(nets, monkeypatch):
    monkeypatch.setattr(directories, "DHT_TTL_S", 0.4)
    a, b = nets.start("a"), nets.start("b")
    calls = []

    def told(directory, name):
        real = getattr(directory, name)

        async def counted():
            calls.append((name, bool(directory.alive())))
            await real()

        setattr(directory, name, counted)

    def count(name, heard):
        return calls.count((name, heard))

    start_directory(b, name="b")
    start_directory(a, name="a")
    for name in ("_publish", "refresh"):
        told(a.directory, name)
    until(lambda: count("_publish", False) >= 5, "some rounds alone")
    assert count("refresh", False) >= 4
    meet(a, b)
    until(lambda: b.peer_id in alive(a))
    calls.clear()
    until(lambda: count("_publish", True) >= 3 * directories.READ_EVERY, "some rounds in company")
    assert 2 <= count("refresh", True) <= 4 and not calls.count(("refresh", False))


def test_who_is_not_known_here_leaves_nothing_behind(nets):
    """An observer is told everything each time, and any number of strangers may say something."""
    a, b = nets.swarm("a", "b")
    watcher = nets.start("watcher", initial_peers=a.maddrs, observe=True)
    start_directory(watcher, role="observer", name="watcher")
    meet(watcher, a)
    until(lambda: b.peer_id in alive(watcher))
    beats = a.directory._beats
    watcher.run(watcher.directory.stop())
    until(lambda: watcher.peer_id not in {**beats._told, **beats._heard, **beats._have}, "the next beat")
    assert b.peer_id in beats._told and b.peer_id in beats._heard


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
    more = {"status": status().model_dump(), "more": 1}
    for header in ({}, {"status": {}}, more, {"status": {"run_id": RUN.run_id}}):
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


def directory_alone():
    """A directory whose network is never asked: for its own arithmetic. On a running loop."""

    class NoEndpoint:
        peer_id = key_of("me")
        on_link_closed = None

        def on(self, *_, **__):
            pass

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
        now[0] += directories.ALIVE_S * directories.MAX_SLOWNESS + 1  # they are many
        assert directory.alive() == {}
        now[0] += directories.FORGET_S
        directory._hear(key_of("heard 3"), directories.Beat(status=status()))
        directory._forget()
        assert len(directory._known) == directories.REMEMBERED
        assert key_of("heard 3") in directory._known and key_of("hearsay") not in directory._known
        for known in directory._known.values():
            known.tried_at = now[0]
        for waited_s in (5, 29, 31):
            now[0] += waited_s - (now[0] - known.tried_at)
            assert (key_of("heard 9") in directory._due()) == (waited_s >= directories.RETRY_S)
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


def test_in_a_crowd_those_who_hold_a_fragment_find_each_other_by_it(nets, monkeypatch):
    """Each is in a neighbourhood of its own, so they do not find each other's status."""
    monkeypatch.setattr(prefixes, "FEWEST", 0)
    names = {prefixes.place(key_of(f"peer {n}"))[0]: f"peer {n}" for n in range(20)}
    a = nets.start(names["0"])
    b = nets.start(names["1"], initial_peers=a.maddrs)
    heads = {a: [Head(version=1, digest="0" * 64, tokens=1), None, None], b: [None, None, None]}
    heads[b][1] = heads[a][0]  # the one after those of a

    async def start(network):
        network.dht.peers(RUN.run_id).depth = 1
        network.start_directory(
            run_id=RUN.run_id, my_status=lambda: status(maddrs=network.maddrs[:8], heads=heads[network])
        )

    for network in (a, b):
        network.run(start(network))
        for _ in range(12):
            network.run(network.directory._publish())
    assert b.peer_id not in a.run(a.dht.statuses(RUN.run_id)) and a.directory.is_crowded()
    for _ in range(2):
        a.run(a.directory.refresh())
    assert a.run(_maddrs(a, b.peer_id)) == b.maddrs
    until(lambda: b.peer_id in alive(a) and a.peer_id in alive(b))


def test_where_many_are_each_is_told_less_often_and_may_be_silent_for_longer():
    async def test():
        directory = directory_alone()
        loop = asyncio.get_running_loop()
        now = [loop.time()]
        loop.time = lambda: now[0]  # no timer is set in here
        few, many = directories.FEW, 3 * directories.FEW
        for count, slowness in ((few, 1), (many, 3), (20 * directories.FEW, directories.MAX_SLOWNESS)):
            for n in range(count):
                directory._hear(key_of(f"heard {n}"), directories.Beat(status=status(maddrs=["/ip4/127.0.0.1/tcp/1"])))
            heard_at = now[0]
            for seconds, due in ((directories.HEARTBEAT_S, True), (directories.ALIVE_S, False)):
                now[0] = heard_at + seconds * slowness - 0.1
                assert len(directory.alive()) == count
                assert not due or directory._due() == []
                now[0] = heard_at + seconds * slowness + 0.1
                assert len(directory._due() if due else directory.alive()) == (count if due else 0)
        del loop.time

    asyncio.run(test())
