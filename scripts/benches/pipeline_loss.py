"""Do stages cost quality? Held-out loss, same seeds, same tokens, everything in one process (benches/lockchain.py).

    links    one holder a stage: int8 between the stages, or int4 forward and int8 back, against fp32
    mixed    from a checkpoint: several holders a stage, a random one for each microbatch, local steps and a round of
             each fragment after 20 of them, against one process whose inner steps have the batches of all origins
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from benches import options as common
from benches import table as tables
from benches.lockchain import FP32, LockChain, Weights, schedule_of
from benches.lockstep import CPU
from swarm.config import RunConfig
from swarm.data.sources import documents
from swarm.data.stream import held_out_batches, tokenise
from swarm.data.tokenizer import load_tokenizer
from swarm.model.evaluate import held_out_loss
from swarm.train.run_source import hold

EDGES = (0, 1, 3, 4)
"""three stages of the demo's four fragments"""
NUM_HOLDERS = 3
LOCAL_STEPS = 20
"""inner steps of a holder between two rounds of a fragment"""
INT8 = 8
LINKS = {"fp32": (FP32, FP32), "int8": (INT8, INT8), "int4": (4, INT8)}
"""bits of activations, and of their gradients"""
BASE_TOKENS, MORE_TOKENS = 400_000, 600_000
"""of the checkpoint, and after it"""
QUICK_TOKENS = 4_096
QUICK_SEQUENCES = 60
SHOWN_S = 30.0
HELD_OUT_SEQUENCES = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3, help="loss: how many (3)")
    parser.add_argument(
        "--link-tokens", type=int, default=MORE_TOKENS, metavar="N", help=f"loss: over links ({MORE_TOKENS})"
    )
    parser.add_argument(
        "--mixed-tokens", type=int, nargs=2, default=[BASE_TOKENS, MORE_TOKENS], metavar="N",
        help=f"loss: of the checkpoint, and after it ({BASE_TOKENS} {MORE_TOKENS})",
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    run = common.run_of(options)
    link_tokens, (base, more) = options.link_tokens, options.mixed_tokens
    seeds = options.seeds
    if options.quick:
        link_tokens, base, more, seeds = QUICK_TOKENS, QUICK_TOKENS, QUICK_TOKENS, 1
    text = Text(run, num_sequences=QUICK_SEQUENCES if options.quick else HELD_OUT_SEQUENCES)
    found: dict[str, list[float]] = {name: [] for name in (*LINKS, "checkpoint", "one process", "mixed")}
    for seed in range(seeds):
        own = dataclasses.replace(run, seed=run.seed + seed)
        for name, (bits, back_bits) in LINKS.items():
            weights = links(own, text.tokens, bits=bits, back_bits=back_bits, total=link_tokens)
            found[name].append(text.loss(own, weights))
        mixed_run = schedule_of(own, train={"total_tokens": base + more})
        start = trained(LockChain(mixed_run, [0, run.fragments], text.tokens, bits=FP32), until=base)
        found["checkpoint"].append(text.loss(own, start))
        for name, num_holders in (("one process", 1), ("mixed", NUM_HOLDERS)):
            weights = continued(mixed_run, text.tokens, start, before=base, num_holders=num_holders)
            found[name].append(text.loss(own, weights))
        print("  seed", own.seed, {name: round(values[-1], 4) for name, values in found.items()}, flush=True)
    rows = [
        row("links int8", found["int8"], "links fp32", found["fp32"]),
        row("links int4 forward, int8 back", found["int4"], "links fp32", found["fp32"]),
        row(f"mixed stages, H = {LOCAL_STEPS}", found["mixed"], "one process", found["one process"]),
    ]
    return {
        "edges": list(EDGES), "num_holders": NUM_HOLDERS, "link_tokens": link_tokens, "mixed_tokens": [base, more],
        "losses": found, "rows": rows, "learnt": found["checkpoint"],
    }


class Text:
    """What is learnt, and what is held out to judge by."""

    def __init__(self, run: RunConfig, *, num_sequences: int) -> None:
        train, held_out = documents(run.data)
        tokenizer = load_tokenizer(run)
        self.tokens = tokenise(train, tokenizer)
        self.sequences = held_out_batches(
            tokenise(held_out, tokenizer), sequence_length=run.train.sequence_length,
            num_sequences_max=num_sequences,
        )

    def loss(self, run: RunConfig, weights: Weights, *, device: torch.device = CPU) -> float:
        """Of the whole model with these weights, nats a token."""
        held = hold(run)
        torch.nn.Module.to(held.model, device)
        parameters = dict(held.model.named_parameters())
        with torch.no_grad():
            for index, flat in weights.items():
                for name, values in held.layouts[index].views(flat):
                    parameters[name].copy_(values)
        return held_out_loss(held.model, self.sequences)


def links(
    run: RunConfig, tokens: torch.Tensor, *, bits: int, back_bits: int, total: int
) -> dict[int, torch.Tensor]:
    own = schedule_of(run, train={"total_tokens": total})
    return trained(LockChain(own, EDGES, tokens, bits=bits, back_bits=back_bits), until=total)


def continued(
    run: RunConfig, tokens: torch.Tensor, start: Weights, *, before: int, num_holders: int
) -> dict[int, torch.Tensor]:
    """From a checkpoint to the run's total. One holder is one process; several average every `LOCAL_STEPS` steps."""
    batch_tokens = run.train.batch_sequences * run.train.sequence_length
    own = schedule_of(run, averaging={"tokens_per_round": LOCAL_STEPS * NUM_HOLDERS * batch_tokens})
    edges, bits = ([0, run.fragments], FP32) if num_holders == 1 else (EDGES, INT8)
    swarm = LockChain(
        own, edges, tokens, bits=bits, num_holders=num_holders, num_origins=NUM_HOLDERS, start=start, before=before
    )
    return trained(swarm, until=run.train.total_tokens)


def trained(swarm: LockChain, *, until: int) -> dict[int, torch.Tensor]:
    shown = began = time.monotonic()
    first = swarm.tokens
    while swarm.tokens < until:
        swarm.step()
        if time.monotonic() - shown > SHOWN_S:
            shown = time.monotonic()
            print(f"  {swarm.tokens:,} tokens  {(swarm.tokens - first) / (shown - began):,.0f} tok/s", flush=True)
    return swarm.weights()


def row(name: str, losses: list[float], baseline_name: str, baseline: list[float]) -> dict[str, Any]:
    gaps = [100 * (value / base - 1) for value, base in zip(losses, baseline, strict=True)]
    return {
        "name": name, "baseline": baseline_name,
        "loss": tables.spread(losses), "baseline_loss": tables.spread(baseline),
        "gap_percent": [round(gap, 3) for gap in gaps], "median_gap_percent": round(statistics.median(gaps), 3),
    }


def table(result: Mapping[str, Any]) -> str:
    rows = [
        [
            row["name"], tables.shown(row["loss"], digits=4),
            row["baseline"], tables.shown(row["baseline_loss"], digits=4),
            f"{row['median_gap_percent']:+.2f}", ", ".join(f"{gap:+.2f}" for gap in row["gap_percent"]),
        ]
        for row in result["rows"]
    ]
    base, more = result["mixed_tokens"]
    checkpoint = tables.shown(tables.spread(result["losses"]["checkpoint"]), digits=4)
    return "\n".join([
        tables.markdown(["", "held-out loss", "against", "held-out loss", "gap, %", "of each seed, %"], rows), "",
        f"stages cut at fragments {result['edges']}; links: {result['link_tokens']:,} tokens from cold; mixed:"
        f" int8 links, {result['num_holders']} holders a stage, {more:,} tokens after a checkpoint of {base:,}"
        f" ({checkpoint})",
    ])

