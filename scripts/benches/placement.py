"""Which fragments peers hold, by rule: what a swarm gets out of its peers' compute while they come and go.

A simulation (placement_swarm.py) that asks the product's own functions. Efficiency is the optimal flow through the
stages served at a moment over what all living peers' compute could do if it were evenly spread (those that load, and
those that a rule shuts out, count): the linear program's optimum, by its exact dual, at every moment. A gap is time in
which some fragment is served by nobody. Lives and classes are the same for all rules of a seed.

    churn-16    16 peers that live 1 h on average
    churn-48    48 peers, 2 h
    steady-16   16 peers that stay, measured speeds 20 % off, another way every minute: moves are needless here
    steady-48   48 of them
    many        10,000 peers, 2 h: that it works there, and what a decision costs
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from benches import table as tables
from benches.placement_rules import RULES
from benches.placement_swarm import Swarm, Trace
from swarm.pipeline.placement import choose_stage
from swarm.pipeline.snapshot import Snapshot

NAME = "placement"
HELP = "efficiency, gaps and moves of our rule of placement, Petals', SWARM's and none (simulated)"

FOREVER_S = float("inf")
CASES = {
    "churn-16": Trace(16, 3600.0, hours=8.0),
    "churn-48": Trace(48, 7200.0, hours=5.0),
    "steady-16": Trace(16, FOREVER_S, hours=12.0, noise=0.2),
    "steady-48": Trace(48, FOREVER_S, hours=4.0, noise=0.2),
    "many": Trace(10_000, 7200.0, hours=0.2, warm_hours=0.1, refresh_s=10.0, sample_s=30.0),
}
ONLY_OURS = ("many",)
"""Petals' rule simulates everybody for each decision: hours at 10,000 peers"""
QUICK_HOURS = 0.5
TIMED = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES, help="what happens (everything)")
    parser.add_argument("--rule", nargs="+", default=list(RULES), choices=RULES, help="who decides (all)")
    parser.add_argument("--seeds", type=int, default=3, help="how often, with other lives and classes (3; 1 of `many`)")
    parser.add_argument("--hours", type=float, metavar="H", help="that are simulated and measured, after a warm-up")
    parser.add_argument("--peers", type=int, metavar="N", help="instead of the case's number")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for case in options.case:
        trace = trace_of(case, options)
        seeds = 1 if options.quick or case in ONLY_OURS else options.seeds
        for rule in options.rule:
            if case in ONLY_OURS and rule != "ours":
                continue
            began = time.monotonic()
            runs = [Swarm(RULES[rule], trace, seed=seed).run() for seed in range(seeds)]
            row = {"case": case, "rule": RULES[rule].name, "trace": shown(trace), "figures": tables.spreads(runs)}
            rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
            print(line(row), flush=True)
    return {"rows": rows, "decision_ms": {
        str(count): decision_ms(count) for count in sorted({trace_of(case, options).num_peers for case in options.case})
    }}


def trace_of(case: str, options: argparse.Namespace) -> Trace:
    trace = CASES[case]
    if options.quick:
        trace = replace(trace, hours=QUICK_HOURS, warm_hours=0.25, num_peers=min(trace.num_peers, 200))
    if options.hours:
        trace = replace(trace, hours=options.hours)
    return replace(trace, num_peers=options.peers) if options.peers else trace


def shown(trace: Trace) -> dict[str, Any]:
    """JSON knows no infinity."""
    return asdict(trace) | {"lifetime_s": trace.lifetime_s if np.isfinite(trace.lifetime_s) else None}


def decision_ms(num_peers: int) -> dict[str, float]:
    """Milliseconds of processor time: to make a snapshot of so many peers, and to find a place for one of them."""
    founders = Swarm(RULES["ours"], Trace(num_peers, FOREVER_S, hours=1.0), seed=0)
    founders.found()
    entries = [peer.entry() for peer in founders.peers.values()]
    began = time.process_time()
    snapshot = Snapshot(entries, founders.fragments)
    made = time.process_time()
    choose_stage(snapshot, entries[0])  # the first one also finds the prices
    times = [made]
    for entry in entries[1:1 + TIMED]:
        choose_stage(snapshot, entry)
        times.append(time.process_time())
    each = [later - earlier for earlier, later in zip(times[1:], times[2:], strict=False)]
    return {
        "snapshot": round(1e3 * (made - began), 3), "first": round(1e3 * (times[1] - made), 3),
        "each": round(1e3 * statistics.median(each), 3),
    }


def line(row: dict[str, Any]) -> str:
    figures = row["figures"]
    return (
        f"{row['case']}, {row['rule']}: efficiency {tables.shown(figures['efficiency'], digits=3)}, "
        f"gap {tables.shown(figures['gap'], scale=100)} %"
    )


def table(result: dict[str, Any]) -> str:
    header = ["case", "rule", "efficiency", "worst decile", "gap, %", "moves/h", "moves/peer-day", "loads/peer-h"]
    rows = []
    for row in result["rows"]:
        figures = row["figures"]
        rows.append([
            row["case"], row["rule"], tables.shown(figures["efficiency"], digits=3),
            tables.shown(figures["worst_decile"], digits=3), tables.shown(figures["gap"], scale=100),
            tables.shown(figures["moves_per_h"], digits=1), tables.shown(figures["moves_per_peer_day"]),
            tables.shown(figures["loads_per_peer_h"], digits=1),
        ])
    costs = [
        f"{count} peers: a snapshot {ms['snapshot']:.1f} ms, then a peer's place {ms['each']:.1f} ms"
        for count, ms in result["decision_ms"].items()
    ]
    legend = "efficiency: optimal flow over all compute; loads: of fragments"
    return "\n".join([tables.markdown(header, rows), "", legend, *costs])
