#!/usr/bin/env python3
"""Benchmarks: each prints a table and writes a JSON file with figures, spread, machine and commit.

    scripts/bench.py loss       held-out loss by bits on the wire (about 20 minutes)
    scripts/bench.py wan        tokens per second over WAN links, against the same peers with networking off
    scripts/bench.py traffic    bytes a token, against data parallelism in bf16, and the loss that it costs
    scripts/bench.py round      seconds of a round, against what the lines allow
    scripts/bench.py overlap    a peer's inner steps while a round is under way, against those without
    scripts/bench.py join       seconds until a newcomer's tokens count
    scripts/bench.py memory     a model that fits on no peer: each one's peak of memory against its plan
    scripts/bench.py churn      speed and tokens that are kept while peers die, freeze and lose each other
    scripts/bench.py placement  efficiency of rules by which peers choose fragments (simulated)
    scripts/bench.py pipeline   a model in stages: speed, churn, loss
    scripts/bench.py objectives   tokens a second of causal, prefix-LM, UL2 and UL2R examples, with packing
    scripts/bench.py codec      GB a CPU-second, error and bytes of values by bits on the wire (a minute)
    scripts/bench.py groups     rounds of up to 10,000 holders while peers die (simulated, minutes)
    scripts/bench.py many       64 real peers on this machine, several to a process: do rounds lose anybody?
    scripts/bench.py poison     loss with poisoners among the peers, with and without the defence (an hour)
    scripts/bench.py recipe     GPT-JT's recipe in small, in a swarm of four, against causal only (about 20 minutes)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whichever one is installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from benches import (
    churn,
    codec,
    groups,
    join,
    loss,
    many,
    memory,
    objectives,
    overlap,
    pipeline,
    placement,
    poison,
    recipe,
    traffic,
    wan,
)
from benches import round as rounds
from entry import guarded, start

BENCHES = {
    bench.NAME: bench
    for bench in (
        loss, wan, traffic, rounds, join, churn, placement, pipeline, memory, objectives, recipe, codec, poison,
        overlap, groups, many,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    bench = BENCHES[options.name]
    began = time.time()
    machine = environment()
    result = bench.measure(options)
    document = {"bench": options.name, "result": result, "seconds": round(time.time() - began, 1), **machine}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(bench.table(result))
    print(f"written to {options.out}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True)
    for name, bench in BENCHES.items():
        sub = names.add_parser(name, help=bench.HELP)
        sub.add_argument("--quick", action="store_true", help="small, to see that it works")
        out = Path(f"bench-{name}.json")
        sub.add_argument("--out", type=Path, default=out, help=f"JSON file for the figures ({out})")
        bench.add_arguments(sub)
    return parser


def environment() -> dict[str, object]:
    """What a reader needs to judge the figures."""
    import torch

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") or "unknown", "changed": bool(git("status", "--porcelain")),
        "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
        "kernel": platform.release(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0],
    }


if __name__ == "__main__":
    start(main)
