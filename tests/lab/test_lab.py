"""Does the lab do what it was asked? Rates, latencies, losses within 5 %; silence, resets and NAT as in the world."""

from __future__ import annotations

import statistics
import subprocess
import time

import pytest

from tests.lab import lab_support as support
from tests.lab.lab_support import Lab, Topology, parse, pings, program, running, same

pytestmark = support.needs_a_lab
LOSSY = 0.1
DATAGRAMS = 60_000
"""the loss measured of these has a standard deviation of 1.2 % of 10 %, so 5 % are four of them"""


def topology() -> Topology:
    return parse({
        "seed": 7,
        "defaults": {"up": "40mbit", "down": "40mbit", "latency": "5ms"},
        "hosts": {
            "a": {}, "b": {"up": "20mbit"}, "c": {"down": "10mbit"}, "n": {"nat": "cone", "forward": [4001]},
            "s": {"nat": "symmetric"},
        },
        "pairs": [
            {"between": ["a", "c"], "latency": "40ms"}, {"between": ["b", "c"], "rate": "5mbit"},
            {"between": ["a", "b"], "loss": 0},
        ],
    })  # fmt: skip


@pytest.fixture(scope="module")
def lab():
    with Lab(support.NAME, topology()) as lab:
        yield lab


@pytest.mark.parametrize(("sender", "receiver", "bits_per_s"), [("a", "b", 40e6), ("b", "a", 20e6), ("a", "c", 10e6),
                                                                ("b", "c", 5e6)])
def test_rate(lab, sender, receiver, bits_per_s):
    """Limited by nothing but the access links (40), by the uplink (20), by the downlink (10), by the pair (5)."""
    measured = support.tcp_rate(lab, sender, receiver)
    same(f"{sender}->{receiver} Mbit/s", bits_per_s / 1e6, measured / support.MSS_OF_MTU / 1e6)
    assert all(counters.get("overrun", 0) == 0 for counters in lab.stats().values())


@pytest.mark.parametrize(("one", "other", "rtt_ms"), [("a", "b", 20), ("a", "c", 80), ("n", "b", 20)])
def test_latency(lab, one, other, rtt_ms):
    same(f"{one}-{other} RTT ms", rtt_ms, 1e3 * statistics.median(pings(lab, one, lab.public_ip(other), 20)))


def datagrams_lost(lab: Lab) -> float:
    with running(program(lab, "b", support.COUNT_DATAGRAMS)) as receiver:
        before = lab.stats()
        subprocess.run(program(lab, "a", support.SEND_DATAGRAMS, lab.ip("b"), DATAGRAMS), check=True)
        arrived = int(receiver.communicate(timeout=30)[0])
        after = lab.stats()
    assert after["a"]["lost"] - before["a"]["lost"] == DATAGRAMS - arrived  # nothing went missing elsewhere
    return 1 - arrived / DATAGRAMS


@pytest.mark.parametrize("loss", [LOSSY, 0.3])
def test_loss(lab, loss):
    lab.set_path("a", "b", loss=loss)
    try:
        same("a->b loss", loss, datagrams_lost(lab))
    finally:
        lab.set_path("a", "b", loss=0.0)
    assert len(pings(lab, "a", lab.ip("b"), 5)) == 5


def test_jitter_is_spread_over_what_was_asked(lab):
    lab.set_path("a", "b", latency_s=0.01, jitter_s=0.02)
    try:
        times = pings(lab, "a", lab.ip("b"), 40)
    finally:
        lab.set_path("a", "b", latency_s=0.01, jitter_s=0.0)
    assert 0.02 <= min(times) and max(times) < 0.063
    assert 0.032 < statistics.mean(times) < 0.048  # 20 ms and twice 0 to 20; six standard deviations


def test_a_cut_host_is_silent_until_it_is_healed(lab):
    lab.cut("b")
    assert not pings(lab, "a", lab.ip("b")) and not pings(lab, "b", lab.ip("c"))
    assert pings(lab, "a", lab.ip("c"))
    lab.heal("b")
    assert len(pings(lab, "a", lab.ip("b"))) == 3


def test_a_cut_pair_still_reaches_everybody_else(lab):
    lab.cut("a", "b")
    assert not pings(lab, "a", lab.ip("b")) and not pings(lab, "b", lab.ip("a"))
    assert pings(lab, "a", lab.ip("c")) and pings(lab, "c", lab.ip("b"))
    lab.heal("b", "a")
    assert len(pings(lab, "a", lab.ip("b"))) == 3


@pytest.mark.parametrize(("verb", "heard"), [("crash", "closed"), ("kill", "silence")])
def test_a_crash_is_heard_and_a_power_failure_is_not(lab, verb, heard):
    call = program(lab, "a", support.CALL, lab.ip("b"), 5001)
    with running(program(lab, "b", support.SERVE, 5001)) as server, running(call, ready=False) as client:
        assert client.stdout.readline() == f"{lab.ip('a')}\n"  # they are connected
        getattr(lab, verb)("b")
        assert server.wait(timeout=5) == -9
        assert client.communicate(timeout=10)[0] == f"{heard}\n"
    lab.heal("b")
    assert len(pings(lab, "a", lab.ip("b"))) == 3


def test_who_is_behind_nat_calls_out_under_the_routers_address(lab):
    with running(program(lab, "a", support.SERVE, 5001)):
        called = subprocess.Popen(
            program(lab, "n", support.CALL, lab.ip("a"), 5001), stdout=subprocess.PIPE, text=True
        )
        assert called.communicate(timeout=20)[0] == f"{lab.public_ip('n')}\nsilence\n"
    assert lab.public_ip("n") != lab.ip("n")


@pytest.mark.parametrize(("port", "heard"), [(4001, True), (4002, False)])
def test_only_forwarded_ports_are_reached_from_outside(lab, port, heard):
    with running(program(lab, "n", support.SERVE, port)):
        answer = support.output(program(lab, "a", support.CALL, lab.public_ip("n"), port))
    assert answer == (f"{lab.ip('a')}\nsilence\n" if heard else "silence\n")  # dropped, not refused


@pytest.mark.parametrize(("host", "one_mapping"), [("n", True), ("s", False)])
def test_a_cone_has_one_mapping_for_all_and_a_symmetric_nat_has_one_for_each(lab, host, one_mapping):
    with running(program(lab, "a", support.ECHO_PORT)), running(program(lab, "b", support.ECHO_PORT)):
        ports = support.output(program(lab, host, support.ASK_PORTS, lab.ip("a"), lab.ip("b"))).split()
    assert len(ports) == 2
    assert (ports == ["6000", "6000"]) is one_mapping
    assert (ports[0] == ports[1]) is one_mapping


def incoming_rate(lab: Lab, host: str, seconds: float = 2.0) -> float:
    """By counting what comes over the wire."""
    began, before = time.monotonic(), lab.stats()[host]["down_bytes"]
    time.sleep(seconds)
    return 8 / (time.monotonic() - began) * (lab.stats()[host]["down_bytes"] - before)


def test_a_link_changes_while_it_runs(lab):
    command = lab.command("b", ["iperf3", "-c", lab.ip("a"), "-R", "-t", "30"])
    with support.iperf_server(lab, "a"), running(command, ready=False):
        time.sleep(1)
        same("before Mbit/s", 40, incoming_rate(lab, "b") / 1e6)
        lab.set_link("b", down_bits_per_s=8e6)
        time.sleep(1)
        same("after Mbit/s", 8, incoming_rate(lab, "b") / 1e6)
    lab.set_link("b", down_bits_per_s=40e6)
    assert lab.topology.down_bits_per_s("b") == 40e6 and lab.topology.up_bits_per_s("b") == 20e6


def test_bytes_are_counted(lab):
    num_bytes = 6_000_000
    time.sleep(0.5)  # the last packets of the test before
    before = lab.stats()
    with running(program(lab, "b", support.SWALLOW)) as receiver:
        subprocess.run(program(lab, "a", support.POUR, lab.ip("b"), num_bytes), check=True)
        assert int(receiver.communicate(timeout=30)[0]) == num_bytes
    after = lab.stats()
    on_wire = num_bytes / support.MSS_OF_MTU
    for host, counter in (("a", "up_bytes"), ("b", "down_bytes"), ("b", "if_rx_bytes"), ("a", "if_tx_bytes")):
        same(f"{host} {counter}", on_wire, after[host][counter] - before[host][counter])
    assert {"cpu_s", "late_mean_us", "late_max_us"} <= after["forwarder"].keys()


def test_two_labs_do_not_see_each_other(lab):
    with Lab(f"{support.NAME}x", topology()) as other:
        assert other.ip("b") == lab.ip("b")
        other.cut("b")
        other.crash("b")
        assert not pings(other, "a", other.ip("b")) and len(pings(lab, "a", lab.ip("b"))) == 3
        with running(program(lab, "b", support.SERVE, 5001)) as server:
            other.down()
            assert server.poll() is None
            assert len(pings(lab, "a", lab.ip("b"))) == 3
            other.up()
