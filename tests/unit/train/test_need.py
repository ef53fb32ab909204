"""How many machines a run needs, and what each sends: the arithmetic by hand, and what must hold for any run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.config import AveragingConfig, DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from swarm.host.memory import PROGRAM_BYTES
from swarm.train.need import Costs, Machine, costs_of, ddp_bytes, need_of, traffic_of
from swarm.train.place import Planner, planner_of

MB = 1_000_000
GPTJ: dict[str, Any] = {
    "model_type": "gptj", "n_layer": 6, "n_embd": 256, "n_head": 4, "rotary_dim": 8, "n_positions": 64,
    "vocab_size": 2600, "bos_token_id": 256, "eos_token_id": 256,
}
COSTS = Costs(
    total_tokens=1000, rounds=10, round_bytes=(100, 50, 50, 200), forward_bytes=7.0, back_bytes=5.0, parameters=3000,
    step_tokens=25,
)


def run_with(**model: Any) -> RunConfig:
    return RunConfig(
        name="test", model=ModelConfig(config=GPTJ, **model), data=DataConfig(stdlib=True), fragments=6,
        train=TrainConfig(sequence_length=64, batch_sequences=4, total_tokens=1_000_000),
        averaging=AveragingConfig(tokens_per_round=300_000, bits=8),
    )


@pytest.fixture(scope="module")
def planner() -> Planner:
    return planner_of(run_with(), on_gpu=False, main_bytes=0, gpu_bytes=0)


def test_a_round_costs_a_member_twice_its_part_in_the_others() -> None:
    """Of K members each sends (K - 1) / K of its contribution, and its own part's result to K - 1 others."""
    assert traffic_of(COSTS, (0, 4), replicas=4).averaging == 10 * 400 * 2 * 3 / 4
    assert traffic_of(COSTS, (1, 3), replicas=2).averaging == 10 * 100
    assert traffic_of(COSTS, (0, 4), replicas=1).total == 0


def test_stages_share_the_tokens_of_their_fragments() -> None:
    first, middle, last = (traffic_of(COSTS, part, replicas=2).pipeline for part in ((0, 1), (1, 3), (3, 4)))
    assert (first, middle, last) == (500 * 7, 500 * 12, 500 * 5)
    assert traffic_of(COSTS, (1, 3), replicas=2).total == middle + 1000


def test_data_parallelism_sends_bf16_gradients_of_every_step_around_a_ring() -> None:
    assert ddp_bytes(COSTS, replicas=4) == 1000 / 100 * 3000 * 2 * 2 * 3 / 4
    assert ddp_bytes(COSTS, replicas=1) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64))
def test_more_replicas_make_rounds_dearer_and_stages_cheaper(one: int, other: int) -> None:
    fewer, more = (traffic_of(COSTS, (1, 3), replicas=count) for count in sorted((one, other)))
    assert fewer.averaging <= more.averaging and fewer.pipeline >= more.pipeline


def test_costs_come_from_layout_and_codec() -> None:
    costs = costs_of(run_with())
    assert costs.rounds == 4 and len(costs.round_bytes) == 6 and costs.step_tokens == 256
    assert sum(costs.round_bytes) == pytest.approx(costs.parameters * (1 + 2 / 256), rel=0.01), "int8, fp16 scales"
    assert costs.round_bytes[1] == costs.round_bytes[4] < costs.round_bytes[0], "the embedding"
    assert costs.back_bytes == pytest.approx(256 + 2 + 4 / 64, abs=0.2)
    assert costs.forward_bytes == pytest.approx(costs.back_bytes + 2, abs=0.01), "a token's id goes with it"


def test_of_adapters_there_is_little_to_send() -> None:
    run = run_with(lora=LoraConfig(rank=4))
    costs = costs_of(run)
    assert costs.parameters == 6 * 4 * (4 * 512 + 2 * 1280)
    assert sum(costs.round_bytes) < 0.05 * sum(costs_of(run_with()).round_bytes)


@settings(max_examples=12, deadline=None)
@given(st.integers(30, 900), st.integers(0, 400))
def test_every_fragment_is_held_once_or_said_to_be_too_large(planner: Planner, main: int, gpu: int) -> None:
    machine = Machine("any", PROGRAM_BYTES + main * MB, gpu * MB)
    need = need_of(planner, machine)
    held = [index for place in need.places for index in range(*place.part)]
    assert sorted([*held, *need.too_large]) == list(range(6))
    for place in need.places:
        assert place.plan.fits and place.plan.gpu_bytes <= machine.gpu_bytes
        assert place.planner.work.on_gpu == (gpu > 0)
    assert bool(need.short_of) == bool(need.too_large)


def test_more_memory_never_needs_more_peers(planner: Planner) -> None:
    counts = []
    for megabytes in (150, 200, 300, 500, 3000):
        need = need_of(planner, Machine("cpu", PROGRAM_BYTES + megabytes * MB))
        if not need.too_large:
            counts.append(len(need.places))
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1 and len(counts) >= 3


def test_a_machine_that_holds_nothing_is_told_what_one_fragment_takes(planner: Planner) -> None:
    need = need_of(planner, Machine("tiny", 100 * MB))
    assert need.places == () and need.too_large == tuple(range(6))
    assert "program" in need.short_of and "too little" in need.short_of and "computed again" in need.short_of
