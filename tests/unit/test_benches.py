"""The benchmarks' arithmetic: rates of lumps, bounds, books of tokens, schedules of faults, tables. Nothing is run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swarm.config import load_run
from swarm.errors import ConfigError
from swarm.train.lines import read_topology
from tests.swarm.support import write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench
from benches import churn, faults, join, labpeer, labrun, options, traffic, usage, wan
from benches import round as rounds
from benches import table as tables
from wanlab.topology import load


class Gone:
    """A process that has ended."""

    returncode = -9

    def poll(self) -> int:
        return self.returncode


def life(lines: list[tuple[float, dict[str, Any]]], *, number: int = 0, ended: float | None = None) -> labpeer.Peer:
    return labpeer.Peer(number, "abcd"[number], Gone(), Path("none"), 0.0, lines, ended=ended)  # type: ignore[arg-type]


def progress(at: float, tokens: int, swarm_tokens: int = 0) -> tuple[float, dict[str, Any]]:
    return at, {"event": "progress", "tokens": tokens, "swarm_tokens": swarm_tokens}


def a_round(
    at: float, version: int, seconds: float, *, fragment: int = 0, contributors: int = 2, digest: str = "d"
) -> tuple[float, dict[str, Any]]:
    return at, {
        "event": "round", "fragment": fragment, "version": version, "seconds": seconds, "contributors": contributors,
        "digest": digest,
    }


# ---- table ----


def test_a_rate_goes_from_the_first_commit_in_the_window_to_the_last() -> None:
    said = [(t / 10, 1000.0 * (t // 20)) for t in range(200)]  # a lump of 1000 every 2 s, told ten times a second
    rate = tables.rate(tables.rises([said]), began=3.0, ended=11.0)
    assert rate == tables.Rate(500.0, 4)
    assert tables.rate(tables.rises([said]), began=3.0, ended=4.5) == tables.Rate(0.0, 1)


def test_rises_are_those_of_the_most_advanced_peer() -> None:
    assert tables.rises([[(1.0, 10.0), (3.0, 30.0)], [(2.0, 20.0), (4.0, 25.0)]]) == [(1, 10), (2, 20), (3, 30)]


def test_tokens_at_is_on_the_line_between_two_words() -> None:
    said = [(1.0, 100.0), (3.0, 300.0)]
    assert [tables.tokens_at(said, at) for at in (0.5, 1.0, 2.0, 3.0, 9.0)] == [0, 0, 200, 300, 300]


def test_the_longest_gap_counts_the_edges() -> None:
    assert tables.longest_gap([1, 5, 6, 50], began=0, ended=11) == 5
    assert tables.longest_gap([], began=0, ended=11) == 11


def test_spreads_leave_out_what_is_no_figure_and_what_not_all_have() -> None:
    found = tables.spreads([{"a": 1, "b": "x", "c": 2.0}, {"a": 3, "b": "y"}, {"a": 2, "b": "z", "c": 1.0}])
    assert found == {"a": {"median": 2, "min": 1, "max": 3, "values": [1, 3, 2]}}
    assert tables.spreads([]) == {}


def test_a_figure_of_one_repeat_has_no_range() -> None:
    assert tables.shown(tables.spread([0.8754])) == "0.88"
    assert tables.shown(tables.spread([1000.0, 3000.0, 2500.0]), digits=0) == "2,500 (1,000-3,000)"
    assert tables.shown(None) == ""


def test_markdown_keeps_its_columns() -> None:
    assert tables.markdown(["a", "b"], [["1|2", 3]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1/2 | 3 |"]


# ---- options ----


def test_set_finds_the_section_of_each_key(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path))
    found = options.changed(run, options.settings(["bits=8", "sequence_length=16"]), seed=5)
    assert (found.averaging.bits, found.train.sequence_length, found.seed) == (8, 16, 5)
    assert options.endless(found).train.total_tokens == options.ENDLESS_TOKENS
    assert load_run(options.write(found, tmp_path / "new" / "run.yaml")) == found


@pytest.mark.parametrize("pair", ["bitz=8", "bits", "bits="])
def test_set_names_what_it_does_not_know(pair: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        options.settings([pair])


def test_a_topology_must_have_a_host_for_each_peer() -> None:
    wanted = argparse.Namespace(topology=["home-100"], peers=[2, 5])
    with pytest.raises(ConfigError, match="too small for 5 peers"):
        options.places(wanted)
    wanted.peers = [4]
    assert [(name, numbers) for name, _, numbers in options.places(wanted)] == [("home-100", [4])]


def test_a_machine_without_labs_ends_with_code_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr("wanlab.requirements.missing", lambda: ["root"])
    assert bench.main(["wan", "--quick", "--out", str(tmp_path / "out.json")]) == 2
    assert "it lacks: root" in capsys.readouterr().err


def test_a_rival_that_is_not_installed_ends_with_code_2(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench.main(["wan", "--system", "torchft"]) == 2
    assert "[bench]" in capsys.readouterr().err


def test_every_benchmark_has_a_help(capsys: Any) -> None:
    for name in bench.BENCHES:
        with pytest.raises(SystemExit) as end:
            bench.main([name, "--help"])
        assert end.value.code == 0 and "--quick" in capsys.readouterr().out


# ---- labrun ----


def test_a_peer_of_the_product_resumes_without_words_about_the_run() -> None:
    first = ["python", "--home", "h", "--new-swarm", "--run", "r.yaml", "--until-tokens", "5"]
    assert labrun.without_run(first) == ["python", "--home", "h", "--until-tokens", "5"]
    later = ["python", "--initial-peers", "/ip4/1", "/ip4/2", "--home", "h"]
    assert labrun.without_run(later) == ["python", "--home", "h"]


def test_a_peer_remembers_what_it_said(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    errors.write_text("one\ntwo\n")
    peer = life([(1.0, {"event": "ready"}), progress(2.0, 10, 5), progress(3.0, 20, 15)])
    peer.errors = errors
    assert peer.is_ready() and not peer.is_running()
    assert (peer.last("progress", "tokens"), peer.last("left", "reason", "no")) == (20, "no")
    assert peer.points("swarm_tokens") == [(2.0, 5), (3.0, 15)]
    assert peer.how_it_ended() == "code -9; one / two"


def test_a_process_in_the_lab_has_a_group_of_its_own_in_our_session() -> None:
    """Its group, so that Ctrl+C does not reach it; our session, or niceness would not count between peers."""
    class Here:
        def command(self, host: str, argv: list[str]) -> list[str]:
            return argv

        def environment(self, host: str) -> dict[str, str]:
            return {"SWARM_HOST": host}

    code = "import os; print(os.getsid(0), os.getpgrp(), os.getpid(), os.environ['SWARM_HOST'])"
    started = labpeer.popen(
        Here(), "a", [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,  # type: ignore[arg-type]
    )
    session, group, pid, host = started.communicate(timeout=60)[0].split()
    assert int(session) == os.getsid(0) and group == pid != str(os.getpid()) and host == "a"


class Alone:
    """Stands in for the whole lab: what each system and the peers alone reach, in tokens a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rates: dict[str, list[float | str]]) -> None:
        self.order: list[str] = []
        self.rates = rates
        monkeypatch.setattr(wan.Wan, "alone", lambda bench: self.next("alone"))
        monkeypatch.setattr(wan.Wan, "window", lambda bench, system: {"tokens_per_s": self.next(system.name)})

    def next(self, name: str) -> float:
        self.order.append(name)
        rate = self.rates[name].pop(0)
        if isinstance(rate, str):
            raise labpeer.DidNotFinish(rate)
        return rate

    def rows(self, names: list[str], repeats: int, folder: Path) -> list[dict[str, Any]]:
        asked = argparse.Namespace(repeats=repeats, tokens=None)
        bench = wan.Wan(None, None, folder, num_peers=4, options=asked)  # type: ignore[arg-type]
        return bench.rows([options.SYSTEMS[name] for name in names])


def test_efficiency_is_over_what_the_peers_did_alone_before_and_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The machine gets slower while it is measured: half of that is in each neighbour."""
    lab = Alone(monkeypatch, {"alone": [100.0, 80.0, 60.0], "swarm": [81.0, 63.0], "hivemind": [45.0, 35.0]})
    ours, theirs = lab.rows(["swarm", "hivemind"], 2, tmp_path)
    assert lab.order == ["alone", "swarm", "hivemind", "alone", "swarm", "hivemind", "alone"]
    assert ours["efficiency"]["values"] == pytest.approx([0.9, 0.9])
    assert theirs["efficiency"]["values"] == pytest.approx([0.5, 0.5])
    assert not ours["failures"] and not theirs["failures"]


def test_who_does_not_finish_is_in_the_table_and_stops_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lab = Alone(monkeypatch, {"alone": [100.0, 100.0, 100.0], "swarm": [90.0, 90.0], "torchft": ["it died", 30.0]})
    theirs, ours = lab.rows(["torchft", "swarm"], 2, tmp_path)
    assert ours["efficiency"]["values"] == pytest.approx([0.9, 0.9])
    assert theirs["efficiency"]["values"] == pytest.approx([0.3])
    [failure] = theirs["failures"]
    assert failure == "did not finish: it died"


def test_usage_is_what_came_between_two_snapshots() -> None:
    host = {"up_bytes": 100, "down_bytes": 50, "overrun": 0}
    more = {"up_bytes": 1100, "down_bytes": 250, "overrun": 1}
    before = usage.Snapshot(10.0, {"a": host, "b": host}, {"cpu_s": 1.0}, {1: 5.0, 2: 1.0})
    after = usage.Snapshot(20.0, {"a": more, "b": host}, {"cpu_s": 1.5, "late_max_us": 7.0}, {1: 9.0, 3: 2.0})
    used = usage.usage(before, after)
    assert used["up_bytes_per_peer"] == 500 and used["up_bytes_per_s"] == 50 and used["down_bytes_per_s"] == 10
    assert used["cpu_cores"] == pytest.approx(0.6) and used["emulator_cores"] == pytest.approx(0.05)
    assert used["overrun_packets"] == 1 and used["emulator_late_max_us"] == 7.0


# ---- wan, traffic ----


def test_the_wan_table_has_reasons_where_there_are_no_figures() -> None:
    figures = {
        "seconds": 90.0, "efficiency": 0.9, "tokens_per_s": 9000.0, "alone_tokens_per_s": 10000.0, "loss": 2.0,
        "up_bytes_per_s": 5e5, "cpu_cores": 1.9, "emulator_cores": 0.02, "overrun_packets": 0,
    }
    rows = [
        {"topology": "t", "peers": 2, "system": "swarm", "failures": [], **tables.spreads([figures]), "loss": 2.0},
        {"topology": "t", "peers": 2, "system": "torchft", "failures": ["did not finish: x"], "loss_failure": "no"},
    ]
    text = wan.table({"rows": rows, "tokens": 1000, "seconds": 40.0, "systems": {"swarm": "as shipped"}})
    assert "| t | 2 | swarm | 0.900 | 9,000 | 10,000 | 500 | 1.90 | 0.020 | 2.0000 |" in text
    assert "| t | 2 | torchft | did not finish: x | " in text
    assert "the window was made 90 s long" in text


def test_ddp_sends_a_ring_of_gradients_each_step(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path))  # 4 sequences of 32 tokens
    assert traffic.ddp_bytes_per_token(run, 1_000_000, 4) == pytest.approx(2 * 2 * 1e6 * 0.75 / (4 * 4 * 32))


def test_the_traffic_table_compares_with_the_calculation() -> None:
    figures = {"loss": 2.02, "bytes_per_token": 10.0, "less_than_ddp": 78.0, "gap_percent": 1.0}
    place = {
        "topology": "t", "peers": 4, "ddp_bytes_per_token": 780.0, "control_bytes_per_s": 2500.0,
        "reference_loss": tables.spread([2.0]),
        "rows": [{"system": "swarm", "failures": [], **tables.spreads([figures])}],
    }
    text = traffic.table({"tokens": 1000, "places": [place], "systems": {}})
    assert "| t | 4 | swarm | 10.0 | 78.0 | 2.0200 | +1.00 |" in text and "2.5 kB/s a peer" in text


# ---- round ----


def test_the_bound_is_the_slowest_line_and_the_longest_path() -> None:
    assert rounds.bound(load("home-100"), ["a", "b"], 1_000_000) == pytest.approx(0.08 + 4 * 0.04)
    assert rounds.bound(load("home-asym"), ["a", "b", "c", "d"], 1_000_000) == pytest.approx(0.6 + 4 * 0.04)
    far = rounds.bound(load("gpt-jt"), ["virginia", "london", "tokyo"], 30_000_000)
    assert far == pytest.approx(2 * 8 * 1e7 / 366e6 + 4 * 0.105)  # london to tokyo is slower than two at 1 Gbit/s


def test_a_round_lasts_until_the_last_peer_has_applied_it() -> None:
    opener = life([a_round(10.0, 1, 0.5), a_round(20.0, 2, 0.5), a_round(30.0, 3, 0.5)])
    other = life([a_round(10.1, 1, 0.2), a_round(20.2, 2, 0.1, contributors=1)], number=1)
    assert rounds.whole_rounds([opener, other], 2) == [(pytest.approx(0.6), 0.5)]


def test_the_plan_foretells_each_round_from_the_labs_own_lines() -> None:
    run = rounds.sized(load_run(Path(__file__).parents[2] / "peers" / "runs" / "demo.yaml"), "10M", 4)
    home, far = load("home-100"), load("gpt-jt")
    assert rounds.lines_of(home, home.names) == dataclasses.replace(read_topology("home-100"), name="")
    eight = read_topology("gpt-jt")
    assert rounds.lines_of(far, far.names[:3]).lines == eight.lines[:3] and len(eight.pairs) == 28
    alone, shared = (rounds.foretold(home, home.names[:2], run, cores=cores) for cores in (1.0, 0.5))
    assert rounds.bound(home, home.names[:2], rounds.encoded_bytes(run)) < alone < shared
    assert alone == pytest.approx(1.64, rel=0.15), "as README has it"


def test_the_table_of_rounds_has_measured_over_foretold() -> None:
    row = {"topology": "home-100", "size": "10M", "bits": 4, "encoded_bytes": 5e6, "bound_s": 0.6, "foretold_s": 1.7}
    good = {"seconds": tables.spread([1.6]), "over_bound": tables.spread([2.7]), "over_foretold": tables.spread([0.94])}
    text = rounds.table({"rounds": 1, "rows": [{**row, **good, "peers": 2}, {**row, "peers": 4, "failure": "it died"}]})
    assert "| one round, s | times the bound | times foretold |" in text
    assert "| home-100 | 10M | 4 | 2 | 5.00 | 0.60 | 1.70 | 1.60 | 2.70 | 0.94 |" in text
    assert "| home-100 | 10M | 4 | 4 | 5.00 | 0.60 | 1.70 | it died |  |  |" in text


@pytest.mark.parametrize(("size", "about"), [("1M", 1.07e6), ("10M", 9.9e6)])
def test_sizes_are_about_what_they_say(size: str, about: float) -> None:
    run = rounds.sized(load_run(Path(__file__).parents[2] / "peers" / "runs" / "demo.yaml"), size, 4)
    assert traffic.parameters_of(run) == pytest.approx(about, rel=0.02)
    assert about / 2 < rounds.encoded_bytes(run) < 0.6 * about
    assert run.fragments == 1


# ---- join ----


def test_the_parts_of_joining_add_up() -> None:
    checks = [("device", 3.0), ("network", 4.0), ("reachable", 4.5), ("memory", 4.6), ("state", 7.0), ("training", 9.0)]
    lines = [(at, {"event": "check", "name": name, "seconds": 1.5}) for name, at in checks]
    lines += [a_round(9.5, 7, 0.1, contributors=3), progress(10.0, 0), progress(11.0, 100)]
    lines += [a_round(12.0, 8, 0.1, contributors=2), a_round(13.0, 9, 0.1, contributors=3)]
    took = join.parts(life(lines), 3)
    assert took == {
        "import": 3.0, "network": 1.5, "state": 2.5, "text": 2.0, "trains": 2.0, "counts": 2.0, "total": 13.0,
        "download": 1.5,
    }
    assert join.counted_at(life(lines[:-1]), 3) is None


# ---- churn ----


def test_a_schedule_is_seeded_and_never_takes_too_many() -> None:
    wanted: dict[str, Any] = {"seconds": 3600, "per_hour": 600, "kinds": faults.KINDS, "num_peers": 4}
    found = faults.schedule(seed=1, **wanted)
    assert found == faults.schedule(seed=1, **wanted) != faults.schedule(seed=2, **wanted)
    assert {fault.kind for fault in found} == set(faults.KINDS)
    assert all(fault.ends_s < 3600 for fault in found)
    for fault in found:
        now = [other for other in found if other.at_s <= fault.at_s < other.ends_s and other.kind != "partition"]
        ill = [number for other in now for number in other.numbers]
        assert len(ill) == len(set(ill)) <= 2
        assert len(fault.numbers) == (2 if fault.kind == "partition" else 1)


def test_a_first_peer_with_a_helper_is_spared() -> None:
    found = faults.schedule(
        seed=1, seconds=3600, per_hour=600, kinds=churn.KILLED_ONLY, num_peers=3, spare_first=True
    )
    assert {number for fault in found for number in fault.numbers} == {1, 2}


def test_the_books_of_a_peer_that_was_killed() -> None:
    """It trained 1000 a second: 5000 until its last word and 500 more unseen; 2000 of them before its last round."""
    killed = life([*(progress(at, 1000 * at) for at in range(6)), a_round(2.5, 1, 0.5)], ended=5.5)
    alive = life([progress(0.0, 0), progress(9.0, 9000, 10_900), a_round(2.3, 1, 0.2)], number=1)
    books = churn.books([killed, alive])
    assert books["trained_tokens"] == 14_500 and books["unseen_tokens"] == 500
    assert books["held_tokens"] == 3_500
    assert books["committed_tokens"] == 10_900
    assert books["lost_tokens"] == pytest.approx(100) and books["counted_twice_tokens"] == 0
    assert books["participation"] == pytest.approx(10_900 / 14_500)


def test_books_find_what_was_counted_twice() -> None:
    books = churn.books([life([progress(0.0, 0), progress(9.0, 9000, 9_500)])])
    assert books["counted_twice_tokens"] == 500 and books["lost_tokens"] == 0


def test_the_churn_table_says_when_digests_disagree() -> None:
    figures = {
        "num_faults": 5, "kept": 0.8, "participation": 0.95, "lost_tokens": 0.0, "counted_twice_tokens": 0.0,
        "longest_stall_s": 4.0, "calm_longest_stall_s": 1.0, "num_ended_by_themselves": 1, "equal_weights": 3,
        "heads_agree": 0,
    }
    row = {
        "topology": "t", "peers": 4, "system": "swarm", "failures": [], **tables.spreads([figures]),
        "details": [{"faults": [], "ended_by_themselves": ["peer 1: code 1; oh"]}],
    }
    text = churn.table({"seconds": 60.0, "faults_per_hour": 60.0, "systems": {}, "rows": [row]})
    assert "| t | 4 | swarm | 5 | 0.80 | 0.950 | 0 | 0 | 4.0 | 1.0 | 1 | 3 of 4, digests DISAGREE |" in text
    assert "peer 1: code 1; oh" in text
    json.dumps(row)


def test_bench_starts_as_a_program() -> None:
    script = Path(__file__).parents[2] / "scripts" / "bench.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "churn" in done.stdout
