"""How far can traffic go down? Peers that average seldom and roughly, against one synchronous process that sees the
same batches (benches/lockstep.py); bytes are counted as a peer sends them, against data parallelism in bf16.

    checkpoint   the situation of GPT-JT: a model is trained plainly, then goes on in a swarm. Each process begins there
                 with weights alone, the synchronous one too
    cold         a swarm from the start, with rounds of one length, and with rounds that grow to that length

How long rounds are follows from the ratio that is asked for (`inner_steps`). The total batch is the same for any number
of peers, and so is the text: one synchronous process is the baseline of all rows of a seed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benches import table as tables
from benches.kept import Kept
from benches.lockstep import Alone, Simulation, Weights
from benches.pipeline_loss import Text
from swarm.averaging.layout import Layout
from swarm.config import AveragingConfig, RunConfig
from swarm.errors import ConfigError
from swarm.network import codec
from swarm.train.run_source import hold

TOTAL_SEQUENCES = 16
"""of one inner step of all peers together: 2,048 tokens in the demo"""
FIRST_TOKENS, MORE_TOKENS = 2_000_000, 5_300_000
"""of the checkpoint, and after it: 31 rounds at 500 times fewer bytes"""
COLD_TOKENS = 4_000_000
RATIOS = {"checkpoint": [200, 500, 1000, 2000], "cold": [150, 300]}
BITS_UP_TO_200 = 4
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
        help="checkpoint, cold: times fewer bytes (200 500 1000 2000; cold: 150 300)",
    )
    parser.add_argument("--rough-bits", type=int, default=2, help="checkpoint, cold: bits of all rows over 200 (2)")


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
    kept = Kept(options.out.with_suffix(".kept"))
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(run.seed, run.seed + (1 if options.quick else options.seeds)):
        own = replace(run, seed=seed)
        start = checkpoint(own, text, first, kept) if first else None
        base = figures(own, text, start, before=first, row=None, kept=kept)
        found.setdefault("alone", []).append(base)
        for row in rows:
            one = figures(own, text, start, before=first, row=row, kept=kept)
            gap = 100 * (one["loss"] / base["loss"] - 1)
            found.setdefault(row.name, []).append({**one, "gap_percent": round(gap, 3)})
            print(
                f"seed {seed}  {row.name}: {one['loss']:.4f} nats/token, {gap:+.2f} % of {base['loss']:.4f},"
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
        Row(peers, ratio, bits=BITS_UP_TO_200 if ratio <= 200 and options.case != "cold" else options.rough_bits,
            ramp=ramp)
        for peers in options.peers or (4, 8) for ratio in ratios for ramp in ramps
    ]


def checkpoint(run: RunConfig, text: Text, tokens: int, kept: Kept) -> Weights:
    """Weights after so many tokens of plain training, of the schedule of the whole run."""
    key = f"checkpoint of {tokens} {plain(run).run_id} {TOTAL_SEQUENCES}"
    weights = kept.weights(key)
    if weights is None:
        own = replace(run, train=replace(run.train, batch_sequences=TOTAL_SEQUENCES))
        weights = trained(Alone(own, num_peers=1, tokens=text.tokens), until=tokens, name=f"seed {run.seed} checkpoint")
        kept.keep_weights(key, weights)
    return weights


def figures(
    run: RunConfig, text: Text, start: Weights | None, *, before: int, row: Row | None, kept: Kept
) -> dict[str, Any]:
    """Of one run to the end; `row` None: of the synchronous process."""
    own = run if row is None else setup(run, row, layouts=hold(run).layouts.values(), before=before)
    key = f"{before} {(plain(own) if row is None else own).run_id} {TOTAL_SEQUENCES} {row}"
    found = kept.figures(key)
    if found is not None:
        return found
    began = time.process_time()
    if row is None:
        whole = replace(own, train=replace(own.train, batch_sequences=TOTAL_SEQUENCES))
        alone = Alone(whole, num_peers=1, tokens=text.tokens, start=start, before=before)
        before_loss = text.loss(own, alone.weights())
        weights = trained(alone, until=own.train.total_tokens, name=f"seed {run.seed} alone")
        found = {"loss_before": before_loss}
    else:
        swarm = Simulation(own, num_peers=row.peers, tokens=text.tokens, start=start, before=before)
        weights = trained(swarm, until=own.train.total_tokens, name=f"seed {run.seed} {row.name}")
        layouts = swarm.peers[0].held.layouts.values()
        steps = (swarm.tokens - before) / (TOTAL_SEQUENCES * run.train.sequence_length)
        sent = swarm.bytes_sent / row.peers
        found = {
            "rounds": min(ledger.state.version for ledger in swarm.peers[0].ledgers), "bytes_sent_each": round(sent),
            "less_than_ddp": round(steps * ddp_bytes(layouts, row.peers) / sent, 1),
            "inner_steps": own.averaging.tokens_per_round // (TOTAL_SEQUENCES * run.train.sequence_length),
        }
    found = {**found, "loss": text.loss(own, weights), "cpu_s": round(time.process_time() - began)}
    kept.keep(key, found)
    return found


def plain(run: RunConfig) -> RunConfig:
    """What a synchronous process knows of it: settings of rounds change nothing there."""
    return replace(run, averaging=AveragingConfig())


def setup(run: RunConfig, row: Row, *, layouts: Iterable[Layout], before: int) -> RunConfig:
    """The run of a row: as many sequences for each peer as make the total batch, rounds as long as the ratio asks."""
    step_tokens = TOTAL_SEQUENCES * run.train.sequence_length
    length = inner_steps(row, layouts) * step_tokens
    averaging = replace(run.averaging, bits=row.bits, tokens_per_round=length)
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
