"""Speed, rounds, days and money of runs that can be reckoned by hand, and what must hold for any."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.config import AveragingConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from swarm.host.memory import PROGRAM_BYTES
from swarm.train.hardware import Computer
from swarm.train.lines import Line, Lines, parse_line, read_topology
from swarm.train.need import Costs, Machine, costs_of, need_of
from swarm.train.outlook import (
    COMPUTING,
    LINE,
    MEMORY,
    STREAM_SHARE,
    Outlook,
    Stage,
    chain_of,
    outlook,
    stage_of,
)
from swarm.train.place import Place, planner_of
from swarm.train.round_time import TCP_OVER_PAYLOAD

GPTJ: dict[str, Any] = {
    "model_type": "gptj", "n_layer": 4, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_positions": 64,
    "vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256,
}
RUN = RunConfig(
    name="test", model=ModelConfig(config=GPTJ), data=DataConfig(stdlib=True), fragments=4,
    train=TrainConfig(sequence_length=64, batch_sequences=4, total_tokens=10_000_000),
    averaging=AveragingConfig(tokens_per_round=100_000, max_round_s=86_400),
)
COMPUTER = Computer("a machine", 1e10, 1e10, 200.0, utilisation=1.0)
FAST = Lines((Line("a"), Line("b")))


@pytest.fixture(scope="module")
def costs() -> Costs:
    return costs_of(RUN)


@pytest.fixture(scope="module")
def whole() -> tuple[Place, ...]:
    planner = planner_of(RUN, on_gpu=False, main_bytes=0, gpu_bytes=0)
    return need_of(planner, Machine("large", PROGRAM_BYTES + 10**9)).places


@pytest.fixture(scope="module")
def parts(whole: tuple[Place, ...]) -> tuple[Place, ...]:
    [place] = whole
    return tuple(replace(place, part=part, in_flight=8) for part in ((0, 2), (2, 4)))


def seen(costs: Costs, places: tuple[Place, ...], lines: Lines = FAST, **averaging: Any) -> Outlook:
    return outlook(costs, places, COMPUTER, lines, replace(RUN.averaging, **averaging), buffers=1)


def test_flop_of_a_token_are_two_for_each_weight_of_a_matrix(costs: Costs) -> None:
    block, attention = 12 * 64 * 64, 4 * 64 * 64
    assert costs.forward_flop[1] == 2 * block + attention
    assert costs.forward_flop[3] == 2 * (block + 64 * 260) + attention, "the head; the embedding is looked up"
    assert costs.forward_flop[0] == costs.forward_flop[1] and costs.passes == 3
    assert costs.microbatch_tokens == 64 and len(costs.round_values) == 4


def test_adapters_spare_a_third_of_the_work_and_none_of_the_forward(costs: Costs) -> None:
    from swarm.config import LoraConfig

    adapted = costs_of(replace(RUN, model=ModelConfig(config=GPTJ, lora=LoraConfig(rank=2))))
    assert adapted.passes == 2 and sum(adapted.forward_flop) == sum(costs.forward_flop)
    assert sum(adapted.round_values) < sum(costs.round_values)


def test_whole_models_are_bound_by_computing(costs: Costs, whole: tuple[Place, ...]) -> None:
    found = seen(costs, whole)
    each = 1e10 / (3 * sum(costs.forward_flop))
    assert found.tokens_per_s == pytest.approx(2 * each) and found.machines == 2
    assert {chain.bound_by for chain in found.chains} == {COMPUTING}
    assert found.seconds == pytest.approx(1e7 / (2 * each))
    assert found.kwh == pytest.approx(2 * 200 * found.seconds / 3.6e6)
    assert found.price(per_kwh=0.3) == pytest.approx(0.3 * found.kwh)
    assert found.price(per_hour=2.0) == pytest.approx(4.0 * found.seconds / 3600)


def test_a_block_that_is_computed_twice_costs_a_third_more(costs: Costs, whole: tuple[Place, ...]) -> None:
    [place] = whole
    planner = place.planner
    again = replace(place, planner=replace(planner, settings=replace(planner.settings, recompute=True)))
    once, twice = (stage_of(costs, one, COMPUTER).compute_tokens_per_s for one in (place, again))
    assert once / twice == pytest.approx(4 / 3)


def test_rounds_are_opened_by_tokens_or_by_time(costs: Costs, whole: tuple[Place, ...]) -> None:
    by_tokens = seen(costs, whole)
    assert by_tokens.period_s == pytest.approx(100_000 / by_tokens.tokens_per_s) and not by_tokens.opened_by_time
    assert by_tokens.num_rounds == 100 and by_tokens.hidden
    by_time = seen(costs, whole, max_round_s=by_tokens.period_s / 4)
    assert by_time.opened_by_time and by_time.num_rounds == pytest.approx(400, abs=1)
    assert by_time.sent_bytes == pytest.approx(4 * by_tokens.sent_bytes, rel=0.01), "more rounds, more traffic"


def test_what_a_machine_sends_is_codec_arithmetic_and_tcps_own(costs: Costs, whole: tuple[Place, ...]) -> None:
    found = seen(costs, whole)
    assert found.sent_bytes == pytest.approx(100 * TCP_OVER_PAYLOAD * sum(costs.round_bytes)), "two members: half twice"


def test_thin_lines_make_rounds_rarer_and_stop_nobody(costs: Costs, whole: tuple[Place, ...]) -> None:
    thin = seen(costs, whole, Lines((parse_line("0.01/0.01/30ms"),)).first(2))
    assert not thin.hidden and thin.round_share > 1
    assert thin.period_s > thin.due_s and thin.num_rounds < 100
    assert thin.tokens_per_s == pytest.approx(seen(costs, whole).tokens_per_s), "whole models need no line to train"


def test_alone_there_are_no_rounds_on_any_line(costs: Costs, whole: tuple[Place, ...]) -> None:
    found = seen(costs, whole, Lines((parse_line("1/1/30ms"),)))
    assert found.sent_bytes == 0 and found.round_share == 0 and found.machines == 1


def test_stages_are_bound_by_the_line_where_it_is_thin(costs: Costs, parts: tuple[Place, ...]) -> None:
    many = tuple(replace(place, in_flight=10**6) for place in parts)
    thin = seen(costs, many, Lines((Line("a", 1e6, 1e6, 0.0), Line("b", 1e6, 1e6, 0.0))))
    assert {chain.bound_by for chain in thin.chains} == {LINE}
    most = STREAM_SHARE * 1e6 / 8 / (TCP_OVER_PAYLOAD * costs.forward_bytes)
    assert most / 2 <= thin.chains[0].tokens_per_s <= most, "rounds get at most half"
    wide = seen(costs, many, FAST)
    assert {chain.bound_by for chain in wide.chains} == {COMPUTING} and wide.machines == 4


def test_rounds_take_their_time_of_the_line_from_the_stages(costs: Costs, parts: tuple[Place, ...]) -> None:
    lines = Lines((Line("a", 1e6, 1e6, 0.0), Line("b", 1e6, 1e6, 0.0)))
    rare, often = (seen(costs, parts, lines, tokens_per_round=tokens) for tokens in (1_000_000, 20_000))
    assert often.tokens_per_s < rare.tokens_per_s and often.round_share > rare.round_share


def test_few_microbatches_at_once_leave_machines_waiting(costs: Costs, parts: tuple[Place, ...]) -> None:
    lines = Lines((parse_line("100/100/400ms"),)).first(2)
    one = seen(costs, tuple(replace(place, in_flight=1) for place in parts), lines)
    assert {chain.bound_by for chain in one.chains} == {MEMORY}
    two = seen(costs, tuple(replace(place, in_flight=2) for place in parts), lines)
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s, rel=1e-3)


def test_a_chain_by_hand() -> None:
    stages = [Stage((0, 1), 100.0, 1.0, 1.0, 2), Stage((1, 2), 50.0, 1.0, 1.0, 4)]
    chain = chain_of(stages, Line("a", 80.0, 160.0, 0.25), free=1.0, microbatch_tokens=10, crossing_bytes=1.5)
    assert chain.computing == 50 and chain.line == pytest.approx(STREAM_SHARE * 10)
    # 10 tokens: a fifth and a tenth of a second of work, 1 s of delays, 15 bytes at 7.5 a second
    assert chain.memory == pytest.approx(2 * 10 / (0.2 + 0.1 + 1.0 + 2.0))
    assert chain.bound_by == MEMORY and chain.tokens_per_s == chain.memory


@settings(max_examples=15, deadline=None)
@given(up=st.floats(0.1, 1000), rtt=st.integers(0, 500), tokens=st.integers(1_000, 10**7), count=st.integers(2, 8))
def test_no_swarm_is_faster_than_its_machines_and_all_figures_are_finite(
    costs: Costs, parts: tuple[Place, ...], up: float, rtt: int, tokens: int, count: int
) -> None:
    lines = Lines((Line("a", up * 1e6, 2e6 * up, rtt / 4000),)).first(count)
    found = seen(costs, parts, lines, tokens_per_round=tokens)
    assert 0 < found.tokens_per_s <= sum(chain.computing for chain in found.chains) * (1 + 1e-9)
    for figure in (found.seconds, found.sent_bytes, found.kwh, found.period_s, found.round_share, found.core_share):
        assert math.isfinite(figure) and figure >= 0
    assert found.num_rounds >= 1 and found.machines == 2 * count
    better = seen(costs, parts, replace(lines, lines=tuple(replace(line, latency_s=0.0) for line in lines.lines)))
    assert better.chains[0].memory >= found.chains[0].memory * 0.49, "rounds may take half of the line from one of them"


@pytest.mark.parametrize("measured", [4_114, 4_610])
def test_the_chain_that_was_measured_on_home_100_is_foretold(measured: int) -> None:
    """README, a model in stages: four stages, 150 ms a turn of 1,024 tokens, 1,024 hidden values in int8, 13 under
    way."""
    on, back = (TCP_OVER_PAYLOAD * (1024 * (1 + 2 / 256) + ids) for ids in (2, 0))
    stages = [
        Stage((index, index + 1), 1024 / 0.15, on * (index < 3) + back * (index > 0), 0.0, 13) for index in range(4)
    ]
    stages = [replace(stage, received_bytes=stage.sent_bytes) for stage in stages]
    [line] = read_topology("home-100").first(1).lines
    chain = chain_of(stages, line, free=1.0, microbatch_tokens=1024, crossing_bytes=on + back)
    assert chain.bound_by == LINE and chain.tokens_per_s == pytest.approx(measured, rel=0.15)
