"""What a peer says of itself while it lives."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.network.keys import friendly_name
from swarm.network.records import Head, Status
from swarm.train import report

HEAD = Head(version=2, digest="a" * 64, tokens=7)


def holding(*fragments: int, loss: float | None = None, tokens_per_s: float = 0.0) -> Status:
    heads = [HEAD if index in fragments else None for index in range(4)]
    return Status(
        run_id="run-" + "0" * 12, name="x", role="trainer", heads=heads, pending=[0] * 4, loss=loss,
        tokens_per_s=tokens_per_s,
    )


class Trainer:
    tokens = 300
    loss: float | None = 2.0
    tokens_per_s = 50.0


class Links:
    bytes_sent, bytes_received = 11, 22


def told(trainer: Any, *others: Status) -> Any:
    return report.progress(trainer, None, others, Links(), swarm_tokens=9)  # type: ignore[arg-type]


def test_progress_is_of_this_peer_and_the_speed_of_all() -> None:
    event = told(Trainer(), holding(0, loss=4.0, tokens_per_s=25.0), holding(1))
    assert (event.loss, event.tokens, event.swarm_tokens, event.peers) == (2.0, 300, 9, 3)
    assert event.tokens_per_s == 75.0 and (event.bytes_sent, event.bytes_received) == (11, 22)


def test_who_draws_no_text_shows_what_the_others_say() -> None:
    silent = Trainer()
    silent.loss = None
    assert told(silent, holding(0, loss=4.0), holding(0, loss=3.0), holding(1)).loss == 3.5
    assert told(silent, holding(1)) is None and told(None) is None, "nobody knows a loss yet"


@pytest.mark.parametrize(("held", "others", "missing"), [
    ([0, 1], [], [2, 3]), ([0, 1], [(2, 3)], []), ([], [(0,), (3,)], [1, 2]), ([0, 1, 2, 3], [], []),
    ([1], [(0, 1), (2,)], [3]),
])
def test_gaps_are_what_nobody_holds(held: list[int], others: list[tuple[int, ...]], missing: list[int]) -> None:
    statuses = {str(number): holding(*stage) for number, stage in enumerate(others)}
    assert report.gaps(4, held, statuses) == missing


def test_a_gap_is_named_with_what_to_do() -> None:
    assert "fragment 1, 2" in report.gap_warning([1, 2]).text and "--fragments" in report.gap_warning([1, 2]).text
    assert "every fragment" in report.gap_warning([]).text


def test_names_that_were_given_are_told_once() -> None:
    made_up = friendly_name("12D3KooWmadeup")
    peers = [
        ("12D3KooWmadeup", trained(made_up)), ("12D3KooWa", trained("Grace")), ("12D3KooWb", trained("Ada")),
        ("12D3KooWc", trained("Idle", tokens=0)), ("12D3KooWd", trained("Relay", role="rendezvous")),
        ("12D3KooWe", trained("")), ("12D3KooWf", trained("Ada")),
    ]
    assert report.new_names(peers, []) == ["Ada", "Grace"]
    assert report.new_names(peers, ["Ada"]) == ["Grace"] and report.new_names(peers, ["Ada", "Grace"]) == []
    assert report.new_names([("12D3KooWx", trained(made_up))], []) == [made_up], "somebody else's words are a choice"


def test_names_have_an_end() -> None:
    peers = [(f"12D3KooW{number}", trained(f"n{number:05d}")) for number in range(report.MAX_NAMES + 50)]
    first = report.new_names(peers, [])
    assert len(first) == report.MAX_NAMES and report.new_names(peers, first) == []


def trained(name: str, *, tokens: int = 5, role: str = "trainer") -> Status:
    return Status(run_id="run-" + "0" * 12, name=name, role=role, tokens=tokens)
