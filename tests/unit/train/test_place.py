"""What a peer holds at its start: by what it was told, by its memory, and by where the swarm needs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swarm.config import DataConfig, ModelConfig, PeerConfig, RunConfig, TrainConfig
from swarm.errors import ConfigError, SwarmError
from swarm.host.memory import PROGRAM_BYTES
from swarm.network.records import Head, Status
from swarm.train.place import Place, choose
from swarm.train.serving import CREDIT

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


def test_where_it_fits_a_peer_holds_the_whole_model() -> None:
    chosen = place()
    assert chosen.part == (0, 6) and "the whole model" in chosen.text and chosen.plan.fits


def test_a_peer_holds_what_it_was_told_to_also_where_more_would_fit() -> None:
    chosen = place(fragments="1:3")
    assert chosen.part == (1, 3) and chosen.in_flight == CREDIT
    assert chosen.plan.total_bytes < place().plan.total_bytes + CREDIT * 4 * 2_000_000


def test_what_was_asked_for_and_does_not_fit_is_refused_with_the_table() -> None:
    with pytest.raises(ConfigError, match="do not fit") as caught:
        place(fragments="0:5", **with_room(30))
    assert "global weights and momentum" in caught.value.why and "--max-memory" in caught.value.do


def test_with_little_room_it_takes_as_many_as_fit_and_never_more_than_its_memory() -> None:
    counts = []
    for megabytes in (40, 60, 80, 120, 1000):
        chosen = place(**with_room(megabytes))
        assert chosen.plan.fits and chosen.plan.main_bytes <= PROGRAM_BYTES + megabytes * MB
        counts.append(chosen.part[1] - chosen.part[0])
    assert counts == sorted(counts) and counts[0] < counts[-1] == 6 and 1 <= counts[0]


def test_fewer_microbatches_come_before_fewer_fragments() -> None:
    chosen = place(fragments="0:2", **with_room(90))
    assert 1 <= chosen.in_flight < CREDIT and chosen.plan.fits


@pytest.mark.parametrize(("others", "gap"), [
    ([(0, 3), (0, 3), (3, 5)], 5), ([(1, 6), (1, 6)], 0), ([(0, 2), (3, 6)], 2), ([(0, 6), (0, 2), (4, 6)], 3),
])
def test_it_goes_where_nobody_or_the_fewest_are(others: list[tuple[int, int]], gap: int) -> None:
    statuses = {f"peer{number}": holding(*stage) for number, stage in enumerate(others)}
    first, end = place(statuses, **with_room(60)).part
    assert first <= gap < end


def test_where_not_even_one_fragment_fits_it_says_what_would_help() -> None:
    with pytest.raises(SwarmError, match="this model does not fit") as caught:
        place(**with_room(1))
    assert "gradients" in caught.value.why and "--max-memory" in caught.value.do


def test_statuses_that_make_no_sense_do_not_count() -> None:
    odd = holding(0, 3).model_copy(update={"serving": [0, 200]})
    first, end = place({"odd": odd, "whole": holding(1, 6)}, **with_room(60)).part
    assert first <= 0 < end


def test_who_is_on_its_way_there_counts_and_who_leaves_does_not() -> None:
    coming = holding(0, 0).model_copy(update={"serving": None, "target": [0, 3]})
    first, end = place({"coming": coming, "a": holding(3, 4), "b": holding(4, 5)}, **with_room(60)).part
    assert first <= 5 < end, "0 to 2 are cared for"
    leaving = holding(3, 6).model_copy(update={"leaving": True})
    first, end = place({"here": holding(0, 3), "leaving": leaving}, **with_room(60)).part
    assert first >= 3 and end > first


def test_the_planner_says_how_many_microbatches_fit_beside_any_fragments() -> None:
    planner = place(**with_room(90)).planner
    counts = [planner.in_flight(held) for held in ([1], [1, 4], [1, 3, 4], range(6))]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] == 0
    assert planner.in_flight([1, 2]) == planner.in_flight([2, 4]), "wherever they are"
    sizes = planner.fragments()
    assert len(sizes) == 6 and sizes.work == (1.0,) * 6
    assert sizes.sizes_bytes[1] <= planner.room_bytes() <= 90 * MB + PROGRAM_BYTES
