"""Tokens per second of a model in four stages over home lines, against a hub and against what would be possible.

One peer a stage, each in a machine of the lab, and no two cores could run four GPUs: computing is emulated by sleeps
(systems/emulated.py), all else is the product. A microbatch has the bytes of 256 tokens of GPT-J-6B (4096 wide) and the
default service time is that of a quarter of it on a card of 15 TFLOPS; it is sent as 1024 tokens of a model 1024 wide.

The bound is what the slowest stage or the busiest line would allow alone: min(compute, link).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from typing import Any

from wanlab.topology import Topology, load

from benches import options as common
from benches import table as tables
from benches.labpeer import DidNotFinish, Peer
from benches.labrun import LabSwarm
from benches.pipeline_bound import best_in_flight, bound, rate_of
from benches.systems import Setup
from benches.systems.stages import Stages, StageSpec
from benches.usage import Snapshot, usage
from swarm.config import RunConfig, canonical_json, run_from_dict
from swarm.train.serving import microbatch_sequences

HIDDEN = 1024
NUM_STAGES = 4
SERVICE_S = 0.15
SLOW_STAGE, SLOWER = 2, 2.5
"""which stage is the slow one where there is one, and how many times the others' time it takes"""
HUB_IN_FLIGHT, HUB_EACH_S = (6, 12, 24), 40.0
"""so many microbatches under way, each for so long"""
CASES = ("chain", "hub", "slow", "helped")
FIRST_S, SETTLE_S = 120.0, 30.0
QUICK_STAGES, QUICK_S = 2, 6.0


@dataclass(frozen=True)
class Case:
    name: str
    specs: tuple[StageSpec, ...]
    hub: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology", nargs="+", default=["yardstick", "home-100"], metavar="NAME",
        help="speed: of the WAN lab (yardstick home-100)",
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="speed: of each window (30)")
    parser.add_argument("--repeats", type=int, default=1, help="speed: how often (1)")
    parser.add_argument(
        "--case", nargs="+", default=list(CASES), choices=CASES, help="speed: which rows of the table (all)"
    )
    parser.add_argument(
        "--service-ms", type=float, default=1e3 * SERVICE_S, metavar="MS",
        help=f"speed: computing of a stage for a microbatch, there and back ({1e3 * SERVICE_S:.0f})",
    )


def cases(num_stages: int, service_s: float) -> list[Case]:
    """As `CASES` names them."""
    even = tuple(StageSpec((index, index + 1), service_s) for index in range(num_stages))
    slow = [
        replace(spec, service_s=SLOWER * service_s) if index == SLOW_STAGE else spec for index, spec in enumerate(even)
    ]
    return [
        Case("chain", even), Case("hub", even, hub=True), Case("chain, one slow stage", tuple(slow)),
        Case("chain, two peers on it", (*slow, slow[min(SLOW_STAGE, num_stages - 1)])),
    ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    num_stages, wanted = NUM_STAGES, options.case
    topologies, seconds, repeats = options.topology, options.seconds, options.repeats
    if options.quick:
        num_stages, topologies, seconds, repeats, wanted = QUICK_STAGES, topologies[:1], QUICK_S, 1, CASES[:2]
    named = zip(CASES, cases(num_stages, options.service_ms / 1e3), strict=True)
    chosen = [case for name, case in named if name in wanted]
    run = wide_run(common.run_of(options), num_stages)
    rows = []
    for name in topologies:
        for case in chosen:
            topology = more_hosts(load(name), len(case.specs))
            good, failures = [], []
            for repeat in range(repeats):
                try:
                    good.append(one(topology, run, case, seed=run.seed + repeat, seconds=seconds, quick=options.quick))
                except DidNotFinish as error:
                    failures.append(error.said)
                    print(f"  {name}, {case.name}: {error.said}", flush=True)
            rows.append({
                "topology": name, "case": case.name, "stages": num_stages, "peers": len(case.specs),
                "failures": failures,
                **tables.spreads(good),
            })
            if good:
                print(f"  {name}, {case.name}: " + ", ".join(
                    f"{key} {good[-1][key]:.4g}" for key in ("tokens_per_s", "share", "cpu_cores")
                ), flush=True)
    return {"service_ms": options.service_ms, "hidden": HIDDEN, "rows": rows}


def one(
    topology: Topology, run: RunConfig, case: Case, *, seed: int, seconds: float, quick: bool
) -> dict[str, float]:
    tokens = microbatch_sequences(run) * run.train.sequence_length
    in_flight = HUB_IN_FLIGHT[:1] if quick else HUB_IN_FLIGHT
    settle_s, each_s = (SETTLE_S / 5, seconds + SETTLE_S / 5) if quick else (SETTLE_S, HUB_EACH_S)
    system = Stages(case.specs, emulate=True, hub=in_flight if case.hub else (), each_s=each_s)
    with common.workspace() as folder, common.lab(topology) as lab:
        setup = Setup(common.write(run, folder / "bench.yaml"), len(case.specs), None, folder / "swarm", seed)
        with LabSwarm(lab, system, setup) as swarm:
            swarm.start_all()
            origin = swarm.peers[0]
            swarm.wait(lambda: bool(origin.of("done")), timeout_s=FIRST_S, what="the first microbatch")
            swarm.sleep(settle_s if not case.hub else each_s / 3)
            before, before_done = swarm.snapshot(), len(origin.of("done"))
            swarm.sleep(len(in_flight) * each_s - each_s / 3 if case.hub else seconds)
            after, after_done = swarm.snapshot(), len(origin.of("done"))
    return figures(origin, case, before, after, num_done=after_done - before_done, tokens=tokens, topology=topology)


def figures(
    origin: Peer, case: Case, before: Snapshot, after: Snapshot, *, num_done: int, tokens: int, topology: Topology
) -> dict[str, float]:
    """Of one window. `num_done`: microbatches between the snapshots."""
    lines = [line for _, line in origin.of("done")]
    in_window = [line for line in lines if before.at <= line["at"] <= after.at]
    if case.hub:
        credit, per_s = best_in_flight(lines)
    else:
        per_s = rate_of([line["at"] for line in lines], began=before.at, ended=after.at)
        credit = sorted(line["credit"] for line in in_window)[len(in_window) // 2] if in_window else 0
    if num_done < 2 or per_s == 0.0:
        raise DidNotFinish(f"{num_done} microbatches in {after.at - before.at:.0f} s")
    host = topology.hosts[0]
    best = bound(
        case.specs, tokens=tokens, hidden=HIDDEN, up_bytes_per_s=host.up_bits_per_s / 8,
        down_bytes_per_s=host.down_bits_per_s / 8, hub=case.hub,
    )
    up = [after.hosts[name]["up_bytes"] - before.hosts[name]["up_bytes"] for name in after.hosts]
    return {
        "tokens_per_s": tokens * per_s, "share": tokens * per_s / best.tokens_per_s, **best.figures(),
        "in_flight": float(credit), "up_bytes_per_microbatch": sum(up) / num_done,
        "busiest_up_bytes_per_microbatch": max(up) / num_done, "microbatches": float(num_done),
        "origin_up_bytes_per_microbatch": up[0] / num_done, **usage(before, after),
    }


def wide_run(run: RunConfig, num_stages: int) -> RunConfig:
    """The run with a model as wide as the emulated one's activations, and thin elsewhere, since nobody computes it. No
    rounds: they are measured elsewhere (bench.py wan)."""
    document = json.loads(canonical_json(run))
    document["model"]["config"] |= {
        "n_layer": num_stages, "n_embd": HIDDEN, "n_head": 8, "n_inner": 16, "rotary_dim": 16, "n_positions": 256,
    }
    document |= {"fragments": num_stages, "name": "stages", "initial_digests": []}
    document["train"] |= {"sequence_length": 256, "batch_sequences": 16, "total_tokens": common.ENDLESS_TOKENS}
    document["averaging"] |= {"tokens_per_round": common.ENDLESS_TOKENS, "max_round_s": 86_400.0}
    return run_from_dict(document, origin="the benchmark's run")


def more_hosts(topology: Topology, number: int) -> Topology:
    """With hosts like the first one, until there are so many."""
    names = [name for name in "abcdefghijklmnop" if name not in topology.names]
    new = [replace(topology.hosts[0], name=name) for name in names[:max(0, number - len(topology.hosts))]]
    return replace(topology, hosts=(*topology.hosts, *new)[:number])


def table(result: dict[str, Any]) -> str:
    header = [
        "topology", "", "peers", "tokens/s", "bound", "by", "share of the bound", "in flight",
        "sent a microbatch, MB: all", "busiest", "peers' CPU, cores",
    ]
    rows = []
    for row in result["rows"]:
        place = [row["topology"], row["case"], row["peers"]]
        if "tokens_per_s" not in row:
            rows.append([*place, "did not finish", *[""] * 7])
            continue
        by_compute = row["compute_bound_tokens_per_s"]["median"] <= row["link_bound_tokens_per_s"]["median"]
        rows.append([
            *place, tables.shown(row["tokens_per_s"], digits=0), tables.shown(row["bound_tokens_per_s"], digits=0),
            "compute" if by_compute else "link", tables.shown(row["share"]), tables.shown(row["in_flight"], digits=0),
            tables.shown(row["up_bytes_per_microbatch"], scale=1e-6),
            tables.shown(row["busiest_up_bytes_per_microbatch"], scale=1e-6), tables.shown(row["cpu_cores"]),
        ])
    return "\n".join([tables.markdown(header, rows), "", *ratios(result["rows"]), *notes(result)])


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """What the chain makes of it against the hub, and a second peer on the slow stage against one."""
    found = []
    speeds = {(row["topology"], row["case"]): row["tokens_per_s"]["median"] for row in rows if "tokens_per_s" in row}
    for topology in dict.fromkeys(row["topology"] for row in rows):
        for faster, slower in (("chain", "hub"), ("chain, two peers on it", "chain, one slow stage")):
            if (topology, faster) in speeds and (topology, slower) in speeds:
                times = speeds[topology, faster] / speeds[topology, slower]
                found.append(f"{topology}: {faster} is {times:.2f} times {slower}")
    return found


def notes(result: dict[str, Any]) -> list[str]:
    return [
        f"Computing is EMULATED by sleeps, {result['service_ms']:.0f} ms a microbatch and stage ({SLOWER} times that in"
        f" the slow one), since one machine runs all peers; an activation is 1024 x {result['hidden']} values in int8.",
        "hub: the best of several numbers of microbatches in flight; its stages compute the forward twice.",
    ]
