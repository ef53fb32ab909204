"""Rounds of up to 10,000 holders in groups of groups (simulated): legs, bytes that a peer sends, how exact the mean is,
how many contribute and how many truths there are while peers die in the middle of it. Moshpit's grid beside it.

    sent            over what a peer of one butterfly of 64 sends for a fragment: mean, and the most of any peer
    contributed     of those who lived long enough to; the rest is still in its peer's drift
    error           of the mean before it is quantised, against fp64, of all who are in it; relative L2
    truths          different results among all who have one

A robust mean is another one by intent; `--robust` says how far it is from the exact one where nobody is a poisoner.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benches import table as tables
from benches.groups_world import Round, moshpit
from swarm.config import AveragingConfig
from swarm.errors import ConfigError

NAME = "groups"
HELP = "rounds of up to 10,000 holders: bytes, exactness and truths while peers die (simulated)"

PEERS = (64, 65, 256, 1000, 4096, 10_000)
DYING = (0.0, 1.0, 5.0, 20.0)
QUICK_PEERS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", nargs="+", type=int, default=list(PEERS), metavar="N", help="how many holders")
    parser.add_argument(
        "--dying", nargs="+", type=float, default=list(DYING), metavar="P", help="percent that die during the round"
    )
    parser.add_argument("--bits", type=int, default=4, choices=(2, 4, 8, 32), help="on the wire (4)")
    parser.add_argument("--blocks", type=int, default=4, metavar="N", help="of 256 values that are averaged (4)")
    parser.add_argument("--robust", action="store_true", help="with robust combination (the exact mean)")
    parser.add_argument("--seeds", type=int, default=3, help="how often, with other deaths (3)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises ConfigError where there is nothing to measure."""
    if min(options.peers) < 1 or options.blocks < 1 or options.seeds < 1 or not all(
        0 <= percent < 100 for percent in options.dying
    ):
        raise ConfigError(
            "--peers, --blocks and --seeds must be positive, --dying at least 0 and under 100",
            do="leave them out, or give other ones",
        )
    averaging = AveragingConfig(bits=options.bits, robust=options.robust)
    rows = []
    for count in sorted({min(count, QUICK_PEERS) for count in options.peers} if options.quick else options.peers):
        for percent in options.dying:
            seeds = range(1 if options.quick else options.seeds)
            began = time.monotonic()
            runs = [
                Round(count, averaging, dying=percent / 100, num_blocks=options.blocks, seed=seed).play()
                for seed in seeds
            ]
            grids = [moshpit(count, dying=percent / 100, seed=seed) for seed in seeds]
            rows.append({
                "peers": count, "dying_percent": percent, "figures": tables.spreads(runs),
                "moshpit": tables.spreads(grids), "seconds": round(time.monotonic() - began, 1),
            })
            print(line(rows[-1]), flush=True)
    return {"bits": options.bits, "robust": options.robust, "rows": rows}


def line(row: dict[str, Any]) -> str:
    figures = row["figures"]
    return (
        f"{row['peers']} holders, {row['dying_percent']:g} % die: {tables.shown(figures.get('contributed'), scale=100)}"
        f" % contributed, {tables.shown(figures.get('truths'), digits=0) or 'no'} truth, {row['seconds']} s"
    )


def table(result: dict[str, Any]) -> str:
    header = [
        "holders", "die, %", "groups", "legs", "sent, mean", "sent, most", "contributed, %", "error", "truths",
        "Moshpit: truths", "error", "apart",
    ]
    rows = []
    for row in result["rows"]:
        figures, grid = row["figures"], row["moshpit"]

        def shown(name: str, digits: int = 2, scale: float = 1.0, figures: dict[str, Any] = figures) -> str:
            return tables.shown(figures.get(name), digits=digits, scale=scale)

        error = figures.get("error")
        rows.append([
            row["peers"], f"{row['dying_percent']:g}", shown("groups", 0), shown("legs", 0), shown("sent_mean"),
            shown("sent_most"), shown("contributed", 1, 100), f"{error['median']:.1e}" if error else "",
            shown("truths", 0), tables.shown(grid["truths"], digits=0), f"{grid['error']['median']:.1e}",
            f"{grid['spread']['median']:.1e}",
        ])
    legend = (
        f"{result['bits']} bits, {'robust' if result['robust'] else 'plain'} mean; sent: 1 is one butterfly of 64;"
        " error: relative L2 of the mean; apart: how far Moshpit's peers are from each other"
    )
    return tables.markdown(header, rows) + "\n\n" + legend
