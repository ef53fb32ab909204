"""What `swarm.evaluate` and `swarm.chat` have in common on the command line. Nothing heavy: --help must not wait."""

from __future__ import annotations

import argparse
from pathlib import Path

BASE = "folder with the frozen model of a run with adapters (default: the one that its peer used)"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", nargs="?", type=Path, metavar="TARGET", help="an export, a peer's home folder, or a checkpoint"
    )
    parser.add_argument(
        "--initial-peers", nargs="+", metavar="MADDR", help="or peers of a live swarm: from a join line"
    )
    parser.add_argument("--run-id", metavar="ID", help="which run, where there are several")
    parser.add_argument("--base", metavar="DIR", help=BASE)
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto | cpu | cuda | cuda:N | mps (auto)")
    parser.add_argument(
        "--join-timeout-s", type=float, default=20.0, metavar="S", help="give up joining after this long (20)"
    )


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if (options.target is None) == (options.initial_peers is None):
        parser.error("give one of TARGET and --initial-peers")
    if options.base is not None and options.initial_peers:
        parser.error("--base is for a home folder or a checkpoint: a live swarm has its own")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def at_least_zero(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError("must be at least 0")
    return number
