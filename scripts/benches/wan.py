"""What is left of the peers' own speed when they are one swarm over home lines.

    E = tokens in committed rounds per second / what the same peers train per second with networking off

"alone" is one process a peer, all at once on the same cores and in the same lab, before and after each round of the
systems: the two are averaged, because machines drift. Commits come in lumps, so the rate of a window goes from its
first commit to its last one, as the most advanced peer knows them. The lab's own CPU is charged to E, though a real WAN
costs nothing.
"""

from __future__ import annotations

import argparse
import time
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

NAME = "wan"
HELP = "tokens per second of a swarm over WAN links, against the same peers with networking off"

FEWEST_COMMITS = 3
FIRST_COMMIT_S = 180.0
SETTLE_S = 8.0
"""after the first commit: links have opened up, rounds have found their rhythm"""
ALONE_SETTLE_S = 2.0
MUCH_TOO_LATE_S = 0.005
"""of a packet in the emulator: more than paths differ by themselves"""
QUICK_S = 8.0
QUICK_SETTLE_S = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_systems(parser)
    common.add_places(parser, topologies=["home-100", "home-asym"], peers=[2, 4])
    common.add_run(parser)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each window (40)")
    parser.add_argument(
        "--max-window", type=float, default=180.0, metavar="S",
        help=f"a window is made longer up to this, until it has {FEWEST_COMMITS} commits (180)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="how often (3)")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="besides, train N swarm tokens to the end and evaluate on held-out text"
    )
    parser.add_argument(
        "--tokens-limit", type=float, default=1800.0, metavar="S", help="give that up after so many seconds (1800)"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.topology, options.peers, options.repeats = ["home-100"], [2], 1
        options.seconds, options.system = QUICK_S, [common.OURS]
    systems = common.systems(options.system)
    run = common.run_of(options)
    result: dict[str, Any] = {
        "seconds": options.seconds, "tokens": options.tokens, "run": run.name,
        "systems": {system.name: system.settings for system in systems}, "rows": [],
    }
    with common.workspace() as folder:
        for name, topology, numbers in common.places(options):
            with common.lab(topology) as lab:
                for num_peers in numbers:
                    bench = Wan(lab, run, folder / f"{name}-{num_peers}", num_peers=num_peers, options=options)
                    result["rows"] += [{"topology": name, **row} for row in bench.rows(systems)]
    return result


class Wan:
    """One topology with one number of peers."""

    def __init__(
        self, lab: Lab, run: RunConfig, folder: Path, *, num_peers: int, options: argparse.Namespace
    ) -> None:
        self.lab, self.run, self.folder, self.num_peers, self.options = lab, run, folder, num_peers, options
        self._count = 0

    def rows(self, systems: list[System]) -> list[dict[str, Any]]:
        good: dict[str, list[dict[str, float]]] = {system.name: [] for system in systems}
        bad: dict[str, list[str]] = {system.name: [] for system in systems}
        before = self.alone()
        for _ in range(self.options.repeats):
            windows: dict[str, dict[str, float]] = {}
            for system in systems:
                try:
                    windows[system.name] = self.window(system)
                except DidNotFinish as error:
                    bad[system.name].append(error.said)
                    self.say(f"{system.name}: {error.said}")
            after = self.alone()
            for name, figures in windows.items():
                figures["alone_tokens_per_s"] = (before + after) / 2
                figures["efficiency"] = figures["tokens_per_s"] / figures["alone_tokens_per_s"]
                good[name].append(figures)
                self.say(
                    f"{name}: E {figures['efficiency']:.3f}, {figures['tokens_per_s']:,.0f} tokens/s committed,"
                    f" {figures['alone_tokens_per_s']:,.0f} alone"
                )
            before = after
        rows = []
        for system in systems:
            row = {
                "system": system.name, "peers": self.num_peers, "failures": bad[system.name],
                **tables.spreads(good[system.name]),
            }
            if self.options.tokens is not None:
                row.update(self.to_the_end(system))
            rows.append(row)
        return rows

    def alone(self) -> float:
        """Tokens per second of all peers together, each by itself."""
        with LabSwarm(self.lab, SYSTEMS["alone"], self._setup("alone", common.endless(self.run))) as swarm:
            swarm.start_all()
            swarm.sleep(ALONE_SETTLE_S)
            began = time.monotonic()
            swarm.sleep(self.options.seconds)
            ended = time.monotonic()
            swarm.finish()
            rates = [
                tables.rate(tables.rises([peer.points("tokens")]), began=began, ended=ended)
                for peer in swarm.peers.values()
            ]
        return sum(rate.tokens_per_s for rate in rates)

    def window(self, system: System) -> dict[str, float]:
        options = self.options
        settle_s = QUICK_SETTLE_S if options.quick else SETTLE_S
        with LabSwarm(self.lab, system, self._setup(system.name, common.endless(self.run))) as swarm:
            swarm.start_all()
            swarm.wait(lambda: bool(swarm.committed()), timeout_s=FIRST_COMMIT_S, what="the first commit")
            swarm.sleep(settle_s)
            before = swarm.snapshot()

            def commits() -> int:
                return tables.rate(swarm.committed(), began=before.at, ended=time.monotonic()).commits

            swarm.sleep(options.seconds)
            while commits() < FEWEST_COMMITS and time.monotonic() - before.at < options.max_window:
                swarm.sleep(1.0)
            after = swarm.snapshot()
            swarm.finish()
            committed = tables.rate(swarm.committed(), began=before.at, ended=after.at)
            if committed.commits < 2:
                why = "a rate needs two; a longer --max-window may have them"
                raise DidNotFinish(f"{committed.commits} commits in {after.at - before.at:.0f} s", why=why)
            trained = [
                tables.rate(tables.rises([peer.points("tokens")]), began=before.at, ended=after.at)
                for peer in swarm.peers.values()
            ]
        return {
            **usage(before, after), "tokens_per_s": committed.tokens_per_s, "commits": committed.commits,
            "trained_tokens_per_s": sum(rate.tokens_per_s for rate in trained),
        }

    def to_the_end(self, system: System) -> dict[str, Any]:
        """Loss on held-out text after --tokens swarm tokens, with the schedule ending there."""
        from benches.systems.workload import held_out

        run = common.changed(self.run, {"train": {"total_tokens": self.options.tokens}})
        try:
            with LabSwarm(self.lab, system, self._setup(system.name, run)) as swarm:
                swarm.start_all(together=True)
                seconds = swarm.to_the_end(self.options.tokens, timeout_s=self.options.tokens_limit)
                loss = held_out(run, system.weights(swarm.setup, 0))
        except DidNotFinish as error:
            self.say(f"{system.name}: {error.said}")
            return {"loss_failure": error.said}
        self.say(f"{system.name}: {loss:.4f} nats a token after {self.options.tokens:,} tokens in {seconds:.0f} s")
        return {"loss": loss, "seconds_to_tokens": seconds}

    def _setup(self, name: str, run: RunConfig) -> Setup:
        self._count += 1
        folder = self.folder / f"{self._count}-{name}"
        return Setup(common.write(run, folder / "bench.yaml"), self.num_peers, None, folder, run.seed)

    def say(self, text: str) -> None:
        print(f"  {self.folder.name}: {text}", flush=True)


def table(result: dict[str, Any]) -> str:
    with_loss = result["tokens"] is not None
    loss_header = [f"held-out loss, {result['tokens']:,} tokens"] if with_loss else []
    header = [
        "topology", "peers", "system", "E", "tokens/s committed", "tokens/s alone", "up a peer, kB/s",
        "peers' CPU, cores", "emulator's CPU, cores", *loss_header,
    ]
    rows = []
    for row in result["rows"]:
        measured = [row["topology"], row["peers"], row["system"]]
        if "efficiency" in row:
            measured += [
                tables.shown(row["efficiency"], digits=3), tables.shown(row["tokens_per_s"], digits=0),
                tables.shown(row["alone_tokens_per_s"], digits=0),
                tables.shown(row["up_bytes_per_s"], digits=0, scale=1e-3), tables.shown(row["cpu_cores"]),
                tables.shown(row["emulator_cores"], digits=3),
            ]
        else:
            measured += [row["failures"][0], "", "", "", "", ""]
        if with_loss:
            measured.append(f"{row['loss']:.4f}" if "loss" in row else row["loss_failure"])
        rows.append(measured)
    lines = [tables.markdown(header, rows), ""]
    lines += [f"{name}: {settings}" for name, settings in result["systems"].items()]
    lines += notes(result)
    return "\n".join(lines)


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know to believe a row."""
    found = []
    for row in result["rows"]:
        name = f"{row['topology']}, {row['peers']} peers, {row['system']}"
        if "efficiency" in row and row["failures"]:
            found.append(f"{name}: {len(row['failures'])} more {row['failures'][0]}")
        if "seconds" in row and row["seconds"]["max"] > result["seconds"] + 2:
            found.append(f"{name}: the window was made {row['seconds']['max']:.0f} s long, to have enough commits")
        if row.get("overrun_packets", {"max": 0})["max"] > 0:
            found.append(f"{name}: the emulator was too slow for {row['overrun_packets']['max']:.0f} packets")
        late_s = row.get("emulator_late_max_us", {"max": 0})["max"] / 1e6
        if late_s > MUCH_TOO_LATE_S:
            found.append(f"{name}: the emulator handed packets over up to {1e3 * late_s:.1f} ms late")
    return found
