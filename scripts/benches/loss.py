"""Is quantisation free? Held-out loss with int4 on the wire against fp32, same seeds, same tokens.

A swarm of real peers is timed by the machine it runs on, so two runs of it never see the same rounds. Here K peers
take turns in one process and everything else is the product's own code: model, data, inner optimizer, ledger, codec,
reduction and outer step. A round's result arrives one inner step after the contribution, as on a quick link.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from benches.lockstep import average
from swarm.averaging import outer, plan
from swarm.averaging.global_state import GlobalState
from swarm.averaging.ledger import Drift, Ledger
from swarm.config import RunConfig, load_run
from swarm.data.batch import Batch
from swarm.data.sources import documents
from swarm.data.stream import PackedStream, held_out_batches, tokenise
from swarm.data.tokenizer import load_tokenizer
from swarm.host.presets import preset_path
from swarm.model.evaluate import held_out_loss
from swarm.train.inner import InnerOptimizer
from swarm.train.run_source import Held, hold, load_states

NAME = "loss"
HELP = "held-out loss by bits on the wire, same seeds and tokens"


@dataclass
class Peer:
    held: Held
    inner: InnerOptimizer
    ledgers: list[Ledger]
    stream: PackedStream
    feedback: dict[tuple[int, int, int], torch.Tensor]


class Simulation:
    """K whole-model peers of one run, in lock-step."""

    def __init__(self, run: RunConfig, *, num_peers: int, tokens: torch.Tensor) -> None:
        self.run, self.tokens = run, 0
        self.bytes_sent = 0
        first = hold(run)
        self.peers = [self._peer(copy.deepcopy(first), f"peer-{number}", tokens) for number in range(num_peers)]
        self._arriving: list[tuple[int, str, GlobalState]] = []
        self._since = [0] * run.fragments

    def _peer(self, held: Held, name: str, tokens: torch.Tensor) -> Peer:
        parameters = dict(held.model.named_parameters())
        ledgers = [
            Ledger(state, Drift(held.layouts[index], parameters)) for index, state in held.states.items()
        ]
        stream = PackedStream(tokens, sequence_length=self.run.train.sequence_length, seed=self.run.seed, reader=name)
        return Peer(held, InnerOptimizer(held.model, held.fragments, self.run), ledgers, stream, {})

    def step(self) -> None:
        """One inner step of every peer; then rounds that are due."""
        for index, opening, state in self._arriving:
            for peer in self.peers:
                peer.ledgers[index].apply(state, opening, included=True)
        self._arriving = []
        rate = outer.learning_rate(self.run, self.tokens)
        for peer in self.peers:
            batch = peer.stream.next_batch(self.run.train.batch_sequences)
            peer.inner.gradients(batch)
            peer.inner.step(rate)
            for ledger in peer.ledgers:
                ledger.trained(batch.numel())
            self.tokens += batch.numel()
        complete = self.tokens >= self.run.train.total_tokens
        for index in range(self.run.fragments):
            pending = sum(peer.ledgers[index].pending_tokens for peer in self.peers)
            state = self.peers[0].ledgers[index].state
            target = plan.target_tokens(
                self.run.averaging.tokens_per_round, self.run.fragments, fragment=index, version=state.version,
                staggered=True,
            )
            if pending >= target or complete:
                self._round(index)

    def _round(self, index: int) -> None:
        opening, state, sent = average(self.run, index, self.peers)
        self.bytes_sent += sent
        self._arriving.append((index, opening, state))

    def finish(self) -> None:
        """Apply what is on its way, so that the model is the one that a peer would export."""
        for index, opening, state in self._arriving:
            for peer in self.peers:
                peer.ledgers[index].apply(state, opening, included=True)
        self._arriving = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="run config (the demo run)")
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="swarm tokens of each run (the run config's)")
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 8, 4])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="averaging settings to try")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    run = load_run(options.run or preset_path("runs/demo.yaml"))
    total = options.tokens or (100_000 if options.quick else run.train.total_tokens)
    seeds = 1 if options.quick else options.seeds
    train_text, held_out_text = documents(run.data)
    tokenizer = load_tokenizer(run)
    tokens = tokenise(train_text, tokenizer)
    sequences = held_out_batches(
        tokenise(held_out_text, tokenizer), sequence_length=run.train.sequence_length, num_sequences_max=400
    )
    pairs = (setting.split("=") for setting in options.set)
    settings = {key: float(value) if "." in value else int(value) for key, value in pairs}
    losses: dict[int, list[float]] = {bits: [] for bits in options.bits}
    for seed in range(seeds):
        for bits in options.bits:
            setup = replace(
                run, seed=seed, train=replace(run.train, total_tokens=total),
                averaging=replace(run.averaging, **{**settings, "bits": bits}),
            )
            losses[bits].append(one(setup, tokens, sequences, num_peers=options.peers))
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
    return {"tokens": total, "peers": options.peers, "seeds": seeds, "baseline_bits": options.bits[0], "bits": rows}


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
    lines = [f"{result['peers']} peers, {result['tokens']:,} tokens, {result['seeds']} seeds; held-out nats/token"]
    lines.append("| bits | median | min | max | gap of each seed, % |")
    lines.append("|---|---|---|---|---|")
    for bits, row in result["bits"].items():
        gaps = ", ".join(f"{gap:+.2f}" for gap in row["gap_percent"])
        lines.append(f"| {bits} | {row['median']:.4f} | {row['min']:.4f} | {row['max']:.4f} | {gaps} |")
    return "\n".join(lines)
