"""How a peer uses its memory: precision of weights and optimizer, and how much it keeps of the past.

Each peer's own choice: no other one sees more of it than how fast it is. Where nothing is said, the best comes first
that fits; what costs precision or speed, last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from swarm.config import PeerConfig, RunConfig
from swarm.errors import ConfigError
from swarm.host.keep import AMPLE, LEVELS, Keep
from swarm.model import working
from swarm.train.moments import eight_bit_problem


@dataclass(frozen=True)
class Settings:
    halved: bool = False
    """weights in bfloat16 with 8 further bits (swarm/model/working.py)"""
    optimizer_bits: int = 32
    keep: Keep = AMPLE

    def prepare(self, model: torch.nn.Module) -> None:
        """After the model has got to its device, and its start was read off."""
        if self.halved:
            working.halve(model.parameters())

    @property
    def text(self) -> str:
        weights = "bfloat16 weights with 8 further bits" if self.halved else "fp32 weights"
        return f"{weights}, {self.optimizer_bits}-bit AdamW, memory for the past: {self.keep.name}"


def choices(
    run: RunConfig, config: PeerConfig, device: torch.device, *, round_bytes: int
) -> Iterator[Settings]:
    """From the best to the one that takes least memory; `round_bytes`: of the results of one round of the largest
    fragment, which must stay until they are applied. Raises ConfigError where something was asked for that this
    machine cannot do. What takes time to find out is found out only when it is come to."""
    sync = run.averaging.mode == "sync"
    if sync and config.weights == "bf16":
        raise ConfigError(
            "--weights bf16 is not for this run", why="its averaging is sync, which is exact: weights are fp32 there",
            do="leave it out",
        )  # fmt: skip
    for halved, bits in _precisions(config, sync=sync):
        problem = _problem(device, halved=halved, bits=bits)
        if problem and (str(bits) == config.optimizer_bits or (halved and config.weights == "bf16")):
            asked = f"--weights {config.weights} --optimizer-bits {config.optimizer_bits}"
            raise ConfigError(f"{asked} cannot be used here", why=problem, do="leave them out")
        for keep in [] if problem else LEVELS:
            # the rounds of a sync step are one: all fragments at a time
            rounds = run.fragments if sync else keep.rounds
            results_bytes = max(keep.results_bytes, rounds * round_bytes)
            yield Settings(halved, bits, replace(keep, rounds=rounds, results_bytes=results_bytes))


def _precisions(config: PeerConfig, *, sync: bool) -> list[tuple[bool, int]]:
    """(halved, bits of the optimizer), the best first. Moments come before weights: they save more, and cost less."""
    if sync:  # without an inner optimizer there is nothing to choose
        return [(False, 32)]
    halved = [False, True] if config.weights == "auto" else [config.weights == "bf16"]
    bits = [32, 8] if config.optimizer_bits == "auto" else [int(config.optimizer_bits)]
    return [(which, count) for which in halved for count in bits if count == min(bits) or which == halved[0]]


def _problem(device: torch.device, *, halved: bool, bits: int) -> str:
    problem = eight_bit_problem(device) if bits == 8 else ""
    return problem or (bfloat16_problem(device) if halved else "")


def bfloat16_problem(device: torch.device) -> str:
    """Why this device cannot compute with it, or "". It is tried."""
    try:
        values = torch.eye(8, dtype=torch.bfloat16, device=device).requires_grad_()
        (values @ values).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return f"{device} does not compute with bfloat16: {(str(error).splitlines() or [type(error).__name__])[0]}"
    right = values.grad is not None and bool((values.grad == 2).all())
    return "" if right else f"{device} computes something else with bfloat16"
