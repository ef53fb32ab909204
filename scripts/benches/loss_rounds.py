"""How far can traffic go down? Peers that average seldom and roughly, against one synchronous process that sees the
same batches (benches/lockstep.py); bytes are counted as a peer sends them, against data parallelism in bf16.

    checkpoint   the situation of GPT-JT: a model is trained plainly, then goes on in a swarm. Each process begins there
                 with weights alone, the synchronous one too
    cold         a swarm from the start, with rounds of one length, and with rounds that grow to that length

Momentum and learning rate of the outer step are those that follow from the number of rounds
(swarm/averaging/outer_settings.py), whatever the run file says, unless --set says others.
How long rounds are follows from the ratio that is asked for (`inner_steps`). The total batch is the same for any number
of peers, and so is the text: one synchronous process is the baseline of all rows of a seed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from benches import options as common
from benches import table as tables
from benches.kept import Kept
from benches.lockstep import Alone, Simulation, Weights
from benches.pipeline_loss import Text
from swarm.averaging.layout import Layout
from swarm.averaging.outer_settings import momentum_of
from swarm.config import AveragingConfig, RunConfig
from swarm.errors import ConfigError
from swarm.host.device import choose_device
from swarm.network import codec
from swarm.train.run_source import hold

TOTAL_SEQUENCES = 16
"""of one inner step of all peers together: 2,048 tokens in the demo"""
FIRST_TOKENS, MORE_TOKENS = 2_000_000, 5_300_000
"""of the checkpoint, and after it: 35 rounds at 500 times fewer bytes"""
COLD_TOKENS = 4_000_000
RATIOS = {"checkpoint": [203, 505, 1020, 2100], "cold": [152, 305]}
"""a little over what is meant: first rounds are staggered, and the last one is early, which costs a round"""
BITS_UP_TO_210 = 4
"""as many as cost nothing where rounds are short anyway; 2 beyond, since it is the number of rounds that decides"""
RAMP_FROM, RAMP_SHARE = 4, 0.25
"""the first rounds are a quarter as long, and grow through the first quarter of the run"""
QUICK_STEPS = 24
BF16_BYTES = 2
SHOWN_S = 60.0


@dataclass(frozen=True)
class Row:
    """What one row of the table measures."""

    peers: int
    ratio: float
    """times fewer bytes than data parallelism, as it was asked for"""
    bits: int
    ramp: bool = False

    @property
    def name(self) -> str:
        return f"{self.peers} peers, {self.ratio:g}x, {self.bits} bits" + (", growing rounds" if self.ramp else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--first-tokens", type=int, default=FIRST_TOKENS, metavar="N", help=f"checkpoint: before it ({FIRST_TOKENS})"
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", metavar="X",
        help="checkpoint, cold: times fewer bytes (203 505 1020 2100; cold: 152 305)",
    )
    parser.add_argument("--rough-bits", type=int, default=2, help="checkpoint, cold: bits of all rows over 210 (2)")
    parser.add_argument("--device", default="cpu", help="checkpoint, cold: where the models are, as a peer's (cpu)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="checkpoint, cold: runs at once (1)")


def measure(options: argparse.Namespace, run: RunConfig, text: Text) -> dict[str, Any]:
    rows = rows_of(options)
    if any(TOTAL_SEQUENCES % row.peers for row in rows):
        raise ConfigError("--peers must divide the total batch", why=f"it has {TOTAL_SEQUENCES} sequences")
    first = options.first_tokens if options.case == "checkpoint" else 0
    more = options.tokens or (MORE_TOKENS if options.case == "checkpoint" else COLD_TOKENS)
    if options.quick:
        step = TOTAL_SEQUENCES * run.train.sequence_length
        first, more = QUICK_STEPS * step if first else 0, QUICK_STEPS * step
    run = replace(run, train=replace(run.train, total_tokens=first + more))
    said = common.settings(options.set).get("averaging", {})
    left_open = {name: said.get(name) for name in ("outer_learning_rate", "outer_momentum")}
    run = replace(run, averaging=replace(run.averaging, **left_open))  # the demo's are for its short rounds
    device, _ = choose_device(options.device, 1)
    study = Study(text, Kept(options.out.with_suffix(".kept")), before=first, device=device)
    runs = [replace(run, seed=run.seed + number) for number in range(1 if options.quick else options.seeds)]
    if options.jobs > 1:
        at_once(study, runs, rows, jobs=options.jobs)
    found: dict[str, list[dict[str, Any]]] = {}
    for own in runs:
        base = study.figures(own, None)
        found.setdefault("alone", []).append(base)
        for row in rows:
            one = study.figures(own, row)
            gap = 100 * (one["loss"] / base["loss"] - 1)
            found.setdefault(row.name, []).append({**one, "gap_percent": round(gap, 3)})
            print(
                f"seed {own.seed}  {row.name}: {one['loss']:.4f} nats/token, {gap:+.2f} % of {base['loss']:.4f},"
                f" {one['rounds']} rounds, {one['less_than_ddp']:.0f}x less than bf16 DDP", flush=True,
            )
    return {
        "case": options.case, "first_tokens": first, "tokens": more, "total_sequences": TOTAL_SEQUENCES,
        "loss_of_checkpoint": [one["loss_before"] for one in found["alone"]],
        "alone": tables.spread([one["loss"] for one in found.pop("alone")]),
        "rows": [summary(name, runs) for name, runs in found.items()],
    }


def rows_of(options: argparse.Namespace) -> list[Row]:
    """In the order in which they are measured."""
    ratios = options.ratios or RATIOS[options.case]
    ramps = (False, True) if options.case == "cold" else (False,)
    return [
        Row(peers, ratio, bits=BITS_UP_TO_210 if ratio <= 210 and options.case != "cold" else options.rough_bits,
            ramp=ramp)
        for peers in options.peers or (4, 8) for ratio in ratios for ramp in ramps
    ]


@dataclass(frozen=True)
class Study:
    """What all runs have in common. Each run's figures are kept as soon as they are there."""

    text: Text
    kept: Kept
    before: int
    """tokens of the checkpoint; 0: there is none"""
    device: torch.device

    def checkpoint(self, run: RunConfig) -> Weights | None:
        """Weights after so many tokens of plain training, of the schedule of the whole run."""
        if not self.before:
            return None
        key = f"checkpoint of {self.before} {plain(run).run_id} {TOTAL_SEQUENCES}"
        weights = self.kept.weights(key)
        if weights is None:
            own = replace(run, train=replace(run.train, batch_sequences=TOTAL_SEQUENCES))
            alone = Alone(own, num_peers=1, tokens=self.text.tokens, device=self.device)
            weights = trained(alone, until=self.before, name=f"seed {run.seed} checkpoint")
            self.kept.keep_weights(key, weights)
        return weights

    def figures(self, run: RunConfig, row: Row | None) -> dict[str, Any]:
        """Of one run to the end; `row` None: of the synchronous process."""
        own = run if row is None else setup(run, row, layouts=hold(run).layouts.values(), before=self.before)
        key = f"{self.before} {(plain(own) if row is None else own).run_id} {TOTAL_SEQUENCES} {row}"
        found = self.kept.figures(key)
        if found is None:
            began, start = time.process_time(), self.checkpoint(run)
            found = self._alone(own, start) if row is None else self._swarm(own, row, start)
            found["cpu_s"] = round(time.process_time() - began)
            self.kept.keep(key, found)
        return found

    def _alone(self, run: RunConfig, start: Weights | None) -> dict[str, Any]:
        whole = replace(run, train=replace(run.train, batch_sequences=TOTAL_SEQUENCES))
        alone = Alone(
            whole, num_peers=1, tokens=self.text.tokens, start=start, before=self.before, device=self.device
        )
        loss_before = self._loss(run, alone.weights())
        weights = trained(alone, until=run.train.total_tokens, name=f"seed {run.seed} alone")
        return {"loss_before": loss_before, "loss": self._loss(run, weights)}

    def _swarm(self, run: RunConfig, row: Row, start: Weights | None) -> dict[str, Any]:
        swarm = Simulation(
            run, num_peers=row.peers, tokens=self.text.tokens, start=start, before=self.before, device=self.device
        )
        weights = trained(swarm, until=run.train.total_tokens, name=f"seed {run.seed} {row.name}")
        layouts = swarm.peers[0].held.layouts.values()
        step_tokens = TOTAL_SEQUENCES * run.train.sequence_length
        steps = (swarm.tokens - self.before) / step_tokens
        sent = swarm.bytes_sent / row.peers
        return {
            "rounds": min(ledger.state.version for ledger in swarm.peers[0].ledgers), "bytes_sent_each": round(sent),
            "less_than_ddp": round(steps * ddp_bytes(layouts, row.peers) / sent, 1),
            "inner_steps": run.averaging.tokens_per_round // step_tokens, "loss": self._loss(run, weights),
        }

    def _loss(self, run: RunConfig, weights: Weights) -> float:
        return self.text.loss(run, weights, device=self.device)


def at_once(study: Study, runs: Sequence[RunConfig], rows: Sequence[Row], *, jobs: int) -> None:
    """Find out, and keep, what is not there yet: so many runs at a time, each with one thread of its own."""
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(study.checkpoint, runs))
        asked = [(run, row) for row in (None, *sorted(rows, key=lambda row: -row.peers)) for run in runs]
        for done in [pool.submit(study.figures, run, row) for run, row in asked]:
            done.result()


def plain(run: RunConfig) -> RunConfig:
    """What a synchronous process knows of it: settings of rounds change nothing there."""
    return replace(run, averaging=AveragingConfig())


def setup(run: RunConfig, row: Row, *, layouts: Iterable[Layout], before: int) -> RunConfig:
    """The run of a row: as many sequences for each peer as make the total batch, rounds as long as the ratio asks."""
    step_tokens = TOTAL_SEQUENCES * run.train.sequence_length
    length = inner_steps(row, layouts) * step_tokens
    averaging = replace(run.averaging, bits=row.bits, tokens_per_round=length)
    if before and averaging.outer_momentum is None:  # rounds begin after the checkpoint, which no run config knows of
        momentum = momentum_of((run.train.total_tokens - before) / length)
        averaging = replace(averaging, outer_momentum=momentum)
    if row.ramp:
        ramp = round(RAMP_SHARE * (run.train.total_tokens - before))
        averaging = replace(averaging, first_round_tokens=max(1, length // RAMP_FROM), ramp_tokens=ramp)
    train = replace(run.train, batch_sequences=TOTAL_SEQUENCES // row.peers)
    return replace(run, train=train, averaging=averaging)


def inner_steps(row: Row, layouts: Iterable[Layout]) -> int:
    """Between two rounds of a fragment, so that each peer sends `ratio` times less than data parallelism does."""
    layouts = list(layouts)
    return max(1, math.ceil(row.ratio * round_bytes(layouts, row.peers, row.bits) / ddp_bytes(layouts, row.peers)))


def round_bytes(layouts: Iterable[Layout], num_peers: int, bits: int) -> float:
    """Sent by each peer in a round of every fragment: all but its own part to those parts' owners, and its own part's
    result to all others."""
    whole = sum(
        codec.encoded_bytes(layout.num_fine_blocks, layout.num_blocks - layout.num_fine_blocks, bits)
        for layout in layouts
    )
    return 2 * whole * (num_peers - 1) / num_peers


def ddp_bytes(layouts: Iterable[Layout], num_peers: int) -> float:
    """Sent by each of so many processes in one step of data parallelism: a ring all-reduce of bf16 gradients."""
    return 2 * BF16_BYTES * sum(layout.num_parameters for layout in layouts) * (num_peers - 1) / num_peers


def trained(process: Simulation | Alone, *, until: int, name: str) -> dict[int, Any]:
    """Its weights at the end."""
    shown = began = time.monotonic()
    first = process.tokens
    while process.tokens < until:
        process.step()
        if time.monotonic() - shown > SHOWN_S:
            shown = time.monotonic()
            speed = (process.tokens - first) / (shown - began)
            print(f"  {name}: {process.tokens:,} of {until:,} tokens  {speed:,.0f} tok/s", flush=True)
    return process.weights()


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    gaps = [one["gap_percent"] for one in runs]
    return {
        "name": name, **tables.spreads(runs), "gaps": gaps, "median_gap_percent": round(statistics.median(gaps), 3),
    }


def table(result: Mapping[str, Any]) -> str:
    rows = [
        [
            row["name"], tables.shown(row["less_than_ddp"], digits=0), tables.shown(row["inner_steps"], digits=0),
            tables.shown(row["rounds"], digits=0), tables.shown(row["bytes_sent_each"], digits=1, scale=1e-6),
            tables.shown(row["loss"], digits=4), f"{row['median_gap_percent']:+.2f}",
            ", ".join(f"{gap:+.2f}" for gap in row["gaps"]),
        ]
        for row in result["rows"]
    ]
    header = ["", "less than bf16 DDP", "H", "rounds", "MB sent a peer", "held-out loss", "gap, %", "of each seed, %"]
    before = f" after a checkpoint of {result['first_tokens']:,}" if result["first_tokens"] else " from cold"
    return "\n".join([
        tables.markdown(header, rows), "",
        f"{result['tokens']:,} tokens{before}; one synchronous process with the same batches:"
        f" {tables.shown(result['alone'], digits=4)} nats/token"
        f" ({', '.join(f'{value:.3f}' for value in result['loss_of_checkpoint'])} before)",
    ])
