"""Does training wait for rounds? Times of a peer's own inner steps, with a round under way and without, in one swarm.

Each peer tells of every step whether one of its fragments had contributed and had no result yet
(systems/timed_peer.py). Rounds are staggered, so steps of both kinds alternate, on the same machine in the same minute.
What rounds take of the training thread itself, a copy at the contribution and an addition at the result, is counted
apart: `turns`, over all of the time. Where the peers of a lab share few cores, rounds and emulator take theirs from
training, as they would not on machines of their own.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches import options as common
from benches import table as tables
from benches.labrun import LabSwarm
from benches.systems import Setup
from benches.systems.ours import Ours
from swarm.errors import ConfigError

NAME = "overlap"
HELP = "inner steps with a round under way, against those without"

PEER = Path(__file__).resolve().parent / "systems" / "timed_peer.py"
SETTLE_S, QUICK_S = 10.0, 20.0
QUICK_ROUNDS = {"averaging": {"tokens_per_round": 8_192}}
FIRST_COMMIT_S = 180.0
FEWEST = 20
"""steps of each kind, or their medians say nothing"""


class Timed(Ours):
    def command(self, setup: Setup, number: int, ips: list[str], join: list[str]) -> list[str]:
        python, _, _, *flags = super().command(setup, number, ips, join)
        return [python, str(PEER), *flags]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_places(parser, topologies=["home-100"], peers=[2])
    common.add_run(parser)
    parser.add_argument("--seconds", type=float, default=240.0, help="of each window (240)")
    parser.add_argument("--repeats", type=int, default=1, help="how often (1)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    seconds, repeats = (QUICK_S, 1) if options.quick else (options.seconds, options.repeats)
    run, system = common.endless(common.run_of(options)), Timed()
    run = common.changed(run, QUICK_ROUNDS) if options.quick else run
    rows = []
    with common.workspace() as folder:
        for name, topology, numbers in common.places(options):
            for num_peers in numbers:
                found = []
                for repeat in range(repeats):
                    place = folder / f"{name}-{num_peers}-{repeat}"
                    setup = Setup(common.write(run, place / "bench.yaml"), num_peers, None, place, run.seed)
                    with common.lab(topology) as lab, LabSwarm(lab, system, setup) as swarm:
                        swarm.start_all()
                        swarm.wait(lambda swarm=swarm: bool(swarm.committed()), timeout_s=FIRST_COMMIT_S,
                                   what="the first commit")
                        swarm.sleep(SETTLE_S / 5 if options.quick else SETTLE_S)
                        before = [len(peer.of("step")) for peer in swarm.peers.values()]
                        swarm.sleep(seconds)
                        told = [
                            [event for _, event in peer.of("step")][first:]
                            for first, peer in zip(before, swarm.peers.values(), strict=True)
                        ]
                    found += [figures(steps, fewest=1 if options.quick else FEWEST) for steps in told]
                    print(f"  {name}, {num_peers} peers: " + ", ".join(
                        f"{one['slower_percent']:+.1f} %" for one in found[-num_peers:]), flush=True)
                rows.append({"topology": name, "peers": num_peers, **tables.spreads(found)})
    return {"seconds": seconds, "run": run.name, "rows": rows}


def figures(steps: Sequence[dict[str, Any]], *, fewest: int = FEWEST) -> dict[str, float]:
    """Of one peer in one window. Raises ConfigError where there are too few steps of a kind."""
    plain = [step["seconds"] for step in steps if not step["rounds"] and not step["turns"]]
    beside = [step["seconds"] for step in steps if step["rounds"] and not step["turns"]]
    if min(len(plain), len(beside)) < fewest:
        raise ConfigError(
            f"{len(plain)} steps without a round under way and {len(beside)} with one are too few",
            why=f"a median wants {fewest}", do="give more --seconds, or --set tokens_per_round=N for other rounds",
        )
    step_s, beside_s = statistics.median(plain), statistics.median(beside)
    turning = [step["seconds"] for step in steps if step["turns"]]
    extra_s = sum(turning) - step_s * len(turning)
    return {
        "step_ms": 1e3 * step_s, "with_round_ms": 1e3 * beside_s, "slower_percent": 100 * (beside_s / step_s - 1),
        "share_with_round": len(beside) / (len(plain) + len(beside)),
        "turns_percent": 100 * extra_s / sum(step["seconds"] for step in steps), "steps": float(len(steps)),
    }


def table(result: dict[str, Any]) -> str:
    header = ["topology", "peers", "a step, ms", "with a round under way, ms", "slower, %", "share of such steps",
              "contributing and applying, % of all time"]
    lines = [
        [row["topology"], row["peers"], tables.shown(row["step_ms"], digits=1),
         tables.shown(row["with_round_ms"], digits=1), tables.shown(row["slower_percent"], digits=1),
         tables.shown(row["share_with_round"]), tables.shown(row["turns_percent"], digits=1)]
        for row in result["rows"]
    ]
    return tables.markdown(header, lines) + f"\n\nmedians of windows of {result['seconds']:g} s, each peer apart"
