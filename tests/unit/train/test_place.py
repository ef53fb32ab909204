"""What a peer holds at its start: by what it was told, by its memory, and by where the swarm needs it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from swarm.config import (
    AveragingConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    PeerConfig,
    PhaseConfig,
    RunConfig,
    TrainConfig,
)
from swarm.errors import ConfigError, SwarmError
from swarm.host.memory import PROGRAM_BYTES
from swarm.network.records import Head, Status
from swarm.train.place import Place, Ways, choose, planner_of
from swarm.train.serving import CREDIT
from swarm.train.settings import Settings, bfloat16_problem, choices

CPU = torch.device("cpu")
GPTJ: dict[str, Any] = {
    "model_type": "gptj", "n_layer": 6, "n_embd": 256, "n_head": 4, "rotary_dim": 8, "n_positions": 64,
    "vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256,
}
MB = 1_000_000


def run_with(**train: Any) -> RunConfig:
    return RunConfig(
        name="test", model=ModelConfig(config=GPTJ), data=DataConfig(stdlib=True), fragments=6,
        train=TrainConfig(**{"sequence_length": 64, "batch_sequences": 4, **train}),
    )


def place(statuses: dict[str, Status] | None = None, *, run: RunConfig | None = None, **config: Any) -> Place:
    return choose(
        run or run_with(), PeerConfig(**config), device=CPU, statuses=statuses or {}, peer_id="me"
    )


def holding(first: int, end: int, *, speed: float = 100.0) -> Status:
    run = run_with()
    head = Head(version=1, digest="a" * 64, tokens=5)
    heads = [head if first <= index < end else None for index in range(6)]
    return Status(
        run_id=run.run_id, name="x", role="trainer", heads=heads, pending=[0] * 6, tokens_per_s=speed,
        serving=[first, end],
    )


def with_room(megabytes: int) -> dict[str, int]:
    return {"max_memory": PROGRAM_BYTES + megabytes * MB}


def eight_bit(**config: Any) -> dict[str, Any]:
    return {"weights": "bf16", "optimizer_bits": "8", **config}


def test_where_it_fits_a_peer_holds_the_whole_model() -> None:
    chosen = place()
    assert chosen.part == (0, 6) and "the whole model" in chosen.text and chosen.plan.fits


def test_a_peer_holds_what_it_was_told_to_also_where_more_would_fit() -> None:
    chosen = place(fragments="1:3")
    assert chosen.part == (1, 3) and chosen.in_flight == CREDIT
    assert "fp32 weights, 32-bit AdamW" in chosen.text and "ample" in chosen.text
    assert chosen.plan.total_bytes < place().plan.total_bytes


def test_what_was_asked_for_and_does_not_fit_is_refused_with_the_table() -> None:
    with pytest.raises(ConfigError, match="do not fit") as caught:
        place(fragments="0:5", **with_room(30))
    assert "global weights and momentum" in caught.value.why and "--max-memory" in caught.value.do


def test_with_little_room_it_takes_as_many_as_fit_and_never_more_than_its_memory() -> None:
    counts = []
    for megabytes in (140, 170, 200, 250, 1000):
        chosen = place(**with_room(megabytes))
        assert chosen.plan.fits and chosen.plan.main_bytes <= PROGRAM_BYTES + megabytes * MB
        counts.append(chosen.part[1] - chosen.part[0])
    assert counts == sorted(counts) and counts[0] < counts[-1] == 6 and 1 <= counts[0]


def test_fewer_microbatches_come_before_fewer_fragments() -> None:
    chosen = place(fragments="0:2", **with_room(400))
    assert 1 <= chosen.in_flight < CREDIT and chosen.plan.fits


@pytest.mark.parametrize(("others", "gap"), [
    ([(0, 3), (0, 3), (3, 5)], 5), ([(1, 6), (1, 6)], 0), ([(0, 2), (3, 6)], 2), ([(0, 6), (0, 2), (4, 6)], 3),
])
def test_it_goes_where_nobody_or_the_fewest_are(others: list[tuple[int, int]], gap: int) -> None:
    statuses = {f"peer{number}": holding(*stage) for number, stage in enumerate(others)}
    first, end = place(statuses, **with_room(170)).part
    assert first <= gap < end


def test_where_not_even_one_fragment_fits_it_says_what_would_help() -> None:
    with pytest.raises(SwarmError, match="this model does not fit") as caught:
        place(**with_room(1))
    assert "gradients" in caught.value.why and "--max-memory" in caught.value.do


def test_statuses_that_make_no_sense_do_not_count() -> None:
    odd = holding(0, 3).model_copy(update={"serving": [0, 200]})
    first, end = place({"odd": odd, "whole": holding(1, 6)}, **with_room(170)).part
    assert first <= 0 < end


def test_who_is_on_its_way_there_counts_and_who_leaves_does_not() -> None:
    coming = holding(0, 0).model_copy(update={"serving": None, "target": [0, 3]})
    first, end = place({"coming": coming, "a": holding(3, 4), "b": holding(4, 5)}, **with_room(170)).part
    assert first <= 5 < end, "0 to 2 are cared for"
    leaving = holding(3, 6).model_copy(update={"leaving": True})
    first, end = place({"here": holding(0, 3), "leaving": leaving}, **with_room(170)).part
    assert first >= 3 and end > first


def test_the_planner_says_how_many_microbatches_fit_beside_any_fragments() -> None:
    planner = place(fragments="1:2", **with_room(250)).planner
    counts = [planner.in_flight(held) for held in ([1], [1, 4], [1, 3, 4], range(6))]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert planner.in_flight([1, 2]) == planner.in_flight([2, 4]), "wherever they are"
    sizes = planner.fragments()
    assert len(sizes) == 6 and sizes.work == (1.0,) * 6
    assert sizes.sizes_bytes[1] <= planner.room_bytes() <= 250 * MB + PROGRAM_BYTES


def test_spare_copies_are_kept_where_there_is_memory_and_make_no_stage_smaller() -> None:
    row = "a spare copy that follows a round"

    def has_row(chosen: Place) -> bool:
        return row in [one.what for one in chosen.plan.rows]

    told = place(fragments="1:3")
    assert told.spares_fit and has_row(told) and "spare" not in told.text
    [size] = [one.num_bytes for one in told.plan.rows if one.what == row]
    assert size == 25 * max(part.num_parameters for part in told.planner.sizes), "of the largest, held or not"
    without = place(fragments="1:3", spare_disk=0)
    assert without.spares_fit and not has_row(without) and without.plan.main_bytes == told.plan.main_bytes - size
    whole = place()
    assert whole.spares_fit and not has_row(whole), "it holds everything"
    short = without.plan.main_bytes + size - 1
    tight = place(fragments="1:3", max_memory=short, weights="fp32", optimizer_bits="32")
    assert tight.plan.fits and (tight.part, tight.in_flight) == (without.part, without.in_flight)
    assert not tight.spares_fit and not has_row(tight) and "no memory for spare copies" in tight.text


def test_packed_rows_need_masks() -> None:
    def masks(run: RunConfig) -> list[int]:
        return [row.num_bytes for row in place(run=run, fragments="1:2").plan.rows if row.what == "attention masks"]

    assert masks(run_with()) == []
    packed = dataclasses.replace(run_with(), phases=[PhaseConfig(objective="prefix")])
    assert masks(packed) == [(CREDIT * 4 + 3) * 64**2]


# --- how memory is used


def test_what_costs_precision_comes_last() -> None:
    """From much memory to little: the past goes first, then bits."""
    seen = []
    for megabytes in (5000, 700, 300, 230, 200, 180):
        settings = place(fragments="0:4", **with_room(megabytes)).planner.settings
        seen.append((settings.halved, settings.optimizer_bits, -["little", "some", "ample"].index(settings.keep.name)))
    assert seen == sorted(seen, key=lambda way: (way[0], -way[1], way[2]))
    assert seen[0] == (False, 32, -2) and seen[2][:2] == (False, 32)


def test_fewer_bits_where_only_they_fit() -> None:
    """A model of so many parameters that a byte each matters more than bitsandbytes' own memory."""
    wide = RunConfig(
        name="test", model=ModelConfig(config={**GPTJ, "n_embd": 2048}), data=DataConfig(stdlib=True), fragments=6,
        train=TrainConfig(sequence_length=64, batch_sequences=4),
    )
    found = {}
    for gigabytes in (2, 3, 4, 5, 6, 8, 16):
        config = {"fragments": "1:3", "max_memory": gigabytes * 1000 * MB}
        try:
            settings = place(run=wide, **config).planner.settings
        except ConfigError:
            continue
        found[gigabytes] = settings.halved, settings.optimizer_bits
    kinds = list(found.values())
    assert kinds == sorted(kinds, key=lambda kind: (kind[0], -kind[1]), reverse=True), found
    assert kinds[0] == (True, 8) and kinds[-1] == (False, 32), found


def test_what_was_asked_for_is_kept_to() -> None:
    assert place(**eight_bit()).planner.settings.halved and place(**eight_bit()).planner.settings.optimizer_bits == 8
    assert "AdamW, 8-bit" in place(optimizer_bits="8").plan.table()
    assert place(weights="bf16", optimizer_bits="32").planner.settings.optimizer_bits == 32
    assert "bfloat16" in place(weights="bf16").text and place(weights="bf16").planner.settings.optimizer_bits == 32
    with pytest.raises(ConfigError, match="do not fit"):
        place(fragments="0:4", weights="fp32", optimizer_bits="32", **with_room(60))


def test_a_sync_run_is_exact() -> None:
    sync = RunConfig(**{**vars(run_with()), "averaging": AveragingConfig(mode="sync", bits=32)})
    settings = place(run=sync, optimizer_bits="8").planner.settings
    assert not settings.halved and settings.keep.rounds == 6
    assert "AdamW" not in place(run=sync).plan.table()
    with pytest.raises(ConfigError, match="not for this run"):
        place(run=sync, weights="bf16")


def test_what_this_machine_cannot_do_is_said_and_not_taken_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.train.settings.eight_bit_problem", lambda device: "bitsandbytes is broken")
    with pytest.raises(ConfigError, match="cannot be used here") as caught:
        place(optimizer_bits="8")
    assert "broken" in caught.value.why
    ways = list(choices(run_with(), PeerConfig(), CPU, round_bytes=0))
    assert {way.optimizer_bits for way in ways} == {32}


def test_results_of_a_round_are_kept_until_they_are_applied() -> None:
    ways = list(choices(run_with(), PeerConfig(), CPU, round_bytes=10**9))
    assert all(way.keep.results_bytes >= way.keep.rounds * 10**9 for way in ways)
    assert bfloat16_problem(CPU) == ""


def test_a_prepared_model_has_what_was_chosen() -> None:
    for halved in (False, True):
        model = torch.nn.Linear(4, 4)
        Settings(halved=halved).prepare(model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if halved else torch.float32}


def test_what_costs_time_comes_after_what_costs_precision() -> None:
    ways = list(choices(run_with(), PeerConfig(), CPU, round_bytes=0, problem=lambda device, *, halved, bits: ""))
    first = next(index for index, way in enumerate(ways) if way.recompute)
    assert all(way.recompute for way in ways[first:]) and ways[first - 1].halved
    assert [way.at_once for way in ways[first:]] == [0, 0, 1, 1]
    assert {(way.halved, way.optimizer_bits) for way in ways[first:]} == {(True, 8)}
    assert "blocks computed twice, 1 sequence at once" in ways[-1].text and "twice" not in ways[0].text


def test_blocks_are_computed_twice_where_only_that_fits() -> None:
    """Long sequences: what is kept of them is more than the weights."""
    long = run_with(sequence_length=2048, batch_sequences=4)
    few = place(run=long, fragments="1:5", **with_room(550), optimizer_bits="32", weights="fp32").planner.settings
    many = place(run=long, fragments="1:5", max_memory=8000 * MB).planner.settings
    assert few.recompute and few.optimizer_bits == 32 and not few.halved, "what was asked for is kept to"
    assert not many.recompute


def lora_run(base: str = "nf4") -> RunConfig:
    wide = {**GPTJ, "n_embd": 1024, "n_head": 16}
    model = ModelConfig(config=wide, lora=LoraConfig(rank=8, base=base))
    return RunConfig(**{**vars(run_with(sequence_length=16)), "model": model})


def test_a_frozen_base_is_planned_for_in_its_own_bits() -> None:
    sizes = {base: place(run=lora_run(base), fragments="1:2").plan for base in ("nf4", "bf16", "fp32")}
    weights = 12 * 1024**2
    for base, bits in (("nf4", 4.25), ("bf16", 16), ("fp32", 32)):
        [row] = [row.num_bytes for row in sizes[base].rows if row.what == "frozen base"]
        assert row == pytest.approx(weights * bits / 8, rel=0.02)
    [trained] = [row.what for row in sizes["nf4"].rows if row.what.startswith("weights (")]
    assert trained == "weights (147k parameters)", "of six layers: rank times (in + out)"


def test_with_adapters_more_of_a_model_fits() -> None:
    def longest(run: RunConfig) -> int:
        planner = planner_of(run, on_gpu=False, main_bytes=PROGRAM_BYTES + 450 * MB, gpu_bytes=0)
        return Ways(planner, PeerConfig(), device=CPU).roomiest().longest()

    all_weights = RunConfig(**{**vars(lora_run()), "model": ModelConfig(config=lora_run().model.config)})
    assert longest(all_weights) == 0 < 4 <= longest(lora_run())


def test_an_fp32_base_is_computed_with_in_fp32() -> None:
    ways = list(choices(lora_run("fp32"), PeerConfig(), CPU, round_bytes=0))
    assert not any(way.halved for way in ways)
    with pytest.raises(ConfigError, match="not for this run") as caught:
        next(choices(lora_run("fp32"), PeerConfig(weights="bf16"), CPU, round_bytes=0))
    assert "frozen base is fp32" in caught.value.why
    assert next(choices(lora_run(), PeerConfig(base="/there"), CPU, round_bytes=0)).base == "/there"
