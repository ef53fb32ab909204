"""What travels for a token, all included, and what that costs in loss.

Bytes are those on each peer's own wire: values, commits, heartbeats, the DHT, TCP's headers and retries. They are held
against data parallelism in bf16: each step of K x batch tokens, each of K peers sends 2 x 2 bytes x parameters x
(K-1)/K in a ring. The loss is held against what that would have computed: one process with batches K times as large,
the same tokens, the same schedule. Control traffic is measured apart, in a swarm that averages nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wanlab.lab import Lab

from benches import options as common
from benches import table as tables
from benches.labpeer import DidNotFinish
from benches.labrun import LabSwarm
from benches.systems import SYSTEMS, Setup, System
from benches.usage import usage
from swarm.config import RunConfig

NAME = "traffic"
HELP = "bytes a committed token against data parallelism in bf16, and the gap in loss"

FIRST_COMMIT_S = 180.0
QUIET_SETTLE_S = 8.0
QUIET_S = 20.0
NEVER = {"tokens_per_round": 10**9, "max_round_s": 86_400.0}
"""averaging settings with which nothing is averaged"""
QUICK_TOKENS = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_systems(parser)
    common.add_places(parser, topologies=["home-100"], peers=[4])
    common.add_run(parser)
    parser.add_argument("--seeds", type=int, default=3, help="how often, with other weights and data (3)")
    parser.add_argument("--tokens", type=int, metavar="N", help="swarm tokens of each run (the run config's)")
    parser.add_argument("--limit", type=float, default=1800.0, metavar="S", help="of one run, seconds (1800)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.topology, options.peers, options.seeds = ["home-100"], [2], 1
        options.tokens = options.tokens or QUICK_TOKENS
    systems = common.systems(options.system)
    run = common.run_of(options)
    tokens = options.tokens or run.train.total_tokens
    run = common.changed(run, {"train": {"total_tokens": tokens}})
    result: dict[str, Any] = {
        "tokens": tokens, "seeds": options.seeds, "run": run.name, "parameters": parameters_of(run),
        "systems": {system.name: system.settings for system in systems}, "places": [],
    }
    with common.workspace() as folder:
        for name, topology, numbers in common.places(options):
            with common.lab(topology) as lab:
                for num_peers in numbers:
                    bench = Traffic(
                        lab, run, folder / f"{name}-{num_peers}", num_peers=num_peers, limit_s=options.limit,
                        ddp_bytes=ddp_bytes_per_token(run, result["parameters"], num_peers),
                    )
                    place = {"topology": name, "peers": num_peers, "ddp_bytes_per_token": bench.ddp_bytes}
                    result["places"].append({**place, **bench.measure(systems, seeds=options.seeds)})
    return result


class Traffic:
    """One topology with one number of peers."""

    def __init__(
        self, lab: Lab, run: RunConfig, folder: Path, *, num_peers: int, limit_s: float, ddp_bytes: float
    ) -> None:
        self.lab, self.run, self.folder, self.num_peers = lab, run, folder, num_peers
        self.limit_s, self.ddp_bytes = limit_s, ddp_bytes

    def measure(self, systems: list[System], *, seeds: int) -> dict[str, Any]:
        reference = []
        rows: dict[str, list[dict[str, float]]] = {system.name: [] for system in systems}
        failures: dict[str, list[str]] = {system.name: [] for system in systems}
        for seed in range(self.run.seed, self.run.seed + seeds):
            reference.append(self.one_process(seed))
            self.say(f"seed {seed}: one process: {reference[-1]:.4f} nats a token")
            for system in systems:
                try:
                    row = self.one(system, seed)
                except DidNotFinish as error:
                    failures[system.name].append(error.said)
                    self.say(f"seed {seed}: {system.name}: {error.said}")
                    continue
                row["gap_percent"] = 100 * (row["loss"] / reference[-1] - 1)
                row["less_than_ddp"] = self.ddp_bytes / row["bytes_per_token"]
                rows[system.name].append(row)
                self.say(
                    f"seed {seed}: {system.name}: {row['loss']:.4f} nats a token ({row['gap_percent']:+.2f} %),"
                    f" {row['bytes_per_token']:.1f} bytes a token, {row['less_than_ddp']:.1f} x less than bf16 DDP"
                )
        return {
            "reference_loss": tables.spread(reference),
            "control_bytes_per_s": self.control() if common.OURS in rows else None,
            "rows": [
                {"system": name, "failures": failures[name], **tables.spreads(found)} for name, found in rows.items()
            ],
        }

    def one_process(self, seed: int) -> float:
        """Held-out loss of what DDP computes: batches of all peers in each step."""
        from benches.systems.workload import held_out

        train = {"batch_sequences": self.run.train.batch_sequences * self.num_peers}
        setup = self._setup("reference", common.changed(self.run, {"train": train}), seed, num_peers=1)
        with LabSwarm(self.lab, SYSTEMS["alone"], setup) as swarm:
            swarm.start_all()
            swarm.to_the_end(self.run.train.total_tokens, timeout_s=self.limit_s)
        return held_out(self.run, SYSTEMS["alone"].weights(setup, 0))

    def one(self, system: System, seed: int) -> dict[str, float]:
        from benches.systems.workload import held_out

        setup = self._setup(system.name, self.run, seed, num_peers=self.num_peers)
        with LabSwarm(self.lab, system, setup) as swarm:
            swarm.start_all(together=True)
            swarm.wait(lambda: bool(swarm.committed()), timeout_s=FIRST_COMMIT_S, what="the first commit")
            before, tokens_before = swarm.snapshot(), swarm.committed()[-1][1]
            seconds = swarm.to_the_end(self.run.train.total_tokens, timeout_s=self.limit_s)
            used = usage(before, swarm.snapshot())
            tokens = swarm.committed()[-1][1] - tokens_before
        if tokens <= 0:
            why = "bytes are counted from the first commit on, and there was no other"
            raise DidNotFinish("it was over too soon", why=f"{why}; give more --tokens")
        return {
            "loss": held_out(self.run, system.weights(setup, 0)), "seconds": seconds, "tokens": tokens,
            "bytes_per_token": used["up_bytes_per_peer"] / tokens, "overrun_packets": used["overrun_packets"],
        }

    def control(self) -> float:
        """Bytes a second that a peer of the product sends while nothing is averaged."""
        run = common.changed(common.endless(self.run), {"averaging": NEVER})
        setup = self._setup("quiet", run, run.seed, num_peers=self.num_peers)
        with LabSwarm(self.lab, SYSTEMS[common.OURS], setup) as swarm:
            swarm.start_all()
            swarm.sleep(QUIET_SETTLE_S)
            before = swarm.snapshot()
            swarm.sleep(QUIET_S)
            return usage(before, swarm.snapshot())["up_bytes_per_s"]

    def _setup(self, name: str, run: RunConfig, seed: int, *, num_peers: int) -> Setup:
        folder = self.folder / f"{name}-{seed}"
        return Setup(common.write(run, folder / "bench.yaml"), num_peers, None, folder, seed)

    def say(self, text: str) -> None:
        print(f"  {self.folder.name}: {text}", flush=True)


def parameters_of(run: RunConfig) -> int:
    from swarm.train.run_source import hold

    return sum(layout.num_parameters for layout in hold(run).layouts.values())


def ddp_bytes_per_token(run: RunConfig, num_parameters: int, num_peers: int) -> float:
    """What each peer sends in a ring all-reduce of bf16 gradients, for one token of the swarm."""
    step_tokens = num_peers * run.train.batch_sequences * run.train.sequence_length
    return 2 * 2 * num_parameters * (num_peers - 1) / num_peers / step_tokens


def table(result: dict[str, Any]) -> str:
    header = [
        "topology", "peers", "system", "bytes a peer sends for a token", "less than bf16 DDP, times",
        f"held-out loss, {result['tokens']:,} tokens", "against one process, each seed, %",
    ]
    rows, notes = [], []
    for place in result["places"]:
        where = [place["topology"], place["peers"]]
        rows.append([*where, "bf16 DDP, calculated", f"{place['ddp_bytes_per_token']:,.0f}", "1", "", ""])
        rows.append([*where, "one process", "0", "", tables.shown(place["reference_loss"], digits=4), ""])
        for row in place["rows"]:
            if "loss" not in row:
                rows.append([*where, row["system"], row["failures"][0], "", "", ""])
                continue
            notes += [f"{place['topology']}, {row['system']}: {text}" for text in row["failures"]]
            gaps = ", ".join(f"{gap:+.2f}" for gap in row["gap_percent"]["values"])
            rows.append([
                *where, row["system"], tables.shown(row["bytes_per_token"], digits=1),
                tables.shown(row["less_than_ddp"], digits=1), tables.shown(row["loss"], digits=4), gaps,
            ])
        if place["control_bytes_per_s"] is not None:
            kilobytes = place["control_bytes_per_s"] / 1e3
            notes.append(f"{where[0]}, {where[1]} peers: {kilobytes:.1f} kB/s a peer while nothing is averaged")
    notes += [f"{name}: {settings}" for name, settings in result["systems"].items()]
    return "\n".join([tables.markdown(header, rows), "", *notes])
