"""How a peer uses its memory: precision of weights and optimizer, how much it keeps of the past, and of a forward.

Each peer's own choice: no other one sees more of it than how fast it is. Where nothing is said, the best comes first
that fits; what costs precision or speed, last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from swarm.config import PeerConfig, RunConfig
from swarm.errors import ConfigError
from swarm.host.keep import AMPLE, LEVELS, Keep
from swarm.model import working
from swarm.model.build import Model
from swarm.model.lora import compute_in, is_adapted
from swarm.model.recompute import recompute_blocks
from swarm.train.moments import eight_bit_problem


@dataclass(frozen=True)
class Settings:
    halved: bool = False
    """weights in bfloat16 with 8 further bits (swarm/model/working.py)"""
    optimizer_bits: int = 32
    keep: Keep = AMPLE
    recompute: bool = False
    """blocks go forward once more in their backward (swarm/model/recompute.py)"""
    at_once: int = 0
    """sequences in one forward; 0: all of a microbatch"""
    base: str | None = None
    """folder of the frozen base, of runs with adapters"""

    def prepare(self, model: Model) -> None:
        """After the model has got to its device, and its start was read off."""
        if self.halved:
            working.halve(parameter for parameter in model.parameters() if parameter.requires_grad)
            if is_adapted(model):
                compute_in(model, torch.bfloat16)
        self.arrange(model)

    def arrange(self, model: Model) -> None:
        """A model that is made of parameters that were prepared."""
        if self.recompute:
            recompute_blocks(model)

    @property
    def text(self) -> str:
        weights = "bfloat16 weights with 8 further bits" if self.halved else "fp32 weights"
        how = "".join([
            ", blocks computed twice" if self.recompute else "",
            f", {self.at_once} sequence{'' if self.at_once == 1 else 's'} at once" if self.at_once else "",
        ])
        return f"{weights}, {self.optimizer_bits}-bit AdamW{how}, memory for the past: {self.keep.name}"


def choices(
    run: RunConfig, config: PeerConfig, device: torch.device, *, round_bytes: int,
    problem: Callable[..., str] | None = None,
) -> Iterator[Settings]:
    """From the best to the one that takes least memory; `round_bytes`: of the results of one round of the largest
    fragment, which must stay until they are applied. Raises ConfigError where something was asked for that this
    machine cannot do. What takes time to find out is found out only when it is come to.
    `problem(device, halved=, bits=)`: why a device cannot do that, or ""; default: it is tried."""
    sync, problem = run.averaging.mode == "sync", problem or _problem
    exact = sync or (run.model.lora is not None and run.model.lora.base == "fp32")
    if exact and config.weights == "bf16":
        kind = "its averaging is sync, which is exact" if sync else "its frozen base is fp32"
        raise ConfigError(
            "--weights bf16 is not for this run", why=f"{kind}: weights are fp32 there", do="leave it out"
        )
    possible = []
    for halved, bits in _precisions(config, sync=sync, exact=exact):
        trouble = problem(device, halved=halved, bits=bits)
        if trouble and (str(bits) == config.optimizer_bits or (halved and config.weights == "bf16")):
            asked = f"--weights {config.weights} --optimizer-bits {config.optimizer_bits}"
            raise ConfigError(f"{asked} cannot be used here", why=trouble, do="leave them out")
        if not trouble:
            possible.append((halved, bits))
            yield from _kept(Settings(halved, bits, base=config.base), run, round_bytes=round_bytes, levels=LEVELS)
    for at_once in (0, 1):  # what costs time comes after what costs a little precision
        least = Settings(*possible[-1], recompute=True, at_once=at_once, base=config.base)
        yield from _kept(least, run, round_bytes=round_bytes, levels=LEVELS[1:])


def _kept(settings: Settings, run: RunConfig, *, round_bytes: int, levels: Iterable[Keep]) -> Iterator[Settings]:
    for keep in levels:
        # the rounds of a sync step are one: all fragments at a time
        rounds = run.fragments if run.averaging.mode == "sync" else keep.rounds
        results_bytes = max(keep.results_bytes, rounds * round_bytes)
        yield replace(settings, keep=replace(keep, rounds=rounds, results_bytes=results_bytes))


def _precisions(config: PeerConfig, *, sync: bool, exact: bool) -> list[tuple[bool, int]]:
    """(halved, bits of the optimizer), the best first. Moments come before weights: they save more, and cost less."""
    if sync:  # without an inner optimizer there is nothing to choose
        return [(False, 32)]
    halved = [False] if exact else [False, True] if config.weights == "auto" else [config.weights == "bf16"]
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
