"""What this peer holds at its start: what it was told to, the whole model where that fits, or else the stage of as many
fragments as fit that the swarm needs most (pipeline/placement.py).

The plan counts everything that training and averaging keep. Where a stage is too large for many microbatches at once,
fewer are planned for, down to one, before a smaller stage is; the chain then takes no more than that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from swarm.config import PeerConfig, RunConfig
from swarm.errors import SwarmError
from swarm.host.device import available_bytes
from swarm.host.memory import PartSize, StagePlan, Work, check_fits, plan_stage
from swarm.model.fragments import FragmentSpec, cut
from swarm.model.skeleton import skeleton
from swarm.network.records import Status
from swarm.pipeline.placement import choose_stage
from swarm.pipeline.snapshot import NO_STAGE, Fragments, Holder
from swarm.train import surroundings
from swarm.train.serving import CREDIT, microbatch_sequences


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


def choose(
    run: RunConfig, config: PeerConfig, *, device: torch.device, statuses: Mapping[str, Status], peer_id: str
) -> Place:
    """Raises ConfigError where the fragments that were asked for do not fit, SwarmError where none does."""
    whole = skeleton(run)
    fragments = cut(whole, run.fragments)
    text_config = whole.config.get_text_config()
    main_bytes = min(available_bytes(), config.max_memory or available_bytes())
    gpu_bytes = 0
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        gpu_bytes = min(free, config.max_memory or free)
    planner = Planner(
        [_size(fragment, text_config.vocab_size, is_last=fragment is fragments[-1]) for fragment in fragments],
        Work(
            hidden_size=text_config.hidden_size, num_heads=text_config.num_attention_heads,
            sequence_length=run.train.sequence_length, bits=run.averaging.bits, on_gpu=device.type == "cuda",
        ), run, main_bytes, gpu_bytes,
    )
    everything = (0, run.fragments)
    if config.fragment_span is not None:
        place = planner.place(config.fragment_span, "as it was told to")
        check_fits(place.plan)
        return place
    place = planner.place(everything, "they fit")
    if place.plan.fits:
        return place
    if not planner.room_bytes():
        raise SwarmError(
            "this model does not fit", why="not even one fragment of it:\n" + planner.place((0, 1), "").plan.table(),
            do="use a machine with more memory, allow more (--max-memory), or cut the model into more fragments",
        )
    me = Holder(peer_id, NO_STAGE, NO_STAGE, planner.room_bytes(), surroundings.usual_speed(run, statuses))
    first, end = choose_stage(surroundings.snapshot(run, statuses, planner.fragments()), me)
    while end - first > 1 and not planner.place((first, end), "").plan.fits:
        end -= 1
    place = planner.place((first, end), "as many as fit, where the swarm needs them most")
    check_fits(place.plan)
    return place


@dataclass(frozen=True)
class Planner:
    """What fits into this peer's memory, as it was free at the start."""

    sizes: Sequence[PartSize]
    """of each fragment"""
    work: Work
    run: RunConfig
    main_bytes: int
    gpu_bytes: int

    def place(self, part: tuple[int, int], why: str) -> Place:
        """With as many microbatches at once as fit; with one where even that does not."""
        in_flight = self.in_flight(range(*part)) or 1
        chained = part != (0, len(self.sizes))
        plan = self._plan(range(*part), in_flight, chained=chained)
        which = f"fragments {part[0]}:{part[1]} of {len(self.sizes)}" if chained else "the whole model"
        return Place(part, in_flight, plan, f"{which}: {why}", self)

    def in_flight(self, held: Collection[int]) -> int:
        """For how many microbatches at once there is room beside these fragments; 0: not for one."""
        chained = len(held) < len(self.sizes)
        in_flight = CREDIT
        while in_flight and not self._plan(held, in_flight, chained=chained).fits:
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
        largest = max((end - first for first, end in self.fitting()), default=0)
        return min(limit, sum(sorted(self.fragments().sizes_bytes)[-largest:])) if largest else 0

    def fitting(self) -> Iterator[tuple[int, int]]:
        for first in range(len(self.sizes)):
            for end in range(first + 1, len(self.sizes) + 1):
                if not self.place((first, end), "").plan.fits:
                    break
                yield first, end

    def bytes_of(self, index: int) -> int:
        """That a fragment takes of this peer's room, with one microbatch at a time."""
        plan = self._plan([index], 1, chained=True)
        return plan.gpu_bytes if self.work.on_gpu else plan.main_bytes - plan.rows[0].num_bytes

    def _plan(self, held: Iterable[int], in_flight: int, *, chained: bool) -> StagePlan:
        sizes, train = [self.sizes[index] for index in held], self.run.train
        sequences = microbatch_sequences(self.run) if chained else train.batch_sequences
        work = replace(
            self.work, microbatch_sequences=sequences, microbatches_in_flight=in_flight if chained else 1,
            chained=chained,
        )
        size = sum(sizes[1:], start=sizes[0])
        return plan_stage(size, work, main_limit_bytes=self.main_bytes, gpu_limit_bytes=self.gpu_bytes)


def _size(fragment: FragmentSpec, vocabulary: int, *, is_last: bool) -> PartSize:
    numel = sum(torch.Size(tensor.shape).numel() for tensor in fragment.tensors)
    return PartSize(numel, fragment.blocks[1] - fragment.blocks[0], vocabulary if is_last else 0)
