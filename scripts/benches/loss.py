"""What rounds cost: held-out loss in lock-step (benches/lockstep.py), same seeds, same tokens.

    bits         is quantisation free? fewer bits on the wire against fp32, with the rounds of the run config
    checkpoint   from a trained model: 200 to 2000 times fewer bytes than data parallelism (loss_rounds.py)
    cold         the same from scratch, with and without rounds that grow
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from benches import loss_rounds
from benches import options as common
from benches.lockstep import Simulation
from benches.pipeline_loss import Text
from swarm.config import RunConfig
from swarm.data.batch import Batch
from swarm.model.evaluate import held_out_loss
from swarm.train.run_source import load_states

NAME = "loss"
HELP = "held-out loss by bits on the wire and length of rounds, same seeds and tokens"
CASES = ("bits", "checkpoint", "cold")
QUICK_TOKENS = 100_000
QUICK_SEQUENCES, SEQUENCES = 60, 400
"""held out"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_run(parser)
    parser.add_argument("--case", choices=CASES, default="bits", help="what to find out (bits)")
    parser.add_argument("--peers", type=int, nargs="+", metavar="N", help="how many (bits: 3; else 4 and 8)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument(
        "--tokens", type=int, help="of the whole swarm; with a checkpoint: after it (bits: the run config's)"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 8, 4], help="bits: a value on the wire (32 8 4)")
    loss_rounds.add_arguments(parser)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    run = common.run_of(options)
    text = Text(run, num_sequences=QUICK_SEQUENCES if options.quick else SEQUENCES)
    if options.case != "bits":
        return loss_rounds.measure(options, run, text)
    total = options.tokens or (QUICK_TOKENS if options.quick else run.train.total_tokens)
    seeds = 1 if options.quick else options.seeds
    num_peers = (options.peers or [3])[0]
    losses: dict[int, list[float]] = {bits: [] for bits in options.bits}
    for seed in range(run.seed, run.seed + seeds):
        for bits in options.bits:
            setup = replace(
                run, seed=seed, train=replace(run.train, total_tokens=total),
                averaging=replace(run.averaging, bits=bits),
            )
            losses[bits].append(one(setup, text.tokens, text.sequences, num_peers=num_peers))
            print(f"seed {seed}  {bits:2} bits  {losses[bits][-1]:.4f} nats/token", flush=True)
    rows = {
        str(bits): {
            "median": statistics.median(values), "min": min(values), "max": max(values), "losses": values,
            "gap_percent": [
                round(100 * (value / base - 1), 3)
                for value, base in zip(values, losses[options.bits[0]], strict=True)
            ],
        }
        for bits, values in losses.items()
    }
    return {"tokens": total, "peers": num_peers, "seeds": seeds, "baseline_bits": options.bits[0], "bits": rows}


def one(run: RunConfig, tokens: torch.Tensor, sequences: Batch, *, num_peers: int) -> float:
    """Held-out loss of the global weights after the run's total tokens."""
    simulation = Simulation(run, num_peers=num_peers, tokens=tokens)
    began = time.monotonic()
    shown = began
    while simulation.tokens < run.train.total_tokens:
        simulation.step()
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"  {simulation.tokens:,} tokens  {simulation.tokens / (shown - began):,.0f} tok/s", flush=True)
    simulation.finish()
    held = simulation.peers[0].held
    load_states(held, [ledger.state for ledger in simulation.peers[0].ledgers])
    return held_out_loss(held.model, sequences)


def table(result: dict[str, Any]) -> str:
    if "rows" in result:
        return loss_rounds.table(result)
    lines = [f"{result['peers']} peers, {result['tokens']:,} tokens, {result['seeds']} seeds; held-out nats/token"]
    lines.append("| bits | median | min | max | gap of each seed, % |")
    lines.append("|---|---|---|---|---|")
    for bits, row in result["bits"].items():
        gaps = ", ".join(f"{gap:+.2f}" for gap in row["gap_percent"])
        lines.append(f"| {bits} | {row['median']:.4f} | {row['min']:.4f} | {row['max']:.4f} | {gaps} |")
    return "\n".join(lines)
