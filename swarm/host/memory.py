"""What a stage needs in memory, row by row, and how much of a model fits into what there is.

Counts what training and averaging keep and what they take for a while: weights, gradients, the inner optimizer's state,
global weights with outer momentum, error feedback, what is kept of the past (keep.py), a round under way, and the
activations of the microbatches in flight (after Korthikanti et al. 2022, "Reducing Activation Recomputation", with the
constants measured on transformers' own models). Joining takes less than training: there are no gradients and moments
yet. Pure: free memory comes in as a number, so that placement can ask about any peer. `swarm/host/device.py` has the
shorter plan of a whole model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import ConfigError
from swarm.host.keep import AMPLE, MAX_OWN, Keep
from swarm.units import format_bytes, format_count

PROGRAM_BYTES = 750_000_000
"""Python, torch, transformers, datasets, hivemind: 490 MB after the imports; 750 MB with the text"""
EIGHT_BIT_BYTES = 70_000_000
"""bitsandbytes, where it is used"""
CUDA_BYTES = 850_000_000
"""of main memory, where a GPU is used: CUDA's libraries and driver (1.4 to 1.6 GB for a peer that takes 0.5 to 0.7 on
the CPU; torch 2.11, CUDA 13). Of the GPU's own memory they take some 0.8 GB on an H200, which are gone already when
free memory is looked up"""
VALUES_PER_HIDDEN = 50
"""values that a block keeps for its backward, a token and hidden unit: gpt_neox 18, opt 22, gptj 26, gpt2 28,
llama 33, qwen3 49 (it normalises its heads) without dropout; in bfloat16 some of them stay fp32, within the same
bound"""
VALUES_PER_SCORE = 3
"""fp32 values, and a token, head and token looked at, where attention is written out: gptj 1, with dropout 3; 0 for
fused ones"""
VALUES_PER_LOGIT = 3
"""logits, their logarithms of probabilities, and their gradient"""
INPUTS_PER_BLOCK = 1
"""values a token and hidden unit that a block keeps which goes forward once more in its backward: what came in"""
ROUND_BYTES = 26
"""a value of the fragment whose round is under way, momentum apart: the contribution and what was offered, those of
others to the parts owned here, their sum, the average, the next weights; at most 24 at once"""
SPARE_BYTES = 9
"""a value of a fragment of which a spare copy follows a round, the state before it and after it apart: the decoded
parts of the result, the average, and the result as it came"""
FP32, BF16, REST = 4, 2, 1


@dataclass(frozen=True)
class PartSize:
    """Of a fragment, or of several in a row."""

    num_parameters: int
    num_blocks: int
    logits: int = 0
    """a token: the vocabulary's size where the part holds the head, else 0"""
    num_fragments: int = 1
    largest: int = 0
    """parameters of the largest fragment; 0: there is one"""
    base_bytes: int = 0
    """of a frozen base's matrices, as they are kept; then `num_parameters` are those of the adapters"""
    base_values: int = 0
    """of a frozen base, all else: embedding, norms, biases, head"""
    largest_matrix: int = 0
    """weights of the base's largest matrix, whose values are made anew for each product"""

    @property
    def largest_fragment(self) -> int:
        return self.largest or self.num_parameters

    def __add__(self, other: PartSize) -> PartSize:
        return PartSize(
            self.num_parameters + other.num_parameters, self.num_blocks + other.num_blocks,
            self.logits + other.logits, self.num_fragments + other.num_fragments,
            max(self.largest_fragment, other.largest_fragment), self.base_bytes + other.base_bytes,
            self.base_values + other.base_values, max(self.largest_matrix, other.largest_matrix),
        )  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a stage computes at a time, in which precision, and how it is averaged."""

    hidden_size: int
    num_heads: int
    sequence_length: int
    microbatch_sequences: int = 1
    microbatches_in_flight: int = 1
    """of others and its own down the chain, whose backward or verdict is still to come; 0: a whole model that does
    nothing for others"""
    pieces: int = 4
    """microbatches in an inner step"""
    batch_sequences: int = 0
    """in one forward of a peer with the whole model; 0: it holds a part"""
    bits: int = 4
    """of the averaging; below 32 there is error feedback"""
    buffers: int = 1
    """vectors of outer optimizer state"""
    sync: bool = False
    """gradients are averaged, and there is no inner optimizer"""
    optimizer_bits: int = 32
    """of AdamW's two moments: 32, or 8 with bitsandbytes"""
    halved: bool = False
    """weights in bfloat16 with 8 further bits, gradients and activations in bfloat16"""
    keep: Keep = AMPLE
    on_gpu: bool = False
    recompute: bool = False
    """blocks go forward once more in their backward"""
    at_once: int = 0
    """sequences in one forward; 0: all of a microbatch, or of the batch of a whole model"""
    masked: bool = False
    """rows are cut into segments, and each has an attention mask of its own"""
    spare_values: int = 0
    """parameters of the largest fragment of which spare copies are kept; 0: none are"""

    @property
    def value_bytes(self) -> int:
        """of a gradient or an activation"""
        return BF16 if self.halved else FP32


@dataclass(frozen=True)
class Row:
    what: str
    num_bytes: int
    on_gpu: bool
    shared: bool = False
    """there once, however many fragments are held"""


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

    Without a GPU everything is in main memory. Averaging is there always (I1: fp32 on the CPU). Rows of nothing are
    left out.
    """
    rows = [*_training(size, work), *_averaging(size, work)]
    return StagePlan(tuple(row for row in rows if row.num_bytes), main_limit_bytes, gpu_limit_bytes)


def _training(size: PartSize, work: Work) -> list[Row]:
    n, gpu, k, value = size.num_parameters, work.on_gpu, work.microbatches_in_flight, work.value_bytes
    eight = work.optimizer_bits == 8 and not work.sync
    # a byte a moment, and an fp32 scale for every 256 values of each
    moments = 2 * n + 2 * FP32 * -(-n // 256) if eight else 0 if work.sync else 2 * n * FP32
    # a single microbatch's gradient is its own sum
    sums = n * FP32 if k and work.pieces > 1 else 0
    # graphs keep the weights that they were built on: the steps taken while microbatches are in flight, or, with one
    # in flight, the rounds of a fragment or two
    old = 2 * size.largest_fragment if k == 1 else n * -(-k // work.pieces)
    many = f"{k} x {work.microbatch_sequences} x {work.sequence_length} tokens"
    kept, again = activations(size, work)
    program_bytes = PROGRAM_BYTES + (EIGHT_BIT_BYTES if eight else 0) + (CUDA_BYTES if gpu else 0)
    return [
        Row("program", program_bytes, False, shared=True),
        Row(f"weights ({format_count(n)} parameters" + (", bfloat16 and 8 further bits)" if work.halved else ")"),
            n * (BF16 + REST if work.halved else FP32), gpu),
        Row("frozen base", size.base_bytes + size.base_values * value, gpu),
        Row("values of a frozen matrix", size.largest_matrix * value, gpu, shared=True),
        Row("gradients", n * value if work.batch_sequences else 0, gpu),
        Row("AdamW, 8-bit" if eight else "AdamW", moments, gpu),
        Row("activations" + (f" of {many}" if not work.batch_sequences else ""), kept, gpu),
        Row("a block that is computed again", again, gpu, shared=True),
        Row("attention masks", _masks(work), gpu, shared=True),
        Row(f"gradients of {k} that wait for a verdict", k * n * value, gpu),
        Row("sums of gradients", sums, gpu),
        Row("weights of graphs under way", old * value, gpu),
    ]  # fmt: skip


def _averaging(size: PartSize, work: Work) -> list[Row]:
    n, keep = size.num_parameters, work.keep
    state = (1 + work.buffers) * FP32
    kept = n * state * (keep.previous + keep.leases)
    if keep.previous:
        kept += n * (FP32 + (2 if work.bits < 32 else 0))  # the contribution to it, and the feedback before
    own = min(MAX_OWN * n, max(keep.own_values * size.num_fragments, keep.own_least * n))
    rounds = size.num_fragments if work.sync else min(keep.rounds, size.num_fragments)
    largest = size.largest_fragment
    return [
        Row("global weights and momentum" if work.buffers else "global weights", n * state, False),
        Row("older versions", kept, False),
        # what a contribution has lost, and what a result of the parts owned here has
        Row("error feedback", 2 * n if work.bits < 32 else 0, False),
        Row("gradients until a round", 2 * n * FP32 if work.sync else 0, False),
        # those in our history, and those that may be in another one
        Row("own contributions", math.ceil(2 * own * work.bits / 8), False),
        Row("results of rounds", keep.results_bytes, False, shared=True),
        Row(f"{rounds} {'round' if rounds == 1 else 'rounds'} under way",
            rounds * largest * (ROUND_BYTES + FP32 * work.buffers), False, shared=True),
        Row("a checkpoint being written", 2 * largest * state, False, shared=True),
        Row("a spare copy that follows a round", work.spare_values * (2 * state + SPARE_BYTES), False, shared=True),
    ]  # fmt: skip


def activations(size: PartSize, work: Work) -> tuple[int, int]:
    """(bytes kept between forward and backward by all microbatches in flight, and by its own batch for a whole model,
    with the logits of what is worked on; bytes of one block that is computed again, where blocks are)."""
    k, sequences, length = work.microbatches_in_flight, work.microbatch_sequences, work.sequence_length
    at_once, graphs = _graphs(work)
    scores = VALUES_PER_SCORE * work.num_heads * length
    a_token = work.hidden_size * work.value_bytes
    a_block = VALUES_PER_HIDDEN * a_token + scores * FP32
    left = INPUTS_PER_BLOCK * a_token if work.recompute else a_block
    # the last stage turns round at once: its backward follows its forward, so there is one set of logits
    logits = FP32 * at_once * length * VALUES_PER_LOGIT * size.logits
    entered = k * sequences * length * a_token if sequences > at_once else 0
    again = at_once * length * a_block if work.recompute else 0
    return graphs * length * size.num_blocks * left + entered + logits, again


def _graphs(work: Work) -> tuple[int, int]:
    """(sequences in one forward, sequences whose graphs are there together)"""
    k, sequences = work.microbatches_in_flight, work.microbatch_sequences
    largest = max(sequences if k else 0, work.batch_sequences)
    at_once = min(work.at_once or largest, largest)
    # a batch, or a microbatch, in pieces: it keeps what came in, and a graph of one piece at a time
    in_pieces = sequences > at_once
    return at_once, min(work.batch_sequences, at_once) + (k * sequences if not in_pieces else min(k, 1) * at_once)


def _masks(work: Work) -> int:
    """Of each row of each graph one, for all of its blocks; and of those that are being made three bytes a pair of
    tokens: who is before whom, who is in whose segment, and who sees whom."""
    at_once, graphs = _graphs(work)
    return (graphs * work.value_bytes + 3 * at_once) * work.sequence_length**2 if work.masked else 0


def activation_bytes(size: PartSize, work: Work) -> int:
    """Both of `activations`."""
    return sum(activations(size, work))


def fragments_that_fit(
    fragments: Sequence[PartSize], work: Work, *, start: int = 0, main_limit_bytes: int, gpu_limit_bytes: int = 0
) -> int:
    """How many consecutive fragments, from `start` on, fit together; 0 where not even that one does."""
    count, size = 0, None
    for fragment in fragments[start:]:
        size = fragment if size is None else size + fragment
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
