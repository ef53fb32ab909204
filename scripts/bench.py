#!/usr/bin/env python3
"""Benchmarks: each prints a table and writes a JSON file with figures, spread, machine and commit.

    scripts/bench.py loss            held-out loss by bits on the wire (about 20 minutes)
    scripts/bench.py loss --quick    the same on a tenth of the tokens, one seed
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benches import loss

BENCHES = {bench.NAME: bench for bench in (loss,)}


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    bench = BENCHES[options.name]
    began = time.time()
    result = bench.measure(options)
    print(bench.table(result))
    document = {"bench": options.name, "result": result, "seconds": round(time.time() - began, 1), **environment()}
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written to {options.out}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True)
    for name, bench in BENCHES.items():
        sub = names.add_parser(name, help=bench.HELP)
        sub.add_argument("--quick", action="store_true", help="small, to see that it works")
        sub.add_argument("--out", type=Path, help="JSON file for the figures")
        bench.add_arguments(sub)
    return parser


def environment() -> dict[str, object]:
    """What a reader needs to judge the figures."""
    import torch

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "commit": git.stdout.strip() or "unknown", "python": platform.python_version(), "torch": torch.__version__,
        "machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    sys.exit(main())
