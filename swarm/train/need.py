"""What a run needs: how many machines of a kind, what each holds, and what each sends over the whole run.

Memory by the planner that peers use themselves (place.py), with as few peers as a chain of the whole model needs;
traffic by the arithmetic of the codecs. Pure: a run config and numbers come in, nothing is built, measured or asked.
What is not counted: heartbeats and DHT (about 2 kB/s), newcomers' downloads, TCP's own bytes (3 %). Times, speed and
money: outlook.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from swarm.averaging.layout import Layout, layout_of
from swarm.config import PeerConfig, RunConfig
from swarm.model.build import Model
from swarm.model.fragments import FragmentSpec, cut, find_blocks
from swarm.model.skeleton import skeleton
from swarm.network import codec
from swarm.pipeline import wire
from swarm.train.place import Place, Planner, Ways
from swarm.train.serving import microbatch_sequences

PUBLISHED_DDP_BYTES, PUBLISHED_BYTES = 633e12, 12.7e12
"""GPT-JT's own figures for a machine (Together, 29 November 2022): with data parallelism, and as it was trained"""
BF16 = 2


@dataclass(frozen=True)
class Machine:
    name: str
    main_bytes: int
    """that a peer may take of main memory"""
    gpu_bytes: int = 0
    """of the GPU; 0: it computes on the CPU"""


@dataclass(frozen=True)
class Need:
    """As few machines of one kind as hold every fragment once, or all of them that such a machine can hold."""

    machine: Machine
    places: tuple[Place, ...]
    """of each peer, in the order of the model"""
    too_large: tuple[int, ...] = ()
    """fragments that do not fit by themselves: others must hold them"""
    short_of: str = ""
    """the memory table of the first of those"""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one machine sends in the whole run; it receives about as many."""

    averaging: float
    pipeline: float

    @property
    def total(self) -> float:
        return self.averaging + self.pipeline


@dataclass(frozen=True)
class Costs:
    """What a run's traffic is computed from."""

    total_tokens: int
    rounds: int
    """of each fragment"""
    round_bytes: tuple[int, ...]
    """of a contribution to a round of each fragment, as encoded"""
    forward_bytes: float
    """of a token that is sent on to the next peer"""
    back_bytes: float
    """of its gradient"""
    parameters: int
    """that are trained"""
    step_tokens: int
    """of an inner step of one peer"""
    round_values: tuple[int, ...] = ()
    """of each fragment, padding included: what arithmetic is done on"""
    forward_flop: tuple[float, ...] = ()
    """of a token's way through each fragment"""
    passes: int = 3
    """as much work as so many forwards: one, and two back; where a base is frozen, one back"""
    microbatch_tokens: int = 0
    """that go down a chain at a time"""


def need_of(planner: Planner, machine: Machine) -> Need:
    """Greedily from the first fragment on: each peer holds the longest stage that fits, which makes them as few as can
    be. Assumes that the machines can do what peers make use of (bfloat16, bitsandbytes). `planner`: `planner_of` the
    run, for any machine."""
    on_gpu = machine.gpu_bytes > 0
    ways = Ways(
        replace(
            planner, main_bytes=machine.main_bytes, gpu_bytes=machine.gpu_bytes,
            work=replace(planner.work, on_gpu=on_gpu),
        ), PeerConfig(), device=torch.device("cuda" if on_gpu else "cpu"), problem=lambda device, *, halved, bits: "",
    )
    num_fragments = len(planner.sizes)
    everything = ways.best((0, num_fragments), "alone")
    if everything.plan.fits:
        return Need(machine, (everything,))
    roomiest, first = ways.roomiest(), 0
    places: list[Place] = []
    too_large: list[int] = []
    while first < num_fragments:
        end = first
        while end < num_fragments and roomiest.in_flight(range(first, end + 1)):
            end += 1
        if end == first:
            too_large.append(first)
            end = first + 1
        else:
            places.append(ways.best((first, end), "the longest stage that fits"))
        first = end
    short_of = roomiest.place((too_large[0], too_large[0] + 1), "").plan.table() if too_large else ""
    return Need(machine, tuple(places), tuple(too_large), short_of)


def costs_of(run: RunConfig) -> Costs:
    whole = skeleton(run)
    config = whole.config.get_text_config()
    fragments: Sequence[FragmentSpec] = cut(whole, run.fragments)
    layouts: list[Layout] = [layout_of(fragment) for fragment in fragments]
    bits, back_bits = wire.bits_of(run)
    length = run.train.sequence_length
    shape = (1, length, config.hidden_size)
    ids = wire.tokens_bytes((1, length), vocabulary=config.vocab_size)
    lora = run.model.lora is not None
    plain = skeleton(replace(run, model=replace(run.model, lora=None))) if lora else whole
    flop = block_flop(plain, length=length)
    return Costs(
        run.train.total_tokens, math.ceil(run.train.total_tokens / run.averaging.tokens_per_round),
        tuple(
            codec.encoded_bytes(layout.num_fine_blocks, layout.num_blocks - layout.num_fine_blocks, run.averaging.bits)
            for layout in layouts
        ),
        (wire.values_bytes(shape, bits) + ids) / length, wire.values_bytes(shape, back_bits) / length,
        sum(layout.num_parameters for layout in layouts), run.train.batch_sequences * length,
        round_values=tuple(layout.numel for layout in layouts),
        forward_flop=tuple(sum(flop[slice(*fragment.blocks)]) for fragment in fragments),
        passes=2 if lora else 3, microbatch_tokens=microbatch_sequences(run) * length,
    )


def block_flop(model: Model, *, length: int) -> list[float]:
    """Of a token's way forward through each block of a model without adapters, in a row of `length`: two for each
    weight of a matrix, the head's in the last block, and four for each token looked at and hidden unit. Embeddings are
    looked up. Of a mixture of experts all are counted, which is too much."""
    config = model.config.get_text_config()
    attention = 4.0 * length * config.hidden_size
    return [
        2.0 * sum(math.prod(tensor.shape) for tensor in block.tensors if not tensor.fine) + attention
        for block in cut(model, find_blocks(model)[1])
    ]


def traffic_of(costs: Costs, part: tuple[int, int], *, replicas: int) -> Traffic:
    """Of a peer with these fragments, where `replicas` peers hold each and share the tokens. In a round each member
    sends the others' parts of its contribution, and its own part's result to all: 2 (K - 1) / K of a contribution."""
    first, end = part
    each = sum(costs.round_bytes[first:end])
    averaging = costs.rounds * each * 2 * (replicas - 1) / replicas
    sent = (costs.forward_bytes if end < len(costs.round_bytes) else 0.0) + (costs.back_bytes if first > 0 else 0.0)
    return Traffic(averaging, costs.total_tokens / replicas * sent)


def ddp_bytes(costs: Costs, *, replicas: int) -> float:
    """That a machine of a ring of `replicas` would send: bf16 gradients of all that is trained, each step of all of
    them, twice (K - 1) / K times. Each would need memory for the whole model."""
    steps = costs.total_tokens / (replicas * costs.step_tokens)
    return steps * costs.parameters * BF16 * 2 * (replicas - 1) / replicas
