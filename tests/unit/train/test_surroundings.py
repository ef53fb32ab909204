"""What placement is told of the others: from statuses alone."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.network.records import Move, Status
from swarm.pipeline.snapshot import NO_STAGE, Claim, Fragments
from swarm.train import surroundings

RUN = RunConfig(
    name="test", model=ModelConfig(config={"model_type": "gptj"}), data=DataConfig(stdlib=True), fragments=4
)
FRAGMENTS = Fragments((1, 1, 1, 1), (1.0, 1.0, 1.0, 1.0))


def status(**changes: Any) -> Status:
    return Status(**{"run_id": "demo-0123456789ab", "name": "x", "role": "trainer", **changes})


def test_a_peer_is_where_it_serves_and_goes_where_it_says() -> None:
    claim = Move(stage=[2, 4], gain=1.5, heals=True)
    found = surroundings.snapshot(RUN, {
        "a": status(serving=[0, 2], speed=7.0), "b": status(serving=[0, 1], target=[0, 3], speed=2.0, claim=claim),
        "c": status(target=[3, 4], speed=1.0),
    }, FRAGMENTS)
    a, b, c = found.holders
    assert (a.serving, a.target, a.speed, a.claim) == ((0, 2), (0, 2), 7.0, None)
    assert (b.serving, b.target, b.claim) == ((0, 1), (0, 3), Claim((2, 4), 1.5, heals=True))
    assert (c.serving, c.target) == (NO_STAGE, (3, 4)), "it is still loading"


@pytest.mark.parametrize("changes", [
    {"leaving": True}, {"role": "rendezvous"}, {"role": "observer"}, {"serving": [2, 200]}, {"target": [3, 1]},
])
def test_who_leaves_or_makes_no_sense_is_not_there(changes: dict[str, Any]) -> None:
    odd = status(**{"serving": [0, 2], "speed": 1.0, **changes})
    found = surroundings.snapshot(RUN, {"x": odd, "y": status(speed=1.0)}, FRAGMENTS)
    assert [holder.peer_id for holder in found.holders] == ["y"]


def test_who_has_not_said_how_fast_it_is_counts_as_the_usual_one() -> None:
    statuses = {
        "a": status(speed=4.0), "b": status(tokens_per_s=2.0), "c": status(speed=100.0), "d": status(serving=[0, 1]),
    }
    assert surroundings.speed(RUN, statuses["b"]) == 8.0, "a peer with the whole model tells tokens of all fragments"
    assert surroundings.usual_speed(RUN, statuses) == 8.0
    assert surroundings.snapshot(RUN, statuses, FRAGMENTS).holders[3].speed == 8.0
    assert surroundings.usual_speed(RUN, {}) == surroundings.usual_speed(RUN, {"d": statuses["d"]}) == 1.0


def test_what_was_worked_out_is_used_again_where_only_claims_have_changed() -> None:
    statuses = {"a": status(serving=[0, 2], speed=1.0)}
    first = surroundings.snapshot(RUN, statuses, FRAGMENTS)
    claimed = {"a": status(serving=[0, 2], speed=1.0, claim=Move(stage=[1, 3], gain=2.0))}
    second = surroundings.snapshot(RUN, claimed, FRAGMENTS, like=first)
    assert second._places is first._places and second.claims["a"].stage == (1, 3)
    moved = surroundings.snapshot(RUN, {"a": status(serving=[1, 3], speed=1.0)}, FRAGMENTS, like=first)
    assert moved._places is not first._places
