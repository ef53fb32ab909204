"""The work that every system is given: the run's model, text, inner optimizer and schedule, one torch thread.

All of it is the product's own code; the systems differ in nothing but how the peers' work becomes one model. The
schedule follows the tokens of the whole swarm in all of them, the gradient is clipped per fragment in all of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benches.systems.system import THREADS
from swarm.averaging.outer import learning_rate
from swarm.config import RunConfig, load_run
from swarm.data.sources import documents
from swarm.data.stream import PackedStream, held_out_batches, tokenise
from swarm.data.tokenizer import load_tokenizer
from swarm.model.evaluate import held_out_loss
from swarm.train.adamw import adamw, step
from swarm.train.inner import InnerOptimizer
from swarm.train.run_source import hold

HELD_OUT_SEQUENCES = 400


class Workload:
    """One peer's share of a run."""

    def __init__(self, run_file: Path, *, number: int, until_tokens: int | None) -> None:
        torch.set_num_threads(THREADS)
        self.run = load_run(run_file)
        held = hold(self.run)
        self.model, self.fragments = held.model, held.fragments
        self.inner = InnerOptimizer(self.model, self.fragments, self.run)
        train, _ = documents(self.run.data, cache=run_file.parent / "cache")
        self._stream = PackedStream(
            tokenise(train, load_tokenizer(self.run)), sequence_length=self.run.train.sequence_length,
            seed=self.run.seed, reader=f"peer-{number}",
        )
        self.step_tokens = self.run.train.batch_sequences * self.run.train.sequence_length
        """of one inner step of one peer"""
        total = self.run.train.total_tokens
        self.end_tokens = total if until_tokens is None else min(total, until_tokens)
        """of the swarm, at which it is done"""
        self.adamw = adamw(list(self.inner.parameters.values()), self.run.train)
        """one for all fragments: what torchft hooks into and hivemind sends to newcomers"""
        self._steps = 0

    def gradients(self) -> None:
        self.inner.gradients(self._stream.next_batch(self.run.train.batch_sequences))

    def rate(self, swarm_tokens: int) -> float:
        return learning_rate(self.run, swarm_tokens)

    def step(self, swarm_tokens: int) -> None:
        """An inner step like the product's. `swarm_tokens`: what the schedule goes by."""
        self.gradients()
        self.take_step(self.rate(swarm_tokens))

    def take_step(self, learning_rate: float) -> None:
        """With the gradients at hand."""
        if self.inner.clip():
            self._steps += 1
            step(self.adamw, learning_rate, number=self._steps)

    def save(self, file: Path) -> None:
        save_weights(self.model, file)


def save_weights(model: torch.nn.Module, file: Path) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, temporary)
    os.replace(temporary, file)


def held_out(run: RunConfig, weights_file: Path) -> float:
    """Loss on the run's held-out text, nats a token, of weights that any of the systems has saved."""
    model = hold(run).model
    weights = load_file(weights_file)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    _, text = documents(run.data)
    tokens = tokenise(text, load_tokenizer(run))
    sequences = held_out_batches(
        tokens, sequence_length=run.train.sequence_length, num_sequences_max=HELD_OUT_SEQUENCES
    )
    return held_out_loss(model, sequences)
