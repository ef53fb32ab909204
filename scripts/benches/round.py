"""Seconds of one round over the least that the lines allow, by size of what is averaged, bits, peers and topology.

    bound = bytes that one peer must send / its line + four one-way legs (open, push, result, commit)

Beside it stands what `python -m swarm.plan` would foretell (swarm/train/round_time.py) of peers that share the cores of
this machine, and measured over foretold.

Each peer sends 2 x (K-1)/K of the encoded fragment: its drift to the owners of the other parts, and the result of its
own part to the others. A round lasts from its opening until the last peer has applied it. The model is one fragment,
and the next round opens only a few seconds after the last one. Batches are tiny, so that training stands in the way as
little as a peer can: it never rests, and shares the cores with the round.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

from wanlab.lab import Lab
from wanlab.topology import Topology

from benches import options as common
from benches import table as tables
from benches.labpeer import DidNotFinish, Peer
from benches.labrun import LabSwarm
from benches.systems import SYSTEMS, Setup
from swarm.averaging import outer
from swarm.averaging.layout import Layout
from swarm.config import RunConfig
from swarm.network import codec
from swarm.train.lines import Line, Lines
from swarm.train.lines import Pair as Between
from swarm.train.round_time import round_time

NAME = "round"
HELP = "seconds of one round over what the lines allow"

LEGS = 4
DROPPED = 2
"""first rounds, in which connections have yet to open up"""
PAUSE_S = 5.0
"""between two rounds"""
LATE_S = 1.0
"""after the last round's opener has applied it: others may be applying"""
FIRST_ROUND_S = 120.0
PATIENCE = 30.0
"""times the bound: a round that takes longer is a failure"""
SIZES = {"1M": {"n_layer": 4, "n_embd": 144, "n_head": 4}, "10M": {"n_layer": 6, "n_embd": 368, "n_head": 8}}
"""GPT-J's settings for about so many parameters"""
TINY = {"sequence_length": 8, "batch_sequences": 1, "total_tokens": common.ENDLESS_TOKENS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_places(parser, topologies=["home-100", "home-asym"], peers=[2, 4])
    common.add_run(parser)
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=list(SIZES), help="of the model (1M 10M)")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8, 32], help="a value on the wire (4 8 32)")
    parser.add_argument("--rounds", type=int, default=5, help=f"that count, after the first {DROPPED} (5)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.topology, options.peers, options.size, options.bits = ["home-100"], [2], ["1M"], [4]
    run = common.run_of(options)
    rows = []
    with common.workspace() as folder:
        for name, topology, numbers in common.places(options):
            with common.lab(topology) as lab:
                for size, bits, num_peers in itertools.product(options.size, options.bits, numbers):
                    own = folder / f"{name}-{size}-{bits}-{num_peers}"
                    row = one(lab, sized(run, size, bits), own, num_peers=num_peers, rounds=options.rounds)
                    rows.append({"topology": name, "size": size, "bits": bits, "peers": num_peers, **row})
                    what = f"{row['seconds']['median']:.2f} s" if "seconds" in row else row["failure"]
                    limits = f"bound {row['bound_s']:.2f} s, foretold {row['foretold_s']:.2f} s"
                    print(f"  {own.name}: {what}, {limits}", flush=True)
    return {"rounds": options.rounds, "rows": rows}


def sized(run: RunConfig, size: str, bits: int) -> RunConfig:
    """The run with a model of that size in one fragment, and a round every few seconds."""
    averaging = {"bits": bits, "tokens_per_round": 10**9, "max_round_s": PAUSE_S, "mode": "local"}
    config = {**(run.model.config or {}), **SIZES[size], "model_type": "gptj"}
    return common.changed(
        run, {"model": {"config": config}, "fragments": 1, "train": TINY, "averaging": averaging}
    )


def one(lab: Lab, run: RunConfig, folder: Path, *, num_peers: int, rounds: int) -> dict[str, Any]:
    size = encoded_bytes(run)
    bound_s = bound(lab.topology, lab.hosts[:num_peers], size)
    expected_s = foretold(lab.topology, lab.hosts[:num_peers], run, cores=(os.cpu_count() or 1) / num_peers)
    row: dict[str, Any] = {"encoded_bytes": size, "bound_s": bound_s, "foretold_s": expected_s}
    setup = Setup(common.write(run, folder / "bench.yaml"), num_peers, None, folder, run.seed)
    wanted = DROPPED + rounds
    try:
        with LabSwarm(lab, SYSTEMS[common.OURS], setup) as swarm:
            swarm.start_all(together=True)  # who joins later may never come level where rounds are quick
            swarm.wait(
                lambda: len(whole_rounds(list(swarm.peers.values()), num_peers)) >= wanted,
                timeout_s=FIRST_ROUND_S + wanted * (PAUSE_S + PATIENCE * bound_s), what=f"{wanted} rounds of all peers",
            )
            swarm.sleep(LATE_S)
            found = whole_rounds(list(swarm.peers.values()), num_peers)[DROPPED:wanted]
    except DidNotFinish as error:
        return {**row, "failure": error.said}
    return {
        **row, "seconds": tables.spread([seconds for seconds, _ in found]),
        "opener_seconds": tables.spread([seconds for _, seconds in found]),
        "over_bound": tables.spread([seconds / bound_s for seconds, _ in found]),
        "over_foretold": tables.spread([seconds / expected_s for seconds, _ in found]),
    }


def whole_rounds(peers: list[Peer], num_peers: int) -> list[tuple[float, float]]:
    """(seconds until the last peer had applied it, seconds until the opener had) of rounds with all peers in them.

    The opener is who took longest: its `seconds` begin with the opening, the others' with the commit."""
    by_version: dict[int, list[tuple[float, float]]] = {}
    for peer in peers:
        for at, event in peer.of("round"):
            if event["contributors"] == num_peers:
                by_version.setdefault(event["version"], []).append((at, event["seconds"]))
    found = []
    for _, heard in sorted(by_version.items()):
        if len(heard) == num_peers:
            applied_at, seconds = max(heard, key=lambda one: one[1])
            found.append((max(at for at, _ in heard) - (applied_at - seconds), seconds))
    return found


def encoded_bytes(run: RunConfig) -> int:
    """Of all fragments, as a round has them on the wire."""
    from swarm.train.run_source import hold

    return sum(codec_bytes(layout, run) for layout in hold(run).layouts.values())


def codec_bytes(layout: Layout, run: RunConfig) -> int:
    fine = layout.num_fine_blocks
    return codec.encoded_bytes(fine, layout.num_blocks - fine, run.averaging.bits)


def bound(topology: Topology, hosts: list[str], size: int) -> float:
    """Seconds that the slowest line needs for its share, and the longest path for the legs."""
    num_peers = len(hosts)
    each = size / num_peers
    """to one other peer, and from it: a part of the drift, and as much again of the result"""
    rates = [(topology.up_bits_per_s(host), num_peers - 1) for host in hosts]
    rates += [(topology.down_bits_per_s(host), num_peers - 1) for host in hosts]
    pairs = list(itertools.combinations(hosts, 2))
    rates += [(topology.pair(a, b).bits_per_s, 1) for a, b in pairs]
    sending_s = max((2 * 8 * each * others / rate for rate, others in rates if rate), default=0.0)
    return sending_s + LEGS * max(topology.latency_s(a, b) for a, b in pairs)


def foretold(topology: Topology, hosts: list[str], run: RunConfig, *, cores: float) -> float:
    """Seconds by the plan's arithmetic, of all fragments one after the other; each peer has so many cores."""
    from swarm.train.run_source import hold

    return sum(
        round_time(
            lines_of(topology, hosts), num_values=layout.numel, buffers=outer.num_buffers(run), cores=cores,
            round_bytes=codec_bytes(layout, run),
        ).total_s for layout in hold(run).layouts.values()
    )


def lines_of(topology: Topology, hosts: list[str]) -> Lines:
    """As a plan has them."""
    return Lines(
        tuple(
            Line(host.name, host.up_bits_per_s, host.down_bits_per_s, host.latency_s)
            for host in topology.hosts if host.name in hosts
        ),
        tuple(Between(pair.between, pair.latency_s, pair.bits_per_s) for pair in topology.pairs),
    )


def table(result: dict[str, Any]) -> str:
    header = [
        "topology", "parameters", "bits", "peers", "encoded, MB", "bound, s", "foretold, s", "one round, s",
        "times the bound", "times foretold",
    ]
    rows = [
        [
            row["topology"], row["size"], row["bits"], row["peers"], f"{row['encoded_bytes'] / 1e6:.2f}",
            f"{row['bound_s']:.2f}", f"{row['foretold_s']:.2f}", tables.shown(row.get("seconds")) or row["failure"],
            tables.shown(row.get("over_bound")), tables.shown(row.get("over_foretold")),
        ]
        for row in result["rows"]
    ]
    return "\n".join([
        tables.markdown(header, rows), "",
        f"{result['rounds']} rounds each, opening until the last peer has applied it; the peers train on meanwhile",
    ])
