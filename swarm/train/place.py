"""What this peer holds at its start: what it was told to, the whole model where that fits, or else the stage of as many
fragments as fit that the swarm needs most (pipeline/placement.py).

The plan counts everything that training and averaging keep. Where a stage is too large for many microbatches at once,
fewer are planned for, down to one (the chain then takes no more than that), then less of the past is kept, and fewer
bits (settings.py), before a smaller stage is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch

from swarm.averaging import outer
from swarm.config import PeerConfig, RunConfig
from swarm.errors import SwarmError
from swarm.host.device import available_bytes
from swarm.host.keep import LITTLE
from swarm.host.memory import PartSize, StagePlan, Work, check_fits, plan_stage
from swarm.model.build import Model
from swarm.model.fragments import FragmentSpec, block_of_each, cut
from swarm.model.lora import frozen_tensors, is_adapted, is_matrix, largest_matrix
from swarm.model.skeleton import skeleton
from swarm.network.records import Status
from swarm.pipeline.placement import choose_stage
from swarm.pipeline.snapshot import NO_STAGE, Fragments, Holder
from swarm.train import surroundings
from swarm.train.serving import CREDIT, microbatch_sequences
from swarm.train.settings import Settings, choices


@dataclass(frozen=True)
class Place:
    part: tuple[int, int]
    """fragments [first, end)"""
    in_flight: int
    """microbatches of others, and of its own, that it has room for at once"""
    plan: StagePlan
    text: str
    """which fragments, and why"""
    planner: Planner
    """for the stages that may come later"""
    spares_fit: bool = True
    """there is memory for spare copies beside all that, or none are kept anyway: they make no stage smaller"""


def choose(
    run: RunConfig, config: PeerConfig, *, device: torch.device, statuses: Mapping[str, Status], peer_id: str
) -> Place:
    """Raises ConfigError where the fragments that were asked for do not fit, SwarmError where none does."""
    main_bytes = min(available_bytes(), config.max_memory or available_bytes())
    gpu_bytes = 0
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        gpu_bytes = min(free, config.max_memory or free)
    base = planner_of(run, on_gpu=device.type == "cuda", main_bytes=main_bytes, gpu_bytes=gpu_bytes)
    base = replace(base, spares=config.spare_disk != 0)
    ways = Ways(base, config, device=device)
    everything = (0, run.fragments)
    if config.fragment_span is not None:
        place = ways.best(config.fragment_span, "as it was told to")
        check_fits(place.plan)
        return place
    place = ways.best(everything, "they fit")
    if place.plan.fits:
        return place
    planner = ways.roomiest()
    if not planner.room_bytes():
        raise SwarmError(
            "this model does not fit", why="not even one fragment of it:\n" + planner.place((0, 1), "").plan.table(),
            do="use a machine with more memory, allow more (--max-memory), or cut the model into more fragments",
        )
    me = Holder(peer_id, NO_STAGE, NO_STAGE, planner.room_bytes(), surroundings.usual_speed(run, statuses))
    first, end = choose_stage(surroundings.snapshot(run, statuses, planner.fragments()), me)
    while end - first > 1 and not planner.in_flight(range(first, end)):
        end -= 1
    place = ways.best((first, end), "as many as fit, where the swarm needs them most")
    check_fits(place.plan)
    return place


class Ways:
    """To use a peer's memory, from the best to the one that takes least; each found out when it is come to."""

    def __init__(
        self, planner: Planner, config: PeerConfig, *, device: torch.device, problem: Callable[..., str] | None = None,
    ) -> None:
        """`planner`: with any settings. `problem`: as in `choices`; by default, what this machine cannot do is found
        out by trying it."""
        run, self._planner = planner.run, planner
        largest = max(size.num_parameters for size in planner.sizes)
        bits = run.averaging.bits
        round_bytes = largest * (3 * bits + max(8, bits)) // 32  # a quarter is 8-bit
        self._settings = choices(run, config, device, round_bytes=round_bytes, problem=problem)
        self._known: list[Planner] = []

    def best(self, part: tuple[int, int], why: str) -> Place:
        """The first that fits; a peer with the whole model rather saves than does nothing for others. Where none fits,
        the last."""
        is_whole = part == (0, len(self._planner.sizes))
        for least in (1, 0) if is_whole else (1,):
            for planner in self._all():
                place = planner.place(part, why, least=least)
                if place.plan.fits:
                    return place
        return place

    def roomiest(self) -> Planner:
        """The way in which most fragments fit. Of small models it is not that of the fewest bits, which load a
        library. The one that takes least where not even one fits."""
        least = [planner for planner in self._all() if planner.settings.keep.name == LITTLE.name]
        best = max(least, key=Planner.longest)
        return best if best.longest() else least[-1]

    def _all(self) -> Iterator[Planner]:
        for number in count():
            if number == len(self._known):
                settings = next(self._settings, None)
                if settings is None:
                    return
                self._known.append(replace(self._planner, settings=settings))
            yield self._known[number]


@dataclass(frozen=True)
class Planner:
    """What fits into this peer's memory, as it was free at the start, used in this way."""

    sizes: Sequence[PartSize]
    """of each fragment"""
    work: Work
    run: RunConfig
    main_bytes: int
    gpu_bytes: int
    settings: Settings
    spares: bool = True
    """may this peer keep copies of fragments that it does not hold?"""

    def place(self, part: tuple[int, int], why: str, *, least: int = 1) -> Place:
        """With as many microbatches at once as fit; with `least` where even that does not."""
        in_flight = self.in_flight(range(*part)) or least
        plan = self._plan(range(*part), in_flight)
        is_whole = part == (0, len(self.sizes))
        which = "the whole model" if is_whole else f"fragments {part[0]}:{part[1]} of {len(self.sizes)}"
        text = f"{which}: {why}; {self.settings.text}"
        if is_whole or not self.spares:
            return Place(part, in_flight, plan, text, self)
        with_spares = self._plan(range(*part), in_flight, spares=True)
        if with_spares.fits:
            return Place(part, in_flight, with_spares, text, self)
        return Place(part, in_flight, plan, f"{text}; no memory for spare copies", self, spares_fit=False)

    def in_flight(self, held: Collection[int]) -> int:
        """For how many microbatches at once there is room beside these fragments; 0: not for one."""
        in_flight = CREDIT
        while in_flight and not self._plan(held, in_flight).fits:
            in_flight //= 2
        return in_flight

    def fragments(self) -> Fragments:
        """As placement sees them."""
        return Fragments(
            tuple(self.bytes_of(index) for index in range(len(self.sizes))),
            tuple(float(size.num_blocks) for size in self.sizes),
        )

    def room_bytes(self) -> int:
        """As much as the longest stage that fits takes, measured in `fragments()`; 0: not even one fragment fits."""
        limit = self.gpu_bytes if self.work.on_gpu else self.main_bytes
        largest = self.longest()
        return min(limit, sum(sorted(self.fragments().sizes_bytes)[-largest:])) if largest else 0

    def longest(self) -> int:
        """Fragments in a row that fit at most."""
        return max((end - first for first, end in self.fitting()), default=0)

    def fitting(self) -> Iterator[tuple[int, int]]:
        for first in range(len(self.sizes)):
            for end in range(first + 1, len(self.sizes) + 1):
                if not self._plan(range(first, end), 1).fits:
                    break
                yield first, end

    def bytes_of(self, index: int) -> int:
        """That a fragment takes of this peer's room, with one microbatch at a time."""
        rows = self._plan([index], 1).rows
        return sum(row.num_bytes for row in rows if row.on_gpu == self.work.on_gpu and not row.shared)

    def _plan(self, held: Collection[int], in_flight: int, *, spares: bool = False) -> StagePlan:
        sizes, settings = [self.sizes[index] for index in held], self.settings
        is_whole = len(sizes) == len(self.sizes)
        work = replace(
            self.work, microbatches_in_flight=in_flight, halved=settings.halved, keep=settings.keep,
            optimizer_bits=settings.optimizer_bits, recompute=settings.recompute, at_once=settings.at_once,
            batch_sequences=self.run.train.batch_sequences if is_whole else 0,
            spare_values=max(size.num_parameters for size in self.sizes) if spares else 0,
        )
        size = sum(sizes[1:], start=sizes[0])
        return plan_stage(size, work, main_limit_bytes=self.main_bytes, gpu_limit_bytes=self.gpu_bytes)


def planner_of(run: RunConfig, *, on_gpu: bool, main_bytes: int, gpu_bytes: int) -> Planner:
    """With the plainest settings. Makes the model's skeleton: names and shapes, no weights."""
    whole = skeleton(run)
    text_config = whole.config.get_text_config()
    work = Work(
        hidden_size=text_config.hidden_size, num_heads=text_config.num_attention_heads,
        sequence_length=run.train.sequence_length, microbatch_sequences=microbatch_sequences(run),
        pieces=run.train.batch_sequences // microbatch_sequences(run), bits=run.averaging.bits,
        buffers=outer.num_buffers(run), sync=run.averaging.mode == "sync", on_gpu=on_gpu, masked=run.is_mixture,
    )
    return Planner(_sizes(whole, cut(whole, run.fragments)), work, run, main_bytes, gpu_bytes, Settings())


def _sizes(whole: Model, fragments: Sequence[FragmentSpec]) -> list[PartSize]:
    block_of = block_of_each(whole)
    kept = [(block_of[name], name, tensor) for name, tensor in frozen_tensors(whole)] if is_adapted(whole) else []
    found = []
    for fragment in fragments:
        first, end = fragment.blocks
        own = [(name, tensor) for block, name, tensor in kept if first <= block < end]
        matrices = [tensor for name, tensor in own if is_matrix(name)]
        found.append(PartSize(
            sum(math.prod(tensor.shape) for tensor in fragment.tensors), end - first,
            whole.config.get_text_config().vocab_size if fragment is fragments[-1] else 0,
            base_bytes=sum(tensor.numel() * tensor.element_size() for tensor in matrices),
            base_values=sum(tensor.numel() for name, tensor in own if not is_matrix(name)),
            largest_matrix=largest_matrix(whole),
        ))
    return found
