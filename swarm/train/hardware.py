"""What ordinary machines compute and draw, for plans. Data sheets say the peaks; all else is an assumption that whoever
plans can set.

bf16: dense, on tensor cores, sums in fp32. Of GeForce cards of the 30 and 40 series that is twice the fp32 rate
(NVIDIA's white papers of GA102 and AD102); fp32 is what a peer with fp32 weights uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from swarm.errors import ConfigError

UTILISATION = 0.3
"""of the peak, in training: an assumption. INTELLECT-1 had 0.36 to 0.41 on H100 (arXiv 2412.01152); code that is not
tuned for one card has less"""
REST_WATTS = 100.0
"""of a machine beside its GPU: an assumption"""
GIB = 2**30


@dataclass(frozen=True)
class Computer:
    """Peaks in FLOP/s, watts of the whole machine while it trains."""

    name: str
    bf16_flops: float
    fp32_flops: float
    watts: float
    gpu_bytes: int = 0
    """0: no GPU"""
    utilisation: float = UTILISATION

    def flop_per_s(self, *, halved: bool) -> float:
        """That training gets; `halved`: with bfloat16 weights."""
        return self.utilisation * (self.bf16_flops if halved else self.fp32_flops)


def _gpu(name: str, gib: int, bf16_tflops: float, fp32_tflops: float, watts: float) -> Computer:
    return Computer(name, bf16_tflops * 1e12, fp32_tflops * 1e12, watts + REST_WATTS, gib * GIB)


KNOWN = {computer.name: computer for computer in (
    _gpu("rtx-3060-laptop", 6, 21.8, 10.9, 115),
    _gpu("rtx-4060", 8, 30.2, 15.1, 115),
    _gpu("rtx-3060", 12, 25.5, 12.7, 170),
    _gpu("rtx-4070", 12, 58.3, 29.1, 200),
    _gpu("rtx-4080", 16, 97.5, 48.7, 320),
    _gpu("rtx-3090", 24, 71.2, 35.6, 350),
    _gpu("rtx-4090", 24, 165.2, 82.6, 450),
    _gpu("a100", 80, 312.0, 19.5, 400),
    _gpu("h100", 80, 989.4, 66.9, 700),
)}  # fmt: skip
CPU = Computer("cpu", 0.22e12, 0.22e12, REST_WATTS, utilisation=1.0)
"""four cores at the 55 GFLOP/s of a thread that trains the demo (8,500 tokens/s: peers/runs/demo.yaml)"""


def computer_of(
    gpu: str | None, *, gpu_bytes: int, flops: float | None = None, utilisation: float = UTILISATION,
    watts: float | None = None,
) -> Computer:
    """The one that is named, or the smallest known one with so much GPU memory; with what is known better about it.
    `flops`: what it gets in training, in whatever precision. Raises ConfigError."""
    if flops is not None and not 0 < flops < math.inf:
        raise ConfigError("--flops must be over 0", why=f"got {flops:g}", do="write 20T for 20 TFLOP/s, say")
    if not 0 < utilisation <= 1:
        raise ConfigError("--utilisation must be over 0 and at most 1", why=f"got {utilisation:g}")
    if watts is not None and not 0 <= watts < math.inf:
        raise ConfigError("--watts must not be negative", why=f"got {watts:g}")
    if gpu is not None and gpu not in KNOWN:
        do = f"name one of: {', '.join(KNOWN)}; or say what it does: --flops 20T --watts 300"
        raise ConfigError(f"there is no GPU called {gpu!r} here", do=do)
    found = KNOWN[gpu] if gpu else _smallest(gpu_bytes)
    if flops is not None:
        name = gpu or ("a GPU" if gpu_bytes else "cpu")
        found = replace(found, name=name, bf16_flops=flops, fp32_flops=flops, utilisation=1.0)
    elif found is not CPU:
        found = replace(found, utilisation=utilisation)
    return found if watts is None else replace(found, watts=watts)


def _smallest(gpu_bytes: int) -> Computer:
    if not gpu_bytes:
        return CPU
    enough = [computer for computer in KNOWN.values() if computer.gpu_bytes >= gpu_bytes]
    if not enough:
        do = "say what it does: --flops 20T --watts 300"
        raise ConfigError(f"no GPU is known here with {gpu_bytes / 1e9:.3g} GB", do=do)
    return enough[0]
