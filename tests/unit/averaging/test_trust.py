"""What an owner makes of its contributors, from commit to commit, and what people hear of it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from swarm.averaging.messages import Commit
from swarm.averaging.plan import MAX_MEMBERS
from swarm.averaging.trust import Trust
from swarm.config import AveragingConfig
from swarm.events import Event, Warning

N = 2048
SIGNED = Callable[..., Commit]


def contributions(*names: str) -> dict[str, torch.Tensor]:
    common = torch.randn(N, generator=torch.Generator().manual_seed(0))
    return {
        name: common + torch.randn(N, generator=torch.Generator().manual_seed(1 + number))
        for number, name in enumerate(names)
    }


def trust(heard: list[Event] | None = None, **averaging: object) -> Trust:
    events = [] if heard is None else heard
    return Trust(AveragingConfig(**averaging), fragment=2, emit=events.append)  # type: ignore[arg-type]


def judged(owner: Trust, values: dict[str, torch.Tensor]) -> dict[str, float]:
    verdict = owner.judge(values, dict.fromkeys(values, 100), {})
    owner.say(verdict)
    return verdict.kept


def test_commits_are_the_past_that_supports_a_claim(signed_commit: SIGNED) -> None:
    owner = trust()
    members = signed_commit().opening.members
    for version in range(1, 5):
        owner.settled(signed_commit(tokens={0: 100, 1: 100, 2: 100}, version=version))
    claims = {members[0]: 100, members[1]: 100, members[2]: 5000}
    assert owner.believed(claims, version=5)[members[2]] == 200
    assert owner.believed({**claims, "stranger": 5000}, version=5)["stranger"] <= 2550, "the median, which is too high"


@pytest.mark.parametrize("averaging", [{"robust": False}, {"mode": "sync", "bits": 32}])
def test_runs_that_want_an_exact_mean_believe_every_claim(
    signed_commit: SIGNED, averaging: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    heard: list[Event] = []
    owner = trust(heard, **averaging)
    owner.settled(signed_commit(tokens={0: 100, 1: 100, 2: 100}))
    claims = {"a": 1, "b": 1, "c": 5000, "d": 1}
    assert owner.believed(claims, version=5) == claims
    values = contributions("a", "b", "c", "d")
    values["a"] = -values["a"]
    assert judged(owner, values) == dict.fromkeys(values, 1.0)
    assert judged(owner, contributions("a", "b")) == {"a": 1.0, "b": 1.0}
    assert not heard and not caplog.records


def test_who_is_left_out_for_its_size_is_named_once() -> None:
    heard: list[Event] = []
    owner = trust(heard)
    values = contributions("12D3KooWamber", "b", "c", "d")
    values["12D3KooWamber"] *= -1000
    for _ in range(3):
        assert judged(owner, values)["12D3KooWamber"] == 0
    [warning] = heard
    assert isinstance(warning, Warning)
    assert "Wamber" in warning.text and "fragment 2" in warning.text and "restart" in warning.text
    values["b"] *= 1e12
    judged(owner, values)
    assert len(heard) == 2, "another one is news"


def test_an_exact_run_names_who_is_left_out_too() -> None:
    heard: list[Event] = []
    values = contributions("a", "b", "c")
    values["c"] *= 1e6
    assert judged(trust(heard, mode="sync", bits=32), values)["c"] == 0
    assert len(heard) == 1


def test_who_goes_against_the_others_is_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    heard: list[Event] = []
    owner = trust(heard)
    values = contributions("amber-heron", "b", "c", "d")
    values["amber-heron"] *= -1
    for _ in range(3):
        assert judged(owner, values)["amber-heron"] == 0
    assert [record.getMessage() for record in caplog.records] == [
        "fragment 2: of what -heron contributes only 0 % counts: the others have learnt something else"
    ]
    assert not heard


@pytest.mark.parametrize(("names", "said"), [("a", 0), ("ab", 1), ("abc", 1), ("abcd", 0)])
def test_where_it_cannot_help_the_log_says_so_once(names: str, said: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    owner = trust()
    for _ in range(3):
        assert min(judged(owner, contributions(*names)).values()) > 0.9
    assert len(caplog.records) == said
    assert all(f"{ {2: 'two', 3: 'three'}[len(names)] } contributors" in r.getMessage() for r in caplog.records)


def test_what_was_said_is_not_remembered_without_end() -> None:
    heard: list[Event] = []
    owner = trust(heard)
    for number in range(5 * MAX_MEMBERS):
        values = contributions(f"liar-{number}", "b", "c")
        values[f"liar-{number}"] *= 1e6
        judged(owner, values)
    assert len(heard) <= 4 * MAX_MEMBERS + 1
