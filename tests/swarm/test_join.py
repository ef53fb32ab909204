"""Ways in: addresses, clocks, runs, and whether others can dial this peer."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest

from swarm.config import canonical_json
from swarm.errors import JoinError, PeerRefused
from swarm.network import join, reachability
from swarm.network.maddr import host_and_port
from tests.swarm.network_support import (
    DEAD,
    KEY,
    LOOPBACK,
    OTHER_RUN,
    PATIENCE_S,
    RUN,
    alive,
    call,
    key_of,
    meet,
    p2pd_of,
    sealed,
    start_directory,
    store,
    until,
)  # fmt: skip


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


def test_a_joiner_whose_first_contact_with_the_dht_failed_tries_again(nets):
    """A ping of the DHT's that times out, on a busy machine, leaves nobody in its routing table."""
    first = published(nets)
    joiner = nets.start("joiner", initial_peers=first.maddrs, observe=True)  # it keeps no records itself
    table = joiner.dht._node.protocol.routing_table

    async def forget():
        for node_id in list(table.uid_to_peer_id):
            del table[node_id]

    joiner.run(forget())
    assert not table.uid_to_peer_id and find(joiner) == RUN
    assert table.uid_to_peer_id


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
        assert store(first, value=value, expires=soon, at=join.RUNS_KEY, signer=name) == [True]
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


def test_a_low_peer_does_without_where_enough_lower_ones_keep_the_run(nets):
    """In a large swarm everybody knows others, and so there would be ever more of the lowest."""
    names = sorted((f"peer {n}" for n in range(2 * join.CONFIG_COPIES + 2)), key=key_of)
    *lower, last, one = names
    me, soon, text = nets.start(one), time.time() + 60.5, canonical_json(RUN).decode()
    for at, payload in ((f"{RUN.run_id}/config", text), (join.RUNS_KEY, RUN.run_id)):
        for name in lower:
            value = sealed(payload, name=name, at=at, expires=soon)
            assert store(me, value=value, expires=soon, at=at, signer=name) == [True]
    me.run(join.publish_run(me.dht, RUN, [], me.peer_id))
    assert me.peer_id not in me.run(me.dht.entries(f"{RUN.run_id}/config"))
    store(me, value=sealed("{}", name=lower[0], at=f"{RUN.run_id}/config", expires=soon + 9), expires=soon + 9,
          at=f"{RUN.run_id}/config", signer=lower[0])  # now one of them keeps something else
    me.run(join.publish_run(me.dht, RUN, [], me.peer_id))
    assert me.peer_id in me.run(me.dht.entries(f"{RUN.run_id}/config")) and last not in lower


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
    meet(newcomer, third)
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


def reach(network, peers, port):
    return network.run(reachability.ask(network.endpoint, peers, port=port)).reach


def test_a_peer_that_listens_is_reachable(nets):
    one = nets.start("one")
    two = nets.start("two", initial_peers=one.maddrs)
    situation = two.run(reachability.ask(two.endpoint, [one.peer_id], port=port_of(two)))
    assert situation.reach == "public" and f"127.0.0.1 port {port_of(two)}" in situation.text


def test_a_port_with_nothing_or_something_else_behind_it_is_not(nets):
    one = nets.start("one")
    two = nets.start("two", initial_peers=one.maddrs)
    with socket.create_server(("127.0.0.1", 0)) as other:
        thread = threading.Thread(target=lambda: other.accept()[0].sendall(b"SSH-2.0-OpenSSH\r\n"), daemon=True)
        thread.start()
        assert reach(two, [one.peer_id], other.getsockname()[1]) == "outbound"
        thread.join(PATIENCE_S)
        free = other.getsockname()[1]
    assert reach(two, [one.peer_id], free) == "outbound"
    assert reach(two, [one.peer_id], None) == "outbound"
    assert reach(two, [], 5000) == ""


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
    answer = first.result(PATIENCE_S)[0]
    assert answer == {"reached": True, "from": "127.0.0.1", "port": answer["port"]} and 0 < answer["port"] < 65536
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
    situation = two.run(reachability.ask(two.endpoint, [one.peer_id], port=5000))
    assert situation.reach == "public" and "\x1b" not in situation.text
