"""The simulation of placement: its bookkeeping, the rivals' rules as described, and that ours keeps a swarm whole."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from swarm.pipeline.snapshot import NO_STAGE, Fragments, Holder, Snapshot, Stage

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench
from benches import placement
from benches.placement_rules import RULES, FixedStages, Ours, Petals
from benches.placement_swarm import CLASSES, Swarm, Trace, figures

SHORT = Trace(12, 3600.0, hours=0.5, warm_hours=0.25)
EIGHT = Fragments((1,) * 8, (1.0,) * 8)
THIRTY_TWO = Fragments((1,) * 32, (1.0,) * 32)


def holder(name: str, stage: Stage, *, speed: float = 1.0, room: int | None = None) -> Holder:
    return Holder(name, stage, stage, room or stage[1] - stage[0], speed)


# ---- figures ----


def test_values_count_until_the_next_one_and_within_the_window() -> None:
    series = [(0.0, 0.0, 2.0), (10.0, 1.0, 2.0), (30.0, 2.0, 2.0), (50.0, 0.0, 2.0)]
    found = figures(series, begin_s=20.0, end_s=60.0)  # 10 s of a half, 20 s of all, 10 s of a gap
    assert found == pytest.approx({"efficiency": 0.625, "worst_decile": 0.0, "gap": 0.25})


def test_a_swarm_that_nobody_leaves_has_one_value() -> None:
    assert figures([(0.0, 3.0, 4.0)], begin_s=0.0, end_s=9.0) == {"efficiency": 0.75, "worst_decile": 0.75, "gap": 0.0}


# ---- the simulation ----


@pytest.mark.parametrize("name", RULES)
def test_a_run_is_deterministic_and_its_figures_are_shares(name: str) -> None:
    found = Swarm(RULES[name], SHORT, seed=1).run()
    assert found == Swarm(RULES[name], SHORT, seed=1).run()
    assert all(0 <= found[key] <= 1 for key in ("worst_decile", "efficiency", "gap"))
    assert name != "ours" or found["efficiency"] > 0.3  # who does not heal may have a gap all the time


def test_all_rules_see_the_same_lives() -> None:
    bounds = []
    for rule in RULES.values():
        swarm = Swarm(rule, SHORT, seed=3)
        swarm.run()
        bounds.append({(bound) for _, _, bound in swarm.series})
    shortest = min(bounds, key=len)
    assert len(shortest) > 5
    assert all(len(shortest & bound) >= len(shortest) - 1 for bound in bounds)


@pytest.mark.parametrize("name", RULES)
def test_peers_stay_within_their_room_and_serve_what_they_have(name: str) -> None:
    swarm = Swarm(RULES[name], SHORT, seed=0)
    swarm.run()
    assert len(swarm.peers) == SHORT.num_peers
    for peer in swarm.peers.values():
        assert peer.serving[1] - peer.serving[0] <= peer.room and peer.target[1] - peer.target[0] <= peer.room
        assert set(range(*peer.serving)) <= peer.have
        assert any(peer.room == room and 0.7 * speed <= peer.speed <= 1.3 * speed for room, speed in CLASSES)


def test_who_breaks_serves_complete_stages_only() -> None:
    swarm = Swarm(RULES["petals"], SHORT, seed=2)
    swarm.run()
    assert all(peer.serving in (NO_STAGE, peer.target) for peer in swarm.peers.values())
    assert swarm.loads > 0


def test_ours_never_goes_below_what_a_move_takes_away() -> None:
    """In a swarm that nobody leaves, moves are make before break: there is never a gap."""
    swarm = Swarm(RULES["ours"], Trace(14, float("inf"), hours=0.5, warm_hours=0.0), seed=0)
    found = swarm.run()
    flows = [rate for _, rate, _ in swarm.series]
    assert found["gap"] == 0.0 and min(flows) > 0
    assert flows[-1] >= 0.9 * flows[0]


def test_ours_keeps_small_swarms_together_better_than_the_others() -> None:
    trace = Trace(14, 3600.0, hours=1.5, warm_hours=0.25)
    mean = {
        name: np.mean([Swarm(RULES[name], trace, seed=seed).run()["efficiency"] for seed in range(2)])
        for name in ("ours", "never-grow", "swarm")
    }
    assert mean["ours"] > mean["never-grow"] > mean["swarm"]


def test_noise_of_measured_speeds_moves_nobody() -> None:
    found = Swarm(RULES["ours"], Trace(12, float("inf"), hours=0.5, warm_hours=0.5, noise=0.2), seed=0).run()
    assert found["moves_per_h"] == 0


# ---- the rivals' rules ----


def test_petals_newcomer_takes_the_poorest_window() -> None:
    known = Snapshot([holder("a", (0, 4), speed=4), holder("b", (4, 6), speed=9)], EIGHT)
    assert Petals().join(known, Holder("new", NO_STAGE, NO_STAGE, 2, 1.0)) == (6, 8)


def test_petals_peer_moves_when_that_would_help_much_and_not_when_it_serves_alone() -> None:
    rng = np.random.default_rng(0)
    crowd = [holder(f"c{i}", (0, 4), speed=2) for i in range(4)]
    known = Snapshot([*crowd, holder("lean", (4, 8))], EIGHT)
    assert Petals().elsewhere(known, crowd[0], rng) == (4, 8)
    assert Petals().elsewhere(known, holder("lean", (4, 8)), rng) is None
    halves = Snapshot([holder(f"{side}{i}", (side, side + 4)) for side in (0, 4) for i in range(3)], EIGHT)
    assert Petals().elsewhere(halves, holder("00", (0, 4)), rng) is None


def test_swarm_newcomer_takes_a_whole_stage_or_none() -> None:
    rule = FixedStages()
    known = Snapshot([holder(str(i), (4 * i, 4 * i + 4)) for i in range(8) if i != 5], THIRTY_TWO)
    assert rule.join(known, Holder("new", NO_STAGE, NO_STAGE, 16, 1.0)) == (20, 24)
    assert rule.join(known, Holder("laptop", NO_STAGE, NO_STAGE, 2, 1.0)) == NO_STAGE


def test_swarm_moves_the_slowest_of_the_richest_stage_to_the_poorest() -> None:
    holders = [holder(str(i), (4 * i, 4 * i + 4), speed=3) for i in range(8)]
    holders += [holder("slow", (8, 12), speed=1), replace(holders[7], speed=0.5)]
    known, rng = Snapshot([*holders[:7], *holders[8:]], THIRTY_TWO), np.random.default_rng(0)
    slow = FixedStages().step(known, holders[8], True, now_s=30.0, load_s=1.0, rng=rng)
    fast = FixedStages().step(known, holders[2], True, now_s=30.0, load_s=1.0, rng=rng)
    assert slow.target == (28, 32) and fast.target is None and slow.again_s == 270.0


def test_ours_is_the_products_own() -> None:
    known = Snapshot([holder("a", (0, 4)), holder("b", (0, 4))], EIGHT)
    step = Ours().step(known, holder("a", (0, 4)), None, now_s=5.0, load_s=1.0, rng=np.random.default_rng(0))
    assert step.claim is not None and step.claim.heals and step.claim.stage == (4, 8) and step.target is None


# ---- the command ----


def test_the_bench_writes_figures_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    words = ["--case", "churn-16", "--rule", "ours", "never", "--quick", "--hours", "0.2", "--out", str(out)]
    assert bench.main(["placement", *words]) == 0
    document = json.loads(out.read_text())
    rows = document["result"]["rows"]
    assert [row["rule"] for row in rows] == ["ours", "never move"]
    assert 0 < rows[0]["figures"]["efficiency"]["median"] <= 1 and rows[0]["trace"]["hours"] == 0.2
    assert document["result"]["decision_ms"]["16"]["each"] > 0
    assert "| churn-16 | never move |" in capsys.readouterr().out


def test_quick_is_small_and_infinity_is_nothing_in_json() -> None:
    options = argparse.Namespace(quick=True, hours=None, peers=None)
    assert placement.trace_of("many", options).num_peers == 200
    assert placement.shown(placement.trace_of("steady-16", options))["lifetime_s"] is None
    full = argparse.Namespace(quick=False, hours=2.0, peers=5)
    assert placement.trace_of("churn-48", full) == Trace(5, 7200.0, hours=2.0)
