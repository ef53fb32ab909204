#!/usr/bin/env python3
"""Simulated swarms under drawn schedules of faults: the product's own averaging, a made-up network and clock.

    scripts/faults.py                    1,000 schedules on all cores; the test suite plays the same ones
    scripts/faults.py --count 100000     more
    scripts/faults.py --seed 42          one, with a log of what happened

After each it is checked that all peers agree (I1), that every token is in one commit, in its peer's drift, or died with
a process (I2), and that nobody waits for ever (I3), whoever died (I5). A failure is printed with its seed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the simulation lives with the tests

from entry import guarded, start

PROGRESS_S = 10.0
AT_ONCE = 20
"""schedules that a process is given at a time"""


@dataclass(frozen=True)
class Played:
    """What is worth telling of one schedule."""

    seed: int
    problem: str
    commits: int
    tokens_trained: int
    tokens_lost: int
    simulated_s: float
    going_on_s: float
    settling_s: float


@dataclass
class Sum:
    """Of all schedules so far."""

    played: int = 0
    commits: int = 0
    tokens_trained: int = 0
    tokens_lost: int = 0
    simulated_s: float = 0.0
    going_on_s: list[float] = field(default_factory=list)
    settling_s: list[float] = field(default_factory=list)
    failed: list[Played] = field(default_factory=list)

    def add(self, one: Played) -> None:
        self.played += 1
        self.commits += one.commits
        self.tokens_trained += one.tokens_trained
        self.tokens_lost += one.tokens_lost
        self.simulated_s += one.simulated_s
        if one.problem:
            self.failed.append(one)
        else:
            self.going_on_s.append(one.going_on_s)
            self.settling_s.append(one.settling_s)

    def text(self) -> str:
        lost = 100 * self.tokens_lost / max(1, self.tokens_trained)
        return "\n".join([
            f"{self.played} schedules, {self.simulated_s / 3600:.1f} simulated hours, {self.commits} commits",
            f"{self.tokens_trained} tokens trained; {self.tokens_lost} ({lost:.1f} %) died with killed processes",
            f"after the last fault, until every peer had a new commit: {spread(self.going_on_s)}",
            f"then, until all that was learnt was in commits that all have: {spread(self.settling_s)}",
            f"failed: {len(self.failed)}",
        ])


def spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    if not ordered:
        return "never"
    return f"median {ordered[len(ordered) // 2]:.0f} s, 99 % within {ordered[len(ordered) * 99 // 100]:.0f} s, " \
        f"longest {ordered[-1]:.0f} s"


def play_one(seed: int) -> Played:
    from tests.unit.averaging.faults.schedule import draw
    from tests.unit.averaging.faults.story import outcome_of

    outcome = outcome_of(draw(seed))
    return Played(
        seed, outcome.problem, outcome.commits, outcome.tokens_trained, outcome.tokens_lost, outcome.simulated_s,
        outcome.going_on_s, outcome.settling_s,
    )


def play_many(first: int, count: int, *, processes: int) -> int:
    began = said = time.monotonic()
    total = Sum()
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=_quiet) as pool:
        for one in pool.imap_unordered(play_one, range(first, first + count), chunksize=AT_ONCE):
            total.add(one)
            if one.problem:
                print(f"seed {one.seed}: {one.problem}", flush=True)
                print(f"  see it again: scripts/faults.py --seed {one.seed}", flush=True)
            if time.monotonic() - said > PROGRESS_S:
                said = time.monotonic()
                print(f"{total.played} of {count}, {len(total.failed)} failed, {said - began:.0f} s", flush=True)
    print(total.text())
    print(f"{time.monotonic() - began:.0f} s on {processes} cores")
    return 1 if total.failed else 0


def play_with_log(seed: int) -> int:
    from tests.unit.averaging.faults.schedule import draw
    from tests.unit.averaging.faults.story import outcome_of

    _quiet()
    outcome = outcome_of(draw(seed), notes=True)
    print(outcome.schedule.text())
    print("\n".join(outcome.log))
    print(f"{outcome.problem or 'all holds'}; {outcome.tokens_lost} of {outcome.tokens_trained} tokens died")
    return 1 if outcome.problem else 0


def _quiet() -> None:
    import torch

    torch.set_num_threads(1)


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    if options.seed is not None:
        return guarded(lambda: play_with_log(options.seed))
    return guarded(lambda: play_many(options.first, options.count, processes=options.processes))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=_positive, default=1000, help="schedules (1000)")
    parser.add_argument("--first", type=_natural, default=0, help="seed of the first one (0)")
    parser.add_argument("--processes", type=_positive, default=os.cpu_count() or 1, help="at a time (as many as cores)")
    parser.add_argument("--seed", type=_natural, help="only this one, with a log")
    return parser


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    number = _natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


if __name__ == "__main__":
    start(main)
