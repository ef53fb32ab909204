"""What this peer holds at its start: what it was told to, the whole model where that fits, or else the stage of as many
fragments as fit that the swarm needs most (pipeline/placement.py).

The plan counts everything that training and averaging keep. Where a stage is too large for many microbatches at once,
fewer are planned for, down to one, before a smaller stage is; the chain then takes no more than that.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
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
from swarm.pipeline.snapshot import Fragments, Holder, Snapshot
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
    planner = _Planner(
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
    room_bytes = gpu_bytes if device.type == "cuda" else main_bytes
    largest = max((end - first for first, end in planner.fitting()), default=0)
    if not largest:
        raise SwarmError(
            "this model does not fit", why="not even one fragment of it:\n" + planner.place((0, 1), "").plan.table(),
            do="use a machine with more memory, allow more (--max-memory), or cut the model into more fragments",
        )
    sizes = tuple(planner.bytes_of(index) for index in range(run.fragments))
    me = Holder(peer_id, (0, 0), (0, 0), min(room_bytes, sum(sorted(sizes)[-largest:])), _usual_speed(run, statuses))
    snapshot = Snapshot(_holders(run, statuses), Fragments(sizes, _work(fragments)))
    first, end = choose_stage(snapshot, me)
    while end - first > 1 and not planner.place((first, end), "").plan.fits:
        end -= 1
    place = planner.place((first, end), "as many as fit, where the swarm needs them most")
    check_fits(place.plan)
    return place


@dataclass(frozen=True)
class _Planner:
    sizes: Sequence[PartSize]
    work: Work
    run: RunConfig
    main_bytes: int
    gpu_bytes: int

    def place(self, part: tuple[int, int], why: str) -> Place:
        """With as many microbatches at once as fit; with one where even that does not."""
        chained = part != (0, len(self.sizes))
        size = sum(self.sizes[slice(*part)][1:], start=self.sizes[part[0]])
        in_flight = CREDIT
        plan = self._plan(size, in_flight, chained=chained)
        while not plan.fits and in_flight > 1:
            in_flight //= 2
            plan = self._plan(size, in_flight, chained=chained)
        which = f"fragments {part[0]}:{part[1]} of {len(self.sizes)}" if chained else "the whole model"
        return Place(part, in_flight, plan, f"{which}: {why}")

    def fitting(self) -> Iterator[tuple[int, int]]:
        for first in range(len(self.sizes)):
            for end in range(first + 1, len(self.sizes) + 1):
                if not self.place((first, end), "").plan.fits:
                    break
                yield first, end

    def bytes_of(self, index: int) -> int:
        """That a fragment takes of this peer's room, with one microbatch at a time."""
        plan = self._plan(self.sizes[index], 1, chained=True)
        return plan.gpu_bytes if self.work.on_gpu else plan.main_bytes - plan.rows[0].num_bytes

    def _plan(self, size: PartSize, in_flight: int, *, chained: bool) -> StagePlan:
        train = self.run.train
        sequences = microbatch_sequences(self.run) if chained else train.batch_sequences
        work = replace(
            self.work, microbatch_sequences=sequences, microbatches_in_flight=in_flight if chained else 1,
            chained=chained,
        )
        return plan_stage(size, work, main_limit_bytes=self.main_bytes, gpu_limit_bytes=self.gpu_bytes)


def _size(fragment: FragmentSpec, vocabulary: int, *, is_last: bool) -> PartSize:
    numel = sum(torch.Size(tensor.shape).numel() for tensor in fragment.tensors)
    return PartSize(numel, fragment.blocks[1] - fragment.blocks[0], vocabulary if is_last else 0)


def _work(fragments: Sequence[FragmentSpec]) -> tuple[float, ...]:
    return tuple(float(fragment.blocks[1] - fragment.blocks[0]) for fragment in fragments)


def _holders(run: RunConfig, statuses: Mapping[str, Status]) -> list[Holder]:
    found = []
    for peer_id, status in statuses.items():
        held = sorted(status.held())
        if held and len(status.heads) == run.fragments:
            stage = held[0], held[-1] + 1
            found.append(Holder(peer_id, stage, stage, 0, _speed(run, status)))
    return found


def _speed(run: RunConfig, status: Status) -> float:
    """Fragments times tokens a second; what a peer does now, since what it could do nobody has measured."""
    return max(1.0, status.tokens_per_s * run.fragments)


def _usual_speed(run: RunConfig, statuses: Mapping[str, Status]) -> float:
    speeds = [_speed(run, status) for status in statuses.values() if status.held()]
    return statistics.median(speeds) if speeds else 1.0
