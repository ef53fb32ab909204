"""What is left of a pipeline's speed and work while its peers are killed: three stages with two holders each.

A calm window first, then one in which a peer is killed (SIGKILL) every half a minute and comes back. Peers
compute for real and then sleep until a set time is over (systems/emulated.py), so that six fit on one machine. The
books are made of what each process told of each microbatch, fragment by fragment:

    lost             done, says its origin, but whoever was to add up its gradient has not, though it lived on
    counted twice    added up more than once
    gone             whoever was to add it up, or the origin that was to say so, was killed at that moment
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from wanlab.topology import load

from benches import options as common
from benches import table as tables
from benches.churn import are_back, endure
from benches.faults import Fault, Mischief
from benches.labpeer import DidNotFinish, Peer
from benches.labrun import LabSwarm
from benches.pipeline_speed import more_hosts
from benches.systems import Setup, stage_peer
from benches.systems.stages import Stages, StageSpec
from benches.warm import LOADING_S, launcher
from swarm.config import RunConfig, canonical_json, run_from_dict
from swarm.restart import PAUSE_S
from swarm.train.serving import microbatch_sequences

PARTS = ((0, 2), (2, 4), (4, 6))
NUM_HOLDERS = 2
SERVICE_S = 0.15
STARTS = {"fork": (PAUSE_S, 0.0), "load": (2.0, LOADING_S)}
"""how a killed peer comes back: forked again by a process that has the libraries, as with `--restart`, or started by
hand. Seconds until then, and of loading libraries"""
MOMENT_S = 10.0
"""before a death a microbatch may be done and yet not be settled: verdicts are tried again (origin.py)"""
BLAMED_S = 60.0
"""a failure is laid to a death that was so long ago, at most"""
FIRST_S, SETTLE_S, RECOVER_S = 120.0, 15.0, 10.0
QUICK_PARTS, QUICK_S, QUICK_EVERY_S = ((0, 3), (3, 6), (3, 6)), 10.0, 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--churn-topology", default="home-100", metavar="NAME", help="churn: of the WAN lab (home-100)")
    parser.add_argument("--churn-seconds", type=float, default=300.0, metavar="S", help="churn: of the kills (300)")
    parser.add_argument("--calm-seconds", type=float, default=120.0, metavar="S", help="churn: of the calm one (120)")
    parser.add_argument("--every", type=float, default=30.0, metavar="S", help="churn: between two kills (30)")
    parser.add_argument(
        "--start", choices=STARTS, default="fork",
        help="churn: how the killed come back: forked again, as with --restart, or started anew (fork)",
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    parts: Sequence[tuple[int, int]] = PARTS * NUM_HOLDERS
    calm_s, seconds, every_s = options.calm_seconds, options.churn_seconds, options.every
    if options.quick:
        parts, calm_s, seconds, every_s = QUICK_PARTS, QUICK_S, QUICK_S, QUICK_EVERY_S
    run = deeper_run(common.run_of(options), num_fragments=parts[-1][1])
    topology = more_hosts(load(options.churn_topology), len(parts))
    specs = [StageSpec(part, SERVICE_S) for part in parts]
    down_s, loading_s = STARTS[options.start]
    faults = kills(parts, seed=run.seed, seconds=seconds, every_s=every_s, down_s=down_s)
    with common.workspace() as folder, common.lab(topology) as lab:
        setup = Setup(common.write(run, folder / "bench.yaml"), len(parts), None, folder / "swarm", run.seed)
        launch = launcher(stage_peer.main, loading_s=loading_s)
        with LabSwarm(lab, Stages(specs, emulate=False), setup, launch=launch) as swarm:
            settle_s = SETTLE_S / 5 if options.quick else SETTLE_S
            found = live(swarm, faults, settle_s=settle_s, calm_s=calm_s, seconds=seconds)
            lives = list(swarm.lives)
    tokens = microbatch_sequences(run) * run.train.sequence_length
    calm, stormy = (rate(lives, began, ended) * tokens for began, ended in (found["calm"], found["stormy"]))
    row = {
        "topology": options.churn_topology, "peers": len(parts), "kills": len(faults), "every_s": every_s,
        "start": options.start,
        "failures": [], "ended_by_themselves": found["badly"], "calm_tokens_per_s": calm, "stormy_tokens_per_s": stormy,
        "kept": stormy / calm if calm else 0.0, "capacity_kept": capacity(lives, parts, *found["stormy"]),
        **reroutes(lives), **books(lives, tokens=tokens, num_fragments=run.fragments),
    }
    return {
        "parts": [list(part) for part in parts], "service_ms": 1e3 * SERVICE_S, "calm_s": calm_s, "seconds": seconds,
        "rows": [row],
    }


def live(
    swarm: LabSwarm, faults: list[Fault], *, settle_s: float, calm_s: float, seconds: float
) -> dict[str, Any]:
    """When the windows were, and what was said by peers that ended by themselves."""
    swarm.start_all()
    swarm.wait(lambda: bool(done(swarm.lives)), timeout_s=FIRST_S, what="the first microbatch")
    swarm.sleep(settle_s)
    calm = time.monotonic()
    swarm.sleep(calm_s)
    mischief = Mischief(swarm, faults)
    badly = endure(swarm, mischief, lambda: time.monotonic() >= mischief.began + seconds)
    over = time.monotonic()
    badly += endure(swarm, mischief, lambda: time.monotonic() >= over + RECOVER_S and are_back(swarm))
    swarm.finish()
    if not done(swarm.lives):
        raise DidNotFinish("no microbatch was done")
    return {"calm": (calm, mischief.began), "stormy": (mischief.began, over), "badly": badly}


def kills(
    parts: Sequence[tuple[int, int]], *, seed: int, seconds: float, every_s: float, down_s: float
) -> list[Fault]:
    """One every `every_s`, in a seeded order in which all get their turn, but for those that hold a stage alone."""
    several = Counter(parts)
    dice, order, found = random.Random(seed), list[int](), list[Fault]()
    at = every_s / 2
    while at + down_s < seconds:
        if not order:
            order = [number for number, part in enumerate(parts) if several[part] > 1]
            dice.shuffle(order)
        found.append(Fault(at, "crash", (order.pop(),), down_s))
        at += every_s
    return found


def done(lives: Sequence[Peer]) -> list[dict[str, Any]]:
    """What origins said of microbatches, each with the origin's id."""
    found = []
    for life in lives:
        origin = identity(life)
        found += [{**line, "origin": origin, "life": life} for _, line in life.of("done")]
    return found


def identity(life: Peer) -> str:
    return str(life.last("ready", "peer_id", ""))


def rate(lives: Sequence[Peer], began: float, ended: float) -> float:
    """Microbatches a second."""
    return sum(began <= line["at"] < ended for line in done(lives)) / (ended - began)


def capacity(lives: Sequence[Peer], parts: Sequence[tuple[int, int]], began: float, ended: float) -> float:
    """Of the scarcest stage's holders that were there, the mean share over the window: what killing leaves of a swarm
    that loses nothing else. A process is there from its "ready" to its death."""
    there = [(life.number, life.of("ready")[0][0], life.ended or ended) for life in lives if life.is_ready()]
    edges = sorted({began, ended, *(t for _, a, b in there for t in (a, b) if began < t < ended)})
    whole = Counter(parts)
    total = 0.0
    for a, b in zip(edges, edges[1:], strict=False):
        now = Counter(parts[number] for number, since, until in there if since <= a and b <= until)
        total += (b - a) * min(now[part] / whole[part] for part in whole)
    return total / (ended - began)


def reroutes(lives: Sequence[Peer]) -> dict[str, Any]:
    """Seconds from a death to the moment when others noticed, and to the answer of whoever was asked instead."""
    deaths = [(identity(life), life.ended) for life in lives if life.ended is not None]
    noticed, answered, unexplained = [], [], 0
    for life in lives:
        for _, line in life.of("rerouted"):
            before = [at for who, at in deaths if who == line["failed"] and line["noticed_at"] - BLAMED_S < at]
            before = [at for at in before if at <= line["noticed_at"] + 1.0]  # we write a death down a moment after it
            if not before:
                unexplained += 1
                continue
            noticed.append(max(0.0, line["noticed_at"] - max(before)))
            answered.append(max(0.0, line["at"] - max(before)))
    return {
        "reroutes": len(answered), "reroutes_unexplained": unexplained,
        **{f"noticed_p{p}_s": percentile(noticed, p) for p in (50, 95)},
        **{f"reroute_p{p}_s": percentile(answered, p) for p in (50, 95)},
    }


def percentile(values: Sequence[float], percent: int) -> float | None:
    if not values:
        return None
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def books(lives: Sequence[Peer], *, tokens: int, num_fragments: int) -> dict[str, Any]:
    """Tokens of each fragment, by what became of their gradients. `tokens`: of a microbatch."""
    added = Counter(
        (line["origin"], line["number"], fragment)
        for life in lives for _, line in life.of("committed") for fragment in range(line["start"], line["end"])
    )
    found = {name: [0] * num_fragments for name in ("done", "lost", "twice", "gone")}
    known = set()
    lives_of = defaultdict[str, list[Peer]](list)
    for life in lives:
        lives_of[identity(life)].append(life)
    for line in done(lives):
        origin_died = dies_after(line["life"], line["at"])
        for peer_id, start, end in line["path"]:
            holder_died = any(dies_after(life, line["at"]) for life in lives_of[peer_id])
            for fragment in range(start, end):
                key = line["origin"], line["number"], fragment
                known.add(key)
                found["done"][fragment] += tokens
                if added[key] == 0:
                    found["gone" if origin_died or holder_died else "lost"][fragment] += tokens
                found["twice"][fragment] += tokens * max(0, added[key] - 1)
    for _, _, fragment in (key for key in added if key not in known):  # nobody said that it was done
        found["twice"][fragment] += tokens
    return {f"{name}_tokens": values for name, values in found.items()}


def dies_after(life: Peer, at: float) -> bool:
    """Was this process killed in the moment after? The clock that we write a death down by is a little late."""
    return life.ended is not None and life.began <= at <= life.ended + 1.0 and life.ended - at <= MOMENT_S


def deeper_run(run: RunConfig, *, num_fragments: int) -> RunConfig:
    """With a block a fragment, without an end."""
    document = json.loads(canonical_json(run))
    document["model"]["config"] |= {"n_layer": num_fragments}
    document |= {"fragments": num_fragments, "name": "stages", "initial_digests": []}
    document["train"] |= {"total_tokens": common.ENDLESS_TOKENS}
    return run_from_dict(document, origin="the benchmark's run")


def table(result: dict[str, Any]) -> str:
    header = [
        "topology", "peers", "kills", "tokens/s calm", "under kills", "kept", "holders left", "reroutes",
        "noticed p50 / p95, s", "answered elsewhere p50 / p95, s", "lost, tokens", "counted twice",
        "gone with the dead",
    ]
    rows = []
    for row in result["rows"]:
        rows.append([
            row["topology"], row["peers"], f"{row['kills']}, every {row['every_s']:.0f} s",
            f"{row['calm_tokens_per_s']:,.0f}", f"{row['stormy_tokens_per_s']:,.0f}", f"{row['kept']:.2f}",
            f"{row['capacity_kept']:.2f}", row["reroutes"], _pair(row, "noticed"), _pair(row, "reroute"),
            *(_fragments(row[f"{name}_tokens"]) for name in ("lost", "twice", "gone")),
        ])
    notes = [_start_note(row["start"]) for row in result["rows"]] + [
        f"stages {result['parts']}, windows of {result['calm_s']:.0f} and {result['seconds']:.0f} s; computing is"
        f" real and PADDED by sleeps to {result['service_ms']:.0f} ms a microbatch and stage: one machine runs all",
        "holders left: the mean share of its holders that the scarcest stage had, from their death to their being back",
        "tokens by fragment; one number where all are the same",
    ]
    for row in result["rows"]:
        notes += row["ended_by_themselves"]
        if row["reroutes_unexplained"]:
            notes.append(f"{row['reroutes_unexplained']} more reroutes away from peers that were not dead")
    return "\n".join([tables.markdown(header, rows), "", *notes])


def _start_note(start: str) -> str:
    down_s, loading_s = STARTS[start]
    if start == "fork":
        return f"who is killed is forked again {down_s} s later by a process that has the libraries, as with --restart"
    return (
        f"who is killed is started again {down_s:.0f} s later; libraries are loaded beforehand, and it SLEEPS for"
        f" {loading_s} s instead: on a machine of its own it would not load them at the cost of others"
    )


def _pair(row: dict[str, Any], name: str) -> str:
    values = [row[f"{name}_p{p}_s"] for p in (50, 95)]
    return " / ".join("-" if value is None else f"{value:.2f}" for value in values)


def _fragments(values: list[int]) -> str:
    return f"{values[0]:,}" if len(set(values)) == 1 else ", ".join(f"{value:,}" for value in values)
