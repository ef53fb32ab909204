"""From the start of a newcomer's process to the first of its tokens that counts, and where the seconds go.

    import     until the first line of the checklist: Python, torch, the product
    network    libp2p is up, the run's config is here, others have answered
    state      the model is built, its global state is downloaded and checked
    text       the text is read and cut into tokens, the peer takes part
    trains     its first progress with tokens
    counts     the first committed round, applied by it, that all peers have contributed to, itself included

The download is held against its bytes over what the lines allow: the newcomer's downlink or all donors' uplinks.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
from pathlib import Path
from typing import Any

from wanlab.lab import Lab

from benches import options as common
from benches import table as tables
from benches.labpeer import DidNotFinish, Peer
from benches.labrun import LabSwarm
from benches.round import SIZES
from benches.systems import SYSTEMS, Setup
from swarm.config import RunConfig

NAME = "join"
HELP = "seconds from a newcomer's start to its first token that counts"

PARTS = ("import", "network", "state", "text", "trains", "counts")
ENDS = {"import": "device", "network": "reachable", "state": "state", "text": "training"}
"""the line of the checklist with which each part ends"""
OLD_ROUNDS = 8
"""that the swarm has made before anybody joins"""
SWARM_S = 240.0
JOIN_S = 180.0
LEAVE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_places(parser, topologies=["home-100", "home-asym"], peers=[3])
    common.add_run(parser)
    parser.add_argument(
        "--size", nargs="+", default=list(SIZES), choices=list(SIZES), help="of the model, parameters (1M 10M)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="newcomers, one after the other (3)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.topology, options.peers, options.size, options.repeats = ["home-100"], [2], ["1M"], 1
    run = common.endless(common.run_of(options))
    rows = []
    with common.workspace() as folder:
        for name, topology, numbers in common.places(options):
            with common.lab(topology) as lab:
                for size in options.size:
                    for num_peers in numbers:
                        own = folder / f"{name}-{size}-{num_peers}"
                        row = one(lab, sized(run, size), own, num_peers=num_peers, repeats=options.repeats)
                        rows.append({"topology": name, "size": size, "peers": num_peers, **row})
    return {"repeats": options.repeats, "rows": rows}


def sized(run: RunConfig, size: str) -> RunConfig:
    config = {**(run.model.config or {}), **SIZES[size], "model_type": "gptj"}
    return common.changed(run, {"model": {"config": config}})


def one(lab: Lab, run: RunConfig, folder: Path, *, num_peers: int, repeats: int) -> dict[str, Any]:
    """A swarm of all peers but the last, which joins again and again, each time as somebody new."""
    size = state_bytes(run)
    hosts = lab.hosts[:num_peers]
    uplinks = [lab.topology.up_bits_per_s(host) for host in hosts[:-1]]
    rates = [sum(uplinks) if all(uplinks) else 0.0, lab.topology.down_bits_per_s(hosts[-1])]
    bound_s = 8 * size / min((rate for rate in rates if rate), default=float("inf"))  # 0 is unlimited
    row: dict[str, Any] = {"state_bytes": size, "bound_s": bound_s}
    setup = Setup(common.write(run, folder / "bench.yaml"), num_peers, None, folder, run.seed)
    joined: list[dict[str, float]] = []
    try:
        with LabSwarm(lab, SYSTEMS[common.OURS], setup) as swarm:
            swarm.start(0)
            swarm.wait(swarm.peers[0].is_ready, timeout_s=SWARM_S, what="peer 0 to be ready")
            for number in range(1, num_peers - 1):
                swarm.start(number)
            swarm.wait(
                lambda: all(len(peer.of("round")) >= OLD_ROUNDS for peer in swarm.peers.values()), timeout_s=SWARM_S,
                what=f"{OLD_ROUNDS} rounds of the swarm",
            )
            for repeat in range(repeats):
                home = dataclasses.replace(setup, folder=folder / f"new-{repeat}")
                joined.append(newcomer(swarm, home, num_peers))
                print(
                    f"  {folder.name}: {joined[-1]['total']:.1f} s: "
                    + ", ".join(f"{part} {joined[-1][part]:.1f}" for part in PARTS), flush=True,
                )
    except DidNotFinish as error:
        print(f"  {folder.name}: {error.said}", flush=True)
        row["failure"] = error.said
    return {**row, **tables.spreads(joined)}


def newcomer(swarm: LabSwarm, setup: Setup, num_peers: int) -> dict[str, float]:
    peer = swarm.start(num_peers - 1, setup=setup)
    swarm.wait(lambda: counted_at(peer, num_peers) is not None, timeout_s=JOIN_S, what="the newcomer's tokens to count")
    took = parts(peer, num_peers)
    peer.may_end = True
    peer.process.send_signal(signal.SIGTERM)
    swarm.wait(lambda: not peer.is_running(), timeout_s=LEAVE_S, what="the newcomer to leave")
    peer.wait()
    return took


def trains_at(peer: Peer) -> float | None:
    return next((at for at, event in peer.of("progress") if event["tokens"] > 0), None)


def counted_at(peer: Peer, num_peers: int) -> float | None:
    """When it applied the first round that all peers have contributed to, once it trains itself."""
    trains = trains_at(peer)
    if trains is None:
        return None
    return next((at for at, event in peer.of("round") if at >= trains and event["contributors"] >= num_peers), None)


def parts(peer: Peer, num_peers: int) -> dict[str, float]:
    """Seconds of each, and `total`."""
    checked = {event["name"]: at for at, event in peer.of("check")}
    ends = {part: checked[check] for part, check in ENDS.items()}
    trains, counted = trains_at(peer), counted_at(peer, num_peers)
    assert trains is not None and counted is not None
    ends.update(trains=trains, counts=counted)
    took, before = {}, peer.began
    for part in PARTS:
        took[part], before = ends[part] - before, ends[part]
    downloads = [event["seconds"] for _, event in peer.of("check") if event["name"] == "state"]
    return {**took, "total": before - peer.began, "download": downloads[0]}


def state_bytes(run: RunConfig) -> int:
    """Weights and the outer optimizer's state, as they travel to a newcomer."""
    from swarm.train.run_source import hold

    return sum(4 * state.weights.numel() * (1 + len(state.buffers)) for state in hold(run).states.values())


def table(result: dict[str, Any]) -> str:
    header = ["topology", "parameters", "peers", *(f"{part}, s" for part in PARTS), "all, s", "download, s", "bound, s"]
    rows = []
    for row in result["rows"]:
        figures = [tables.shown(row.get(key), digits=1) for key in (*PARTS, "total", "download")]
        if "total" not in row:
            figures[0] = "did not finish"
        rows.append([row["topology"], row["size"], row["peers"], *figures, f"{row['bound_s']:.1f}"])
    return "\n".join([
        tables.markdown(header, rows), "",
        "download: of the state, as the peer's checklist has it; bound: the state's bytes over the lines",
        *(f"{row['topology']}, {row['size']}: {row['state_bytes'] / 1e6:.1f} MB of state" for row in result["rows"]),
        *(f"{row['topology']}, {row['size']}: {row['failure']}" for row in result["rows"] if "failure" in row),
    ])
