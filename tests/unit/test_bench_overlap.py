"""Steps with and without rounds: how a peer tells of them, and what the benchmark makes of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benches import overlap
from benches.systems.system import Setup
from benches.systems.timed_peer import Steps

from swarm.errors import ConfigError


def told(*steps: tuple[float, int, int]) -> list[dict[str, Any]]:
    return [{"seconds": seconds, "rounds": rounds, "turns": turns} for seconds, rounds, turns in steps]


def test_a_step_belongs_to_the_rounds_that_were_under_way_when_it_began() -> None:
    times, events = iter([0.0, 1.0, 2.0, 3.5, 4.0]), []
    steps = Steps(clock=lambda: next(times), tell=events.append)
    ledgers: Any = ["fragment 0", "fragment 1"]
    steps.stepped(1.0, 10)  # the first: since when, nobody knows
    assert not events
    steps.contributed(ledgers[0])
    steps.stepped(1.0, 10)
    steps.stepped(1.0, 10)
    steps.contributed(ledgers[1])
    steps.applied(ledgers[0])
    steps.stepped(1.0, 10)
    steps.stepped(1.0, 10)
    assert [(event["seconds"], event["rounds"], event["turns"]) for event in events] == [
        (1.0, 0, 1), (1.0, 1, 0), (1.5, 1, 2), (0.5, 1, 0),
    ]
    assert {event["event"] for event in events} == {"step"}


def test_a_result_that_nobody_waited_for_is_a_turn_and_no_round() -> None:
    events: list[dict[str, Any]] = []
    steps = Steps(clock=lambda: 0.0, tell=events.append)
    other: Any = "another's round"
    steps.stepped(1.0, 10)
    steps.applied(other)
    steps.stepped(1.0, 10)
    steps.stepped(1.0, 10)
    assert [(event["rounds"], event["turns"]) for event in events] == [(0, 1), (0, 0)]


def test_figures_compare_medians_and_count_turns_apart() -> None:
    steps = told(*[(0.10, 0, 0)] * 40, *[(0.11, 1, 0)] * 20, *[(0.30, 1, 1)] * 2, *[(0.20, 0, 1)] * 2, (9.0, 0, 0))
    found = overlap.figures(steps)
    assert found["step_ms"] == pytest.approx(100) and found["with_round_ms"] == pytest.approx(110)
    assert found["slower_percent"] == pytest.approx(10)
    assert found["share_with_round"] == pytest.approx(20 / 61)
    assert found["turns_percent"] == pytest.approx(100 * (1.0 - 0.4) / (4 + 2.2 + 1.0 + 9))
    assert found["steps"] == len(steps)


@pytest.mark.parametrize("steps", [told(), told(*[(0.1, 0, 0)] * 50), told(*[(0.1, 1, 0)] * 50, *[(0.1, 0, 0)] * 5)])
def test_too_few_steps_of_a_kind_are_an_error_that_says_what_to_do(steps: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="too few") as caught:
        overlap.figures(steps)
    assert "--seconds" in caught.value.do


def test_the_peer_is_the_product_with_a_clock(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{name: any, model: {config: {model_type: gptj}}, data: {stdlib: true}}")
    argv = overlap.Timed().command(Setup(file, 2, None, tmp_path, 0), 1, ["10.0.0.1", "10.0.0.2"], ["/a/way/in"])
    assert argv[1] == str(overlap.PEER) and overlap.PEER.exists()
    assert argv[2:4] == ["--ui", "json"] and argv[-2:] == ["--initial-peers", "/a/way/in"]


def test_the_table_has_a_row_for_each_topology() -> None:
    row = overlap.tables.spreads([overlap.figures(told(*[(0.1, 0, 0)] * 30, *[(0.1, 1, 0)] * 30))])
    text = overlap.table({"seconds": 60.0, "rows": [{"topology": "home-100", "peers": 2, **row}]})
    assert "| home-100 | 2 | 100.0 | 100.0 | 0.0 | 0.50 |" in text and "60 s" in text
