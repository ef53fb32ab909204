"""What a stage needs in memory, row by row, and how much of a model fits into what there is.

Counts what training and averaging keep: weights, gradients, the inner optimizer's state, global weights with outer
momentum, error feedback, and the activations of the microbatches in flight (after Korthikanti et al. 2022, "Reducing
Activation Recomputation", with the constants measured on transformers' own models). Pure: free memory comes in as a
number, so that placement can ask about any peer. `swarm/host/device.py` has the shorter plan of a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import ConfigError
from swarm.units import format_bytes, format_count

PROGRAM_BYTES = 400_000_000
"""Python, torch, transformers, hivemind and the tokenizer, before there is a model: 250 MB after the imports"""
VALUES_PER_HIDDEN = 50
"""fp32 values that a block keeps for its backward, a token and hidden unit: gpt_neox 18, opt 22, gptj 26, gpt2 28,
llama 33, qwen3 49 (it normalises its heads) without dropout"""
VALUES_PER_SCORE = 3
"""and a token, head and token looked at, where attention is written out: gptj 1, with dropout 3; 0 for fused ones"""
VALUES_PER_LOGIT = 3
"""logits, their logarithms of probabilities, and their gradient"""
FP32 = 4


@dataclass(frozen=True)
class PartSize:
    """Of a fragment, or of several in a row."""

    num_parameters: int
    num_blocks: int
    logits: int = 0
    """a token: the vocabulary's size where the part holds the head, else 0"""

    def __add__(self, other: PartSize) -> PartSize:
        return PartSize(
            self.num_parameters + other.num_parameters, self.num_blocks + other.num_blocks,
            self.logits + other.logits,
        )  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a stage computes at a time, and how it is averaged."""

    hidden_size: int
    num_heads: int
    sequence_length: int
    microbatch_sequences: int = 1
    microbatches_in_flight: int = 1
    """whose backward is still to come"""
    bits: int = 4
    """of the averaging; below 32 there is error feedback"""
    optimizer_bits: int = 32
    """of AdamW's two moments: 32, or 8 with bitsandbytes"""
    on_gpu: bool = False
    chained: bool = False
    """a part of the model: microbatches' gradients wait for a verdict each, and graphs keep the weights that they were
    built on while newer ones are trained"""


@dataclass(frozen=True)
class Row:
    what: str
    num_bytes: int
    on_gpu: bool


@dataclass(frozen=True)
class StagePlan:
    rows: tuple[Row, ...]
    main_limit_bytes: int
    gpu_limit_bytes: int

    @property
    def main_bytes(self) -> int:
        return sum(row.num_bytes for row in self.rows if not row.on_gpu)

    @property
    def gpu_bytes(self) -> int:
        return sum(row.num_bytes for row in self.rows if row.on_gpu)

    @property
    def total_bytes(self) -> int:
        return self.main_bytes + self.gpu_bytes

    @property
    def fits(self) -> bool:
        return self.main_bytes <= self.main_limit_bytes and self.gpu_bytes <= self.gpu_limit_bytes

    def table(self) -> str:
        """A row a line, then the sum of each memory and its limit."""
        lines = [(row.what + (" (GPU)" if row.on_gpu else ""), format_bytes(row.num_bytes), "") for row in self.rows]
        sums = [("main memory", self.main_bytes, self.main_limit_bytes)]
        sums += [("GPU memory", self.gpu_bytes, self.gpu_limit_bytes)] if self.gpu_bytes else []
        for where, needed, limit in sums:
            verdict = f"of {format_bytes(limit)}" + ("" if needed <= limit else ": too little")
            lines.append((where, format_bytes(needed), verdict))
        width = max(len(what) for what, _, _ in lines)
        return "\n".join(f"{what:<{width}}  {size:>7}  {verdict}".rstrip() for what, size, verdict in lines)


def plan_stage(size: PartSize, work: Work, *, main_limit_bytes: int, gpu_limit_bytes: int = 0) -> StagePlan:
    """What a stage of this size needs for this work, against what this peer may take of each memory.

    Without a GPU everything is in main memory. Averaging is there always (I1: fp32 on the CPU).
    """
    n, gpu = size.num_parameters, work.on_gpu
    # bitsandbytes keeps a byte a moment and an fp32 scale for every 256 values of each
    moments = n * 2 * FP32 if work.optimizer_bits == 32 else 2 * n + 2 * FP32 * -(-n // 256)
    rows = [
        Row("program", PROGRAM_BYTES, False),
        Row(f"weights ({format_count(n)} parameters)", n * FP32, gpu),
        Row("gradients", n * FP32, gpu),
        Row("AdamW" if work.optimizer_bits == 32 else "AdamW, 8-bit", moments, gpu),
        Row(f"activations of {work.microbatches_in_flight} x {work.microbatch_sequences} x {work.sequence_length} "
            "tokens", activation_bytes(size, work), gpu),
        Row("global weights and momentum", 2 * n * FP32, False),
    ]  # fmt: skip
    if work.chained:
        rows.append(Row("gradients that wait for a verdict", work.microbatches_in_flight * n * FP32, gpu))
        rows.append(Row("weights of graphs under way", n * FP32, gpu))
    if work.bits < 32:
        rows.append(Row("error feedback", n * FP32, False))
    return StagePlan(tuple(rows), main_limit_bytes, gpu_limit_bytes)


def activation_bytes(size: PartSize, work: Work) -> int:
    """Kept between forward and backward by all microbatches in flight, and the logits of the one that is worked on."""
    tokens = work.microbatch_sequences * work.sequence_length
    scores = VALUES_PER_SCORE * work.num_heads * work.sequence_length
    a_block = tokens * (VALUES_PER_HIDDEN * work.hidden_size + scores)
    # the last stage turns round at once: its backward follows its forward, so there is one set of logits
    logits = tokens * VALUES_PER_LOGIT * size.logits
    return FP32 * (work.microbatches_in_flight * size.num_blocks * a_block + logits)


def fragments_that_fit(
    fragments: Sequence[PartSize], work: Work, *, start: int = 0, main_limit_bytes: int, gpu_limit_bytes: int = 0
) -> int:
    """How many consecutive fragments, from `start` on, fit together; 0 where not even that one does."""
    count, size = 0, PartSize(0, 0)
    for fragment in fragments[start:]:
        size += fragment
        plan = plan_stage(size, work, main_limit_bytes=main_limit_bytes, gpu_limit_bytes=gpu_limit_bytes)
        if not plan.fits:
            break
        count += 1
    return count


def check_fits(plan: StagePlan) -> None:
    """Raises ConfigError, with the table, where the plan does not fit."""
    if not plan.fits:
        raise ConfigError(
            "these fragments do not fit into this peer's memory", why="\n" + plan.table(),
            do="hold fewer (--fragments A:B, or auto), allow more (--max-memory), or take smaller microbatches",
        )  # fmt: skip
