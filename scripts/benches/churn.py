"""What is left of a swarm's speed, and of its peers' work, while they die, freeze and lose each other.

The same swarm first has a calm window, then as long a one with faults on a seeded schedule (benches/faults.py); who
was killed is started again with the same home. Then all is well again for a while, all finish, and the books are made:

    trained         what every process said it had trained, plus what it will have trained between its last word and
                    its death
    held            by processes that were killed: trained since the last rounds that they knew of. Nobody can save it
    lost            trained, not held, and in no committed round in the end
    counted twice   in committed rounds beyond all that was trained; must be 0
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wanlab.lab import Lab
from wanlab.topology import Topology

from benches import options as common
from benches import table as tables
from benches.faults import KINDS, Fault, Mischief, schedule
from benches.labpeer import DidNotFinish, Peer
from benches.labrun import LabSwarm
from benches.systems import Setup, System
from swarm.config import RunConfig

NAME = "churn"
HELP = "speed and work that are kept while peers die, freeze and lose each other"

SYSTEMS = [common.OURS, "torchft", "hivemind", "ddp-bf16", "ddp-fp32"]
KILLED_ONLY = ("crash", "power")
"""for the others, whose first peer is spared as well: torchft's has the lighthouse, DDP's the store, and hivemind's is
the way in. torchft has no answer to peers that come back without having died"""
SETTLE_S = 10.0
RECOVER_S = 20.0
"""after the last fault, before all finish"""
READY_S = 180.0
TICK_S = 0.2
AGAIN_S = 5.0
"""before a peer that has ended by itself is started again"""
GIVE_UP_AFTER = 10
"""peers that ended by themselves"""
QUICK_S = 25.0
QUICK_FAULTS_PER_HOUR = 720.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_systems(parser, SYSTEMS)
    common.add_places(parser, topologies=["home-100"], peers=[4])
    common.add_run(parser)
    parser.add_argument("--seconds", type=float, default=600.0, help="of each of the two windows (600)")
    parser.add_argument("--faults-per-hour", type=float, default=60.0, metavar="N", help="in the second window (60)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="of faults (all)")
    parser.add_argument("--repeats", type=int, default=1, help="how often, with other schedules (1)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.topology, options.peers, options.repeats, options.seconds = ["home-100"], [3], 1, QUICK_S
        options.system, options.faults_per_hour = [common.OURS], QUICK_FAULTS_PER_HOUR
    systems = common.systems(options.system)
    run = common.endless(common.run_of(options))
    rows = []
    with common.workspace() as folder:
        for name, topology, numbers in common.places(options):
            for num_peers, system in itertools.product(numbers, systems):
                own = folder / f"{name}-{num_peers}-{system.name}"
                row = repeated(topology, system, run, own, num_peers=num_peers, options=options)
                rows.append({"topology": name, "peers": num_peers, "system": system.name, **row})
    settings = {system.name: system.settings for system in systems}
    return {
        "seconds": options.seconds, "faults_per_hour": options.faults_per_hour, "systems": settings, "rows": rows,
    }


def repeated(
    topology: Topology, system: System, run: RunConfig, folder: Path, *, num_peers: int, options: argparse.Namespace
) -> dict[str, Any]:
    good: list[dict[str, Any]] = []
    failures = []
    kinds = [kind for kind in options.kinds if system.name == common.OURS or kind in KILLED_ONLY]
    for repeat in range(options.repeats):
        seed = run.seed + repeat
        setup_folder = folder / str(repeat)
        setup = Setup(common.write(run, setup_folder / "bench.yaml"), num_peers, None, setup_folder, seed)
        faults = schedule(
            seed=seed, seconds=options.seconds, per_hour=options.faults_per_hour, kinds=kinds, num_peers=num_peers,
            spare_first=system.name != common.OURS,
        )
        try:
            with common.lab(topology) as lab:  # a new one each time, in which nothing is cut
                good.append(one(lab, system, setup, faults, seconds=options.seconds))
        except DidNotFinish as error:
            failures.append(error.said)
            print(f"  {folder.name}: {failures[-1]}", flush=True)
    details = [{key: row.pop(key) for key in ("faults", "warnings", "ended_by_themselves")} for row in good]
    return {"failures": failures, "details": details, **tables.spreads(good)}


def one(lab: Lab, system: System, setup: Setup, faults: list[Fault], *, seconds: float) -> dict[str, Any]:
    with LabSwarm(lab, system, setup) as swarm:
        swarm.start_all()
        swarm.wait(lambda: bool(swarm.committed()), timeout_s=READY_S, what="the first commit")
        swarm.sleep(SETTLE_S)
        calm = time.monotonic()
        swarm.sleep(seconds)
        mischief = Mischief(swarm, faults)
        badly = endure(swarm, mischief, lambda: time.monotonic() >= mischief.began + seconds)
        stormy, over = mischief.began, time.monotonic()
        badly += endure(swarm, mischief, lambda: time.monotonic() >= over + RECOVER_S and are_back(swarm))
        late = swarm.finish()
        committed, times = swarm.committed(), commit_times(swarm)
        kept = {
            name: (tables.level(committed, ended) - tables.level(committed, began)) / (ended - began)
            for name, began, ended in (("calm", calm, stormy), ("stormy", stormy, over))
        }
        equal, heads_agree = agreement(swarm)
    figures = {
        "faults": [vars(fault) for fault in mischief.done], "num_faults": len(mischief.done),
        "warnings": [event["text"] for peer in swarm.lives for _, event in peer.of("warning")],
        "ended_by_themselves": badly, "num_ended_by_themselves": len(badly), "num_killed_at_the_end": len(late),
        "calm_tokens_per_s": kept["calm"], "stormy_tokens_per_s": kept["stormy"],
        "kept": kept["stormy"] / kept["calm"] if kept["calm"] else 0.0,
        "calm_longest_stall_s": tables.longest_gap(times, began=calm, ended=stormy),
        "longest_stall_s": tables.longest_gap(times, began=stormy, ended=over),
        "equal_weights": equal, "heads_agree": int(heads_agree), **books(swarm.lives),
    }
    shown = ("num_faults", "kept", "participation", "lost_tokens", "counted_twice_tokens", "equal_weights")
    print(f"  {setup.folder.parent.name}: " + ", ".join(f"{key} {figures[key]:.4g}" for key in shown), flush=True)
    return figures


def endure(swarm: LabSwarm, mischief: Mischief, done: Callable[[], bool]) -> list[str]:
    """Let faults happen. Returns what was said by peers that ended by themselves; they are started again."""
    badly: list[str] = []
    again: dict[int, float] = {}
    while not done() or again or not mischief.is_over():
        now = time.monotonic()
        mischief.tick()
        for number, peer in list(swarm.peers.items()):
            if not peer.may_end and not peer.is_running():
                badly.append(f"peer {number}: {peer.how_it_ended()}")
                swarm.ended(number)
                again[number] = now + AGAIN_S
            elif peer.is_running() and not peer.is_ready() and now > peer.began + READY_S:
                raise DidNotFinish(f"peer {number} was not ready {READY_S:.0f} s after its start", why=peer.complaint())
        for number, at in list(again.items()):
            if at <= now:
                del again[number]
                swarm.start(number, resume=True)
        if len(badly) > GIVE_UP_AFTER:
            raise DidNotFinish(f"{len(badly)} peers ended by themselves", why=badly[-1])
        time.sleep(TICK_S)
    return badly


def are_back(swarm: LabSwarm) -> bool:
    return all(peer.is_running() and peer.is_ready() for peer in swarm.peers.values())


def commit_times(swarm: LabSwarm) -> list[float]:
    """When anybody got further: rounds where peers tell of them, or else what they know to be committed."""
    rounds = [at for peer in swarm.lives for at, _ in peer.of("round")]
    return rounds or [at for at, _ in swarm.committed()]


def books(lives: list[Peer]) -> dict[str, float]:
    """Where the tokens went. `lives`: all processes that there were."""
    longest: dict[tuple[int, int], float] = {}
    for life in lives:
        for _, event in life.of("round"):
            key = event["fragment"], event["version"]
            longest[key] = max(longest.get(key, 0.0), event["seconds"])
    fragments = {fragment for fragment, _ in longest}
    trained = held = unseen = 0.0
    for life in lives:
        points = life.points("tokens")
        mine = life.last("progress", "tokens")
        trained += mine
        if life.ended is not None:
            more = unseen_tokens(points, life.ended)
            unseen += more
            held += mine + more - accounted_tokens(life, points, longest, fragments)
    to_the_end = [life for life in lives if life.ended is None]
    committed = max((life.last("progress", "swarm_tokens") for life in to_the_end), default=0)
    total = trained + unseen
    return {
        "trained_tokens": total, "unseen_tokens": unseen, "held_tokens": held, "committed_tokens": committed,
        "participation": committed / total if total else 0.0,
        "lost_tokens": max(0.0, total - committed - held), "counted_twice_tokens": max(0.0, committed - total),
    }


def unseen_tokens(points: list[tables.Point], ended: float) -> float:
    """Trained between the last word and the end, at the speed of the last words."""
    if len(points) < 2:
        return 0.0
    (first_at, first), (last_at, last) = points[max(0, len(points) - 4)], points[-1]
    return max(0.0, last - first) / (last_at - first_at) * max(0.0, ended - last_at)


def accounted_tokens(
    life: Peer, points: list[tables.Point], longest: dict[tuple[int, int], float], fragments: set[int]
) -> float:
    """What a process had trained when the rounds began that it applied last, of the fragment that has fewest."""
    if not fragments:  # a system without rounds of fragments: what it knew to be committed last
        known = tables.rises([life.points("swarm_tokens")])
        return tables.tokens_at(points, known[-1][0]) if known else 0.0
    since = {fragment: life.began for fragment in fragments}
    for at, event in life.of("round"):
        since[event["fragment"]] = at - longest[event["fragment"], event["version"]]
    return min(tables.tokens_at(points, at) for at in since.values())


def agreement(swarm: LabSwarm) -> tuple[int, bool]:
    """How many peers have the same final weights, and whether those with the same newest version have one digest."""
    hashes: Counter[str] = Counter()
    heads: dict[tuple[int, int], set[str]] = {}
    for number, peer in swarm.peers.items():
        try:
            hashes[hashlib.sha256(swarm.system.weights(swarm.setup, number).read_bytes()).hexdigest()] += 1
        except Exception as error:  # a peer that left none is a result as well
            print(f"  peer {number} has no final weights: {error}", flush=True)
        newest = {event["fragment"]: (event["version"], event["digest"]) for _, event in peer.of("round")}
        for fragment, (version, digest) in newest.items():
            heads.setdefault((fragment, version), set()).add(digest)
    return max(hashes.values(), default=0), all(len(digests) == 1 for digests in heads.values())


def table(result: dict[str, Any]) -> str:
    header = [
        "topology", "peers", "system", "faults", "speed kept", "accepted / trained", "lost, tokens",
        "counted twice, tokens", "longest stall, s", "without faults, s", "ended by themselves", "equal weights",
    ]
    rows = []
    for row in result["rows"]:
        place = [row["topology"], row["peers"], row["system"]]
        if "kept" not in row:
            rows.append([*place, "did not finish", *[""] * 8])
            continue
        equal = f"{row['equal_weights']['min']:.0f} of {row['peers']}"
        rows.append([
            *place, tables.shown(row["num_faults"], digits=0), tables.shown(row["kept"]),
            tables.shown(row["participation"], digits=3), tables.shown(row["lost_tokens"], digits=0),
            tables.shown(row["counted_twice_tokens"], digits=0), tables.shown(row["longest_stall_s"], digits=1),
            tables.shown(row["calm_longest_stall_s"], digits=1),
            tables.shown(row["num_ended_by_themselves"], digits=0),
            equal if row["heads_agree"]["min"] else f"{equal}, digests DISAGREE",
        ])
    notes = [f"windows of {result['seconds']:.0f} s, {result['faults_per_hour']:.0f} faults an hour in the second"]
    notes += [f"{name}: {settings}" for name, settings in result["systems"].items()]
    notes += [text for row in result["rows"] for detail in row["details"] for text in detail["ended_by_themselves"]]
    notes += [text for row in result["rows"] for text in row["failures"]]
    return "\n".join([tables.markdown(header, rows), "", *notes])
