"""What a lab's topology may say, what is refused, and what the ready-made ones are. No root, nothing is made."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import combinations
from pathlib import Path

import pytest

from swarm.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from wanlab import forwarder
from wanlab.topology import available, from_json, load, parse, parse_loss, parse_rate, parse_time

TWO = {"a": {"up": "20mbit", "latency": "5ms", "loss": "10%"}, "b": {"latency": "7.5ms", "jitter": "1ms"}}


def rtt_s(topology, a, b):
    return topology.latency_s(a, b) + topology.latency_s(b, a)


@pytest.mark.parametrize(("name", "up", "down", "rtt"), [
    ("home-100", 100e6, 100e6, 0.08), ("home-asym", 20e6, 100e6, 0.08), ("thin-10", 10e6, 10e6, 0.12),
    ("yardstick", 200e6, 200e6, 0.05),
])  # fmt: skip
def test_ready_made_homes(name, up, down, rtt):
    topology = load(name)
    assert topology.names == ["a", "b", "c", "d"]
    for a, b in combinations(topology.names, 2):
        assert (topology.up_bits_per_s(a), topology.down_bits_per_s(a)) == (up, down)
        assert rtt_s(topology, a, b) == pytest.approx(rtt)
        assert topology.loss(a, b) == 0


def test_ready_made_eight_countries():
    topology = load("gpt-jt")
    pairs = list(combinations(topology.names, 2))
    assert len(topology.names) == 8 and len(topology.pairs) == len(pairs)
    assert all(0.011 <= rtt_s(topology, a, b) <= 0.265 for a, b in pairs)
    assert {topology.up_bits_per_s(name) for name in topology.names} == {1e9}
    rates = [topology.pair(a, b).bits_per_s or 1e9 for a, b in pairs]
    assert 0.325e9 <= min(rates) and max(rates) == 1e9
    assert len(set(rates)) > 10


def test_ready_made_nat():
    topology = load("nat")
    assert {host.name: host.nat for host in topology.hosts} == {
        "p1": "", "p2": "", "p3": "", "c1": "cone", "c2": "cone", "s1": "symmetric",
    }
    assert topology.public_ip("c1") == "192.52.193.4"
    assert rtt_s(topology, "p1", "s1") == pytest.approx(0.08)
    assert topology.up_bits_per_s("s1") == 100e6


def test_every_ready_made_one_is_known_and_survives_the_run_folder():
    assert available() == ["gpt-jt", "home-100", "home-asym", "nat", "thin-10", "yardstick"]
    for name in available():
        topology = load(name)
        assert from_json(json.loads(json.dumps(dataclasses.asdict(topology)))) == topology


def test_units():
    assert [parse_rate(text) for text in ("100mbit", "1.5 Gbit", "0", 0)] == [100e6, 1.5e9, 0, 0]
    assert [parse_time(text) for text in ("20ms", "12.5ms", "1s", "100us")] == pytest.approx([0.02, 0.0125, 1, 1e-4])
    assert [parse_loss(text) for text in ("0.1%", 0, "100%")] == pytest.approx([0.001, 0, 1])


@pytest.mark.parametrize(("parser", "text"), [
    (parse_rate, "100"), (parse_rate, "100mb"), (parse_rate, "-1mbit"), (parse_rate, "fast"), (parse_rate, True),
    (parse_time, 20), (parse_time, "20min"), (parse_time, "nan"), (parse_loss, "0.1"), (parse_loss, "101%"),
])  # fmt: skip
def test_what_is_no_quantity_is_refused(parser, text):
    with pytest.raises(ConfigError) as caught:
        parser(text)
    assert str(text) in caught.value.what and caught.value.do


def test_latency_jitter_and_loss_of_a_path_follow_from_both_ends_or_from_the_pair():
    topology = parse({"hosts": {**TWO, "c": None}, "pairs": [{"between": ["c", "a"], "latency": "75ms", "loss": 0}]})
    assert topology.latency_s("a", "b") == pytest.approx(0.0125)
    assert topology.jitter_s("b", "a") == pytest.approx(0.001)
    assert topology.loss("a", "b") == pytest.approx(0.1)
    assert topology.latency_s("a", "c") == topology.latency_s("c", "a") == pytest.approx(0.075)
    assert topology.loss("a", "c") == 0


def test_defaults_and_addresses():
    topology = parse({"network": "10.5.0.0/24", "defaults": {"up": "1mbit", "queue": "1s"}, "hosts": TWO})
    assert (topology.up_bits_per_s("a"), topology.up_bits_per_s("b")) == (20e6, 1e6)
    assert topology.host("b").queue_s == 1
    assert [topology.public_ip(name) for name in topology.names] == ["10.5.0.1", "10.5.0.2"]


def test_changes_leave_the_rest_as_it_was():
    before = parse({"hosts": TWO})
    after = before.with_link("a", down_bits_per_s=5e6).with_path("b", "a", loss=0.5).with_path("a", "b", jitter_s=0.0)
    assert (after.up_bits_per_s("a"), after.down_bits_per_s("a")) == (20e6, 5e6)
    assert (after.loss("a", "b"), after.jitter_s("a", "b")) == (0.5, 0)
    assert after.latency_s("a", "b") == before.latency_s("a", "b")
    assert len(after.pairs) == 1 and not before.pairs


def test_what_the_forwarder_is_told():
    topology = parse({"hosts": TWO, "pairs": [{"between": ["a", "b"], "rate": "8mbit"}]})
    assert forwarder.link_line(topology, "a") == "link a 20000000 0 250000 30000"
    assert forwarder.path_line(topology, "b", "a") == "path b a 12500000 1000000 0.100000000 8000000 100000"


@pytest.mark.parametrize(("document", "says"), [
    (None, "needs 1 to 64 hosts"),
    ([], "consists of settings"),
    ({"hosts": {}}, "needs 1 to 64 hosts"),
    ({"hosts": {f"h{n}": None for n in range(65)}}, "needs 1 to 64 hosts"),
    ({"hosts": TWO, "speed": 1}, "unknown: speed"),
    ({"hosts": {"a": {"upp": "1mbit"}}}, "host a: unknown: upp"),
    ({"hosts": {"a": {"up": "1mb"}}}, "host a: up: cannot read '1mb'"),
    ({"hosts": TWO, "defaults": {"latency": "soon"}}, "defaults: latency: cannot read 'soon'"),
    ({"hosts": {"A": None}}, "'A' cannot be a host's name"),
    ({"hosts": {False: None}}, "False cannot be a host's name"),
    ({"hosts": {"forwarder": None}}, "'forwarder' cannot be a host's name"),
    ({"hosts": {"a": {"nat": "full"}}}, "no NAT called 'full'"),
    ({"hosts": {"a": {"forward": ["http"]}}}, "are not ports"),
    ({"hosts": {"a": {"forward": 70000}}}, "are not ports"),
    ({"hosts": TWO, "pairs": {"a": "b"}}, "it is not a list"),
    ({"hosts": TWO, "pairs": [{"between": ["a", "z"]}]}, "between two hosts, not ['a', 'z']"),
    ({"hosts": TWO, "pairs": [{"between": ["a", "a"]}]}, "is one host"),
    ({"hosts": TWO, "pairs": [{"between": ["a", "b"]}, {"between": ["b", "a"]}]}, "is there twice"),
    ({"hosts": TWO, "pairs": [{"between": ["a", "b"], "rate": "x"}]}, "pair a, b: rate: cannot read 'x'"),
    ({"hosts": TWO, "seed": "one"}, "seed: 'one'"),
    ({"hosts": TWO, "network": "10.0.0.1/8"}, "network: '10.0.0.1/8' is not one"),
    ({"hosts": TWO, "network": "10.0.0.0/31"}, "no room for 2 hosts"),
    ({"hosts": TWO, "network": "192.168.0.0/24"}, "overlaps 192.168.0.0/16"),
    ({"hosts": TWO, "sysctls": {"vm.swappiness": 1}}, "is not below net."),
    ({"hosts": TWO, "sysctls": ["net.core"]}, "it is not a table"),
])  # fmt: skip
def test_what_a_topology_may_not_say(document, says):
    with pytest.raises(ConfigError) as caught:
        parse(document)
    assert says in caught.value.what


def test_a_file_of_ones_own_is_named_in_its_errors(tmp_path):
    path = tmp_path / "mine.yaml"
    with pytest.raises(ConfigError, match=r"no topology .*mine\.yaml"):
        load(path)
    path.write_text("hosts: {a: {up: 1mb}}")
    with pytest.raises(ConfigError, match=r"mine\.yaml: host a: up: cannot read"):
        load(path)
    path.write_text("hosts: [")
    with pytest.raises(ConfigError, match="cannot be read as a topology"):
        load(path)
    path.write_text("hosts: {a: {up: 1mbit}}")
    assert load(str(path)).up_bits_per_s("a") == 1e6


def test_hosts_and_paths_that_are_not_there():
    topology = parse({"hosts": TWO})
    with pytest.raises(ConfigError, match="no host 'z'"):
        topology.up_bits_per_s("z")
    with pytest.raises(ConfigError, match="to itself"):
        topology.latency_s("a", "a")
