"""Lines as people say them and as topologies have them; nonsense; and that the lab reads the same files alike."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import ConfigError
from swarm.train.lines import Line, Lines, Pair, parse_line, parse_topology, read_topology, ready_made

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
from wanlab import topology as lab

TWO: dict[str, Any] = {"a": {"up": "20mbit", "latency": "5ms", "loss": "10%"}, "b": {"latency": "7.5ms", "nat": "cone"}}


def test_a_line_is_what_people_know_of_theirs() -> None:
    line = parse_line("20/100/30ms")
    assert (line.up_bits_per_s, line.down_bits_per_s) == (20e6, 100e6)
    two = Lines((line,)).first(2)
    assert 2 * two.latency_s(*two.lines) == pytest.approx(0.03), "there and back between two of them"
    assert two.bits_per_s(*two.lines) == 0 and parse_line(" 2.5 / 10 / 1s ").up_bits_per_s == 2.5e6


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 60_000))
def test_any_line_of_three_numbers_is_read(up: int, down: int, milliseconds: int) -> None:
    line = parse_line(f"{up}/{down}/{milliseconds}ms")
    assert line.up_bits_per_s == up * 1e6 and line.down_bits_per_s == down * 1e6
    assert line.latency_s == pytest.approx(milliseconds / 4000)


@pytest.mark.parametrize("text", [
    "", "20", "20/100", "20/100/30", "-20/100/30ms", "20/-100/30ms", "0/100/30ms", "20/0/30ms", "a/b/30ms",
    "20/100/fast", "20/100/-30ms",
    "1e9/100/30ms", "20/100/30ms/5", "nan/100/30ms", "inf/100/30ms", "20/100/90s", "2000000/1/1ms",
])  # fmt: skip
def test_nonsense_for_a_line_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be understood") as caught:
        parse_line(text)
    assert "20/100/30ms" in caught.value.do and caught.value.why


@pytest.mark.parametrize("name", ready_made())
def test_a_plan_and_the_lab_read_the_ready_made_ones_alike(name: str) -> None:
    ours, theirs = read_topology(name), lab.load(name)
    assert [line.name for line in ours.lines] == theirs.names and ours.name == name
    for line in ours.lines:
        assert line.up_bits_per_s == theirs.up_bits_per_s(line.name)
        assert line.down_bits_per_s == theirs.down_bits_per_s(line.name)
    for a, b in combinations(ours.lines, 2):
        assert ours.latency_s(a, b) == ours.latency_s(b, a) == theirs.latency_s(a.name, b.name)
        assert ours.bits_per_s(a, b) == theirs.pair(a.name, b.name).bits_per_s


def test_the_ready_made_ones_are_the_labs() -> None:
    assert ready_made() == lab.available() and "home-100" in ready_made()


def test_what_a_plan_does_not_need_is_passed_over() -> None:
    pairs = [{"between": ["c", "a"], "rate": "5mbit"}]
    lines = parse_topology({"hosts": {**TWO, "c": None}, "pairs": pairs, "seed": 3})
    a, b, c = lines.lines
    assert a == Line("a", 20e6, 0.0, 0.005) and c == Line("c")
    assert lines.latency_s(a, b) == pytest.approx(0.0125) and lines.latency_s(a, c) == pytest.approx(0.015)
    assert lines.bits_per_s(a, c) == 5e6 and lines.bits_per_s(b, c) == 0


def test_defaults_give_way_to_what_a_host_says() -> None:
    lines = parse_topology({"defaults": {"up": "1mbit", "down": "2mbit"}, "hosts": {"a": {"up": "9mbit"}, "b": None}})
    assert [(line.up_bits_per_s, line.down_bits_per_s) for line in lines.lines] == [(9e6, 2e6), (1e6, 2e6)]


@pytest.mark.parametrize(("document", "says"), [
    (None, "needs 1 to 64 hosts"),
    ([], "consists of settings"),
    ({"hosts": {}}, "needs 1 to 64 hosts"),
    ({"hosts": {f"h{n}": None for n in range(65)}}, "needs 1 to 64 hosts"),
    ({"hosts": TWO, "speed": 1}, "unknown: speed"),
    ({"hosts": {"a": {"upp": "1mbit"}}}, "host a: unknown: upp"),
    ({"hosts": {"a": {"up": "-1mbit"}}}, "cannot read '-1mbit'"),
    ({"hosts": {"a": {"latency": 20}}}, "cannot read 20"),
    ({"hosts": {"a": {"latency": "61s"}}}, "no latency"),
    ({"hosts": TWO, "pairs": {"a": "b"}}, "not a list"),
    ({"hosts": TWO, "pairs": [{"between": ["a", "z"]}]}, "between two of its hosts"),
    ({"hosts": TWO, "pairs": [{"between": ["a", "b"], "speed": 1}]}, "unknown: speed"),
])
def test_what_is_no_topology_is_said(document: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says.replace("'", ".")):
        parse_topology(document)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match="is not a topology") as caught:
        read_topology(str(file))
    assert says in caught.value.why


def test_an_unknown_topology_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no topology 'home-1000'") as caught:
        read_topology("home-1000")
    assert "home-100, home-asym" in caught.value.do
    (tmp_path / "broken.yaml").write_text("hosts: [")
    with pytest.raises(ConfigError, match="cannot be read as a topology"):
        read_topology(str(tmp_path / "broken.yaml"))
    with pytest.raises(ConfigError, match="cannot be read as a topology"):
        read_topology(str(tmp_path))


def test_one_line_stands_for_all_and_several_for_themselves() -> None:
    one = Lines((parse_line("10/10/40ms"),)).first(4)
    assert len(one) == 4 and len({line.name for line in one.lines}) == 4
    assert {line.up_bits_per_s for line in one.lines} == {10e6}
    home = read_topology("home-100")
    assert [line.name for line in home.first(2).lines] == ["a", "b"]
    with pytest.raises(ConfigError, match="5 peers for each fragment") as caught:
        home.first(5)
    assert "--replicas" in caught.value.do and caught.value.why == "there are 4"


def test_a_pair_may_differ_from_the_sum_of_its_lines() -> None:
    a, b = Line("a", latency_s=0.01), Line("b", latency_s=0.02)
    assert Lines((a, b)).latency_s(a, b) == pytest.approx(0.03)
    assert Lines((a, b), (Pair(("b", "a"), latency_s=0.1),)).latency_s(a, b) == 0.1
