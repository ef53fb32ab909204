"""The arithmetic of `bench.py pipeline`: bounds, the hub's best, schedules of kills, books of microbatches."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from swarm.config import load_run
from swarm.errors import ConfigError
from swarm.host.presets import preset_path
from swarm.train.serving import microbatch_sequences

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench
from benches import labpeer, pipeline, pipeline_bound, pipeline_churn, pipeline_speed
from benches import table as tables
from benches.systems import Setup, stage_peer
from benches.systems.stages import Stages, StageSpec
from wanlab.topology import load

LINE_BYTES_PER_S = 12.5e6
TOKENS, HIDDEN = 1024, 1024
ACTIVATION = 1024 * 1024 * (1 + 2 / 256) * 1500 / 1448
"""int8 with a 16-bit scale for each block of 256, as packets on the wire"""


class Process:
    """A process that runs, or has ended."""

    def __init__(self, returncode: int | None) -> None:
        self.returncode = returncode

    def poll(self) -> int | None:
        return self.returncode


def life(
    peer_id: str, lines: list[tuple[float, dict[str, Any]]], *, number: int = 0, began: float = 0.0,
    ended: float | None = None,
) -> labpeer.Peer:
    ready = (began + 1.0, {"event": "ready", "peer_id": peer_id})
    process: Any = Process(None if ended is None else -9)
    return labpeer.Peer(number, "abcdef"[number], process, Path("none"), began, [ready, *lines], ended=ended)


def done(at: float, number: int, *path: tuple[str, int, int]) -> tuple[float, dict[str, Any]]:
    return at, {"event": "done", "at": at, "number": number, "path": [list(hop) for hop in path], "credit": 4}


def committed(at: float, origin: str, number: int, start: int, end: int) -> tuple[float, dict[str, Any]]:
    return at, {"event": "committed", "at": at, "origin": origin, "number": number, "start": start, "end": end}


def specs(*services_s: float) -> list[StageSpec]:
    return [StageSpec((index, index + 1), service_s) for index, service_s in enumerate(services_s)]


def bound(stages: list[StageSpec], *, hub: bool = False, line: float = LINE_BYTES_PER_S) -> pipeline_bound.Bound:
    return pipeline_bound.bound(
        stages, tokens=TOKENS, hidden=HIDDEN, up_bytes_per_s=line, down_bytes_per_s=line, hub=hub
    )


# ---- bounds ----


def both(num_stages: int, *, hub: bool) -> tuple[list[int], list[int]]:
    return (
        pipeline_bound.activations_up(num_stages, hub=hub), pipeline_bound.activations_down(num_stages, hub=hub)
    )


def test_a_chain_sends_2_activations_a_boundary_and_a_hub_5() -> None:
    for num_stages in (2, 3, 4, 7):
        up, down = both(num_stages, hub=False)
        assert sum(up) == sum(down) == 2 * (num_stages - 1) and max(up) <= 2
        up, down = both(num_stages, hub=True)
        assert sum(up) == sum(down) == up[0] + down[0] == 5 * (num_stages - 1)


def test_the_slowest_stage_bounds_a_chain_on_quick_lines() -> None:
    found = bound(specs(0.1, 0.1, 0.5, 0.1), line=1e9)
    assert found.by == "compute"
    assert found.tokens_per_s == pytest.approx(TOKENS / 0.5)
    assert found.link_tokens_per_s == pytest.approx(TOKENS * 1e9 / (2 * ACTIVATION), rel=1e-3)


def test_a_line_that_carries_two_activations_bounds_a_chain_of_quick_stages() -> None:
    found = bound(specs(0.01, 0.01, 0.01, 0.01))
    assert found.by == "link"
    assert found.tokens_per_s == pytest.approx(TOKENS * LINE_BYTES_PER_S / (2 * ACTIVATION), rel=1e-3)
    assert bound(specs(0.01, 0.01)).tokens_per_s == pytest.approx(2 * found.tokens_per_s, rel=1e-3)


def test_a_second_peer_brings_its_processor_and_its_line() -> None:
    one, two = specs(0.1, 0.1, 0.5, 0.1), [*specs(0.1, 0.1, 0.5, 0.1), StageSpec((2, 3), 0.5)]
    assert bound(two, line=1e9).tokens_per_s == pytest.approx(2 * bound(one, line=1e9).tokens_per_s)
    unequal = [*specs(0.1, 0.1, 0.5, 0.1), StageSpec((2, 3), 0.25)]
    assert bound(unequal, line=1e9).tokens_per_s == pytest.approx(3 * bound(one, line=1e9).tokens_per_s)


def test_a_hubs_line_carries_nine_activations_and_its_stages_compute_a_forward_twice() -> None:
    linked = bound(specs(0.01, 0.01, 0.01, 0.01), hub=True)
    assert linked.tokens_per_s == pytest.approx(TOKENS * LINE_BYTES_PER_S / (9 * ACTIVATION), rel=1e-3)
    assert bound(specs(0.3, 0.3), hub=True, line=0.0).tokens_per_s == pytest.approx(TOKENS / 0.4)
    own = bound(specs(0.6, 0.3), hub=True, line=0.0)
    assert own.tokens_per_s == pytest.approx(TOKENS / 0.6), "the hub keeps what its own stage has computed"


def test_a_rate_is_between_the_first_and_the_last_in_the_window() -> None:
    times = [at / 10 for at in range(100)]
    assert pipeline_bound.rate_of(times, began=2.0, ended=6.05) == pytest.approx(10.0)
    assert pipeline_bound.rate_of(times, began=20.0, ended=30.0) == 0.0
    assert pipeline_bound.rate_of([1.0], began=0.0, ended=2.0) == 0.0


def test_the_hub_is_given_its_best_number_in_flight() -> None:
    per_s = {4: 4, 8: 9, 16: 7}
    lines = [
        {"at": 10 * index + at / rate, "credit": number}
        for index, (number, rate) in enumerate(per_s.items()) for at in range(10 * rate)
    ]
    assert pipeline_bound.best_in_flight(lines) == (8, pytest.approx(9.0, rel=0.05))
    assert pipeline_bound.best_in_flight([]) == (0, 0.0)


def test_a_burst_does_not_make_a_hub_quicker_than_it_is() -> None:
    bursts = [{"at": 10.0 * burst + 0.1 * number, "credit": 6} for burst in range(10) for number in range(6)]
    assert pipeline_bound.best_in_flight(bursts)[1] == pytest.approx(0.6, rel=0.1)


# ---- speed ----


def test_the_cases_cover_what_the_issue_asks_for() -> None:
    chain, hub, slow, helped = pipeline_speed.cases(4, 0.1)
    assert [case.hub for case in (chain, hub, slow, helped)] == [False, True, False, False]
    assert chain.specs == hub.specs and [spec.part for spec in chain.specs] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert bound(list(slow.specs), line=1e9).tokens_per_s == pytest.approx(TOKENS / 0.25)
    assert len(helped.specs) == 5
    assert bound(list(helped.specs), line=1e9).tokens_per_s == pytest.approx(2 * TOKENS / 0.25)


def test_the_wide_run_has_a_microbatch_as_the_table_says_and_a_fragment_a_stage() -> None:
    run = pipeline_speed.wide_run(load_run(preset_path("runs/demo.yaml")), 4)
    assert microbatch_sequences(run) * run.train.sequence_length == TOKENS
    assert run.fragments == 4 and run.model.config is not None and run.model.config["n_embd"] == HIDDEN
    assert run.averaging.tokens_per_round == run.train.total_tokens == 10**12


def test_more_hosts_are_like_the_first() -> None:
    topology = load("home-100")
    grown = pipeline_speed.more_hosts(topology, 6)
    assert grown.names == ["a", "b", "c", "d", "e", "f"]
    assert grown.hosts[5].up_bits_per_s == topology.hosts[0].up_bits_per_s
    assert grown.latency_s("a", "f") == topology.latency_s("a", "b")
    assert pipeline_speed.more_hosts(topology, 3).names == ["a", "b", "c"]


def speed_row(case: str, tokens_per_s: float, *, compute: float = 900.0, link: float = 700.0) -> dict[str, Any]:
    figures = {
        "tokens_per_s": tokens_per_s, "bound_tokens_per_s": min(compute, link), "compute_bound_tokens_per_s": compute,
        "link_bound_tokens_per_s": link, "share": tokens_per_s / min(compute, link), "in_flight": 8.0,
        "up_bytes_per_microbatch": 6.5e6, "busiest_up_bytes_per_microbatch": 2.2e6, "cpu_cores": 0.9,
    }
    return {"topology": "home-100", "case": case, "peers": 4, "failures": [], **tables.spreads([figures])}


def test_the_table_says_what_the_chain_makes_of_the_hub_and_that_computing_is_emulated() -> None:
    rows = [speed_row("chain", 630.0), speed_row("hub", 210.0), {
        "topology": "home-100", "case": "chain, one slow stage", "peers": 4, "failures": ["did not finish: x"],
    }]
    text = pipeline_speed.table({"service_ms": 150.0, "hidden": HIDDEN, "rows": rows})
    assert "| home-100 | chain | 4 | 630 | 700 | link | 0.90 | 8 | 6.50 | 2.20 | 0.90 |" in text
    assert "home-100: chain is 3.00 times hub" in text
    assert "| home-100 | chain, one slow stage | 4 | did not finish |" in text
    assert "EMULATED" in text and "two peers on it is" not in text


# ---- the peers ----


def test_a_stages_command_is_the_products_with_other_parts_in_it(tmp_path: Path) -> None:
    setup = Setup(preset_path("runs/demo.yaml"), 2, None, tmp_path, seed=1)
    system = Stages([StageSpec((0, 1), 0.3), StageSpec((1, 4), 0.9)], emulate=True, hub=[2, 4], each_s=5.0)
    argv = system.command(setup, 1, ["10.0.0.1", "10.0.0.2"], ["/ip4/10.0.0.1/tcp/1/p2p/x"])
    split = argv.index("--")
    options = stage_peer.parser().parse_args(argv[2:split])
    assert options.forward_s == pytest.approx(0.1) and options.backward_s == pytest.approx(0.2)
    assert options.emulate and options.hub == [2, 4] and options.each_s == 5.0
    assert argv[-4:] == ["--fragments", "1:4", "--spare-disk", "0"] and "/ip4/10.0.0.1/tcp/1/p2p/x" in argv[split:]
    plain = Stages(system.specs, emulate=False).command(setup, 0, ["10.0.0.1", "10.0.0.2"], [])
    assert "--hub" not in plain and "--emulate" not in plain and "--new-swarm" in plain[plain.index("--"):]


# ---- churn ----


def test_everybody_gets_killed_in_turn_but_for_who_holds_a_stage_alone() -> None:
    parts = [(0, 2), (2, 4), (4, 6), (0, 2), (2, 4)]
    faults = pipeline_churn.kills(parts, seed=1, seconds=300.0, every_s=30.0, down_s=2.0)
    assert faults == pipeline_churn.kills(parts, seed=1, seconds=300.0, every_s=30.0, down_s=2.0)
    assert [fault.at_s for fault in faults] == [15.0 + 30 * index for index in range(10)]
    victims = [fault.numbers[0] for fault in faults]
    assert sorted(victims[:4]) == sorted(victims[4:8]) == [0, 1, 3, 4]
    assert {fault.kind for fault in faults} == {"crash"}
    assert all(fault.ends_s <= 300 for fault in faults)


def test_books_balance_where_nothing_goes_wrong() -> None:
    lives = [
        life("P", [done(2.0, 1, ("P", 0, 1), ("Q", 1, 3)), committed(2.0, "P", 1, 0, 1)]),
        life("Q", [committed(2.1, "P", 1, 1, 3)], number=1),
    ]
    found = pipeline_churn.books(lives, tokens=100, num_fragments=3)
    assert found["done_tokens"] == [100, 100, 100]
    assert found["lost_tokens"] == found["twice_tokens"] == found["gone_tokens"] == [0, 0, 0]


def test_a_gradient_that_nobody_added_up_is_lost_or_gone_with_the_dead() -> None:
    path = ("P", 0, 1), ("Q", 1, 3)
    lines = [done(2.0, 1, *path), committed(2.0, "P", 1, 0, 1), done(40.0, 2, *path), committed(40.0, "P", 2, 0, 1)]
    dead = [life("P", lines), life("Q", [], number=1, ended=41.0)]
    found = pipeline_churn.books(dead, tokens=100, num_fragments=3)
    assert found["lost_tokens"] == [0, 100, 100], "of the first: its holder lived on for 39 s"
    assert found["gone_tokens"] == [0, 100, 100]
    origin_died = [life("P", lines[2:], ended=40.1), life("Q", [], number=1)]
    assert pipeline_churn.books(origin_died, tokens=100, num_fragments=3)["gone_tokens"] == [0, 100, 100]


def test_a_gradient_that_was_added_up_twice_or_without_a_word_is_counted() -> None:
    twice = [
        life("P", [done(2.0, 1, ("P", 0, 1), ("Q", 1, 2)), committed(2.0, "P", 1, 0, 1)]),
        life("Q", [committed(2.1, "P", 1, 1, 2)], number=1),
        life("R", [committed(2.1, "P", 1, 1, 2), committed(3.0, "P", 9, 1, 2)], number=2),
    ]
    assert pipeline_churn.books(twice, tokens=100, num_fragments=2)["twice_tokens"] == [0, 200]


def test_a_reroute_lasts_from_the_death_to_the_answer_of_another() -> None:
    def rerouted(noticed_at: float, at: float, failed: str = "Q") -> tuple[float, dict[str, Any]]:
        return at, {"event": "rerouted", "failed": failed, "noticed_at": noticed_at, "at": at, "asked": "R"}

    lives = [
        life("P", [rerouted(10.3, 11.0), rerouted(10.1, 12.0), rerouted(9.9, 10.5), rerouted(50.0, 51.0, "R")]),
        life("Q", [], number=1, ended=10.0), life("Q", [], number=1, began=12.0),
    ]
    found = pipeline_churn.reroutes(lives)
    assert found["reroutes"] == 3 and found["reroutes_unexplained"] == 1
    assert found["noticed_p50_s"] == pytest.approx(0.1) and found["reroute_p50_s"] == pytest.approx(1.0)
    assert found["reroute_p95_s"] == pytest.approx(1.9)
    assert pipeline_churn.reroutes(lives[1:])["reroute_p95_s"] is None


def test_capacity_is_that_of_the_scarcest_stage() -> None:
    parts = [(0, 1), (1, 2), (1, 2)]
    lives = [
        life("P", [], number=0), life("Q", [], number=1, ended=15.0), life("R", [], number=2),
        life("Q", [], number=1, began=18.0),  # ready at 19
    ]
    assert pipeline_churn.capacity(lives, parts, 10.0, 20.0) == pytest.approx((5 + 0.5 * 4 + 1) / 10)


def test_the_churn_table_shows_one_number_where_all_fragments_have_it() -> None:
    row = {
        "topology": "home-100", "peers": 6, "kills": 9, "every_s": 30.0, "start": "fork", "calm_tokens_per_s": 3000.0,
        "stormy_tokens_per_s": 2700.0, "kept": 0.9, "capacity_kept": 0.8, "reroutes": 7, "reroutes_unexplained": 1,
        "noticed_p50_s": 0.1, "noticed_p95_s": 0.2, "reroute_p50_s": 0.9, "reroute_p95_s": None,
        "lost_tokens": [0, 0], "twice_tokens": [0, 0], "gone_tokens": [256, 512], "ended_by_themselves": ["peer 1: x"],
    }
    result = {"parts": [[0, 2], [2, 4]], "service_ms": 150.0, "calm_s": 120.0, "seconds": 300.0, "rows": [row]}
    text = pipeline.table({"churn": result})
    assert "| 0.90 | 0.80 | 7 | 0.10 / 0.20 | 0.90 / - | 0 | 0 | 256, 512 |" in text
    assert "peer 1: x" in text and "1 more reroutes away from peers that were not dead" in text and "PADDED" in text
    assert "forked again 0.1 s later" in text and "--restart" in text
    by_hand = pipeline.table({"churn": {**result, "rows": [{**row, "start": "load"}]}})
    assert "started again 2 s later" in by_hand and "SLEEPS for 4.5 s" in by_hand


# ---- the program ----


def test_only_the_parts_that_are_asked_for_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = bench.make_parser().parse_args(["pipeline", "--part", "loss", "--quick"])
    monkeypatch.setattr(pipeline.PARTS["loss"], "measure", lambda options: {"quick": options.quick})
    assert pipeline.measure(asked) == {"loss": {"quick": True}}
    assert bench.make_parser().parse_args(["pipeline"]).part == ["speed", "churn", "loss"]


def test_a_machine_without_labs_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanlab.requirements.missing", lambda: ["root"])
    asked = bench.make_parser().parse_args(["pipeline", "--part", "speed", "--quick"])
    with pytest.raises(ConfigError, match="WAN lab"):
        pipeline.measure(asked)
    assert isinstance(asked, argparse.Namespace)
