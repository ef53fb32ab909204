"""That the checks would find it: each of these bugs, put into the product, breaks what it should break."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from swarm.averaging import part, synchronise
from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.global_state import GlobalState
from swarm.averaging.ledger import Ledger
from swarm.averaging.member import Member
from swarm.averaging.messages import Commit, Opening
from swarm.averaging.opener import Opener
from swarm.averaging.results import Fates
from swarm.averaging.turns import Turns
from tests.unit.averaging.faults.schedule import Crash, Cut, Schedule
from tests.unit.averaging.faults.story import outcome_of

CALM = Schedule(
    seed=1, holds=((0,),) * 3, little=(False,) * 3, every_s=(0.7,) * 3, bits=4, loss=0.0, twice=0.0, delay_s=0.05,
    faults=(),
)
PARTED = Schedule(**{**vars(CALM), "faults": (Cut(4.0, (0,), 30.0),)})
TWICE = Schedule(**{**vars(CALM), "twice": 0.5, "delay_s": 0.5, "every_s": (0.2,) * 3})


def test_without_a_bug_all_holds() -> None:
    for schedule in (CALM, PARTED, TWICE):
        outcome = outcome_of(schedule)
        assert not outcome.problem and outcome.tokens_lost == 0, outcome.problem


def test_a_step_that_is_not_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Applier._step

    def off(self: Applier, state: GlobalState, commit: Commit, average: torch.Tensor) -> GlobalState:
        average[0] += 1e-6 if self._context.keypair.peer_id == commit.opening.opener else 0.0
        return step(self, state, commit, average)

    monkeypatch.setattr(Applier, "_step", off)
    assert outcome_of(CALM).problem.startswith("I1: ")


def test_tokens_that_are_taken_off_and_weights_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Ledger.apply

    def forgets(self: Ledger, state: GlobalState, opening_id: str, *, included: bool) -> None:
        contribution = self._contributions.get(opening_id)
        if contribution is not None and state.version == 2:
            contribution.values = torch.zeros_like(contribution.values)
        apply(self, state, opening_id, included=included)

    monkeypatch.setattr(Ledger, "apply", forgets)
    assert "of the first weight" in outcome_of(CALM).problem


def test_a_commit_that_is_taken_for_one_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Ledger.apply
    monkeypatch.setattr(Ledger, "apply", lambda self, state, key, *, included: apply(self, state, key, included=False))
    assert outcome_of(CALM).problem.startswith("I2: ")


def test_a_second_contribution_to_the_same_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first schedules found: an opening that arrived twice was contributed to twice."""
    take_part = Member.take_part

    async def later(self: Member, opening: Opening) -> None:
        await asyncio.sleep(0.5)
        self._taken.clear()
        if self._is_current(opening.id):
            await take_part(self, opening)

    async def twice(self: Member, opening: Opening) -> dict[str, Any]:
        answer = await take_part(self, opening)
        self._context.spawn(later(self, opening))
        return answer

    monkeypatch.setattr(Member, "take_part", twice)
    problem = outcome_of(TWICE).problem
    assert "nobody offered" in problem or "has trained" in problem


def test_what_the_losing_side_committed_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def all_is_common(context: Context, applier: Applier, *more: Any, **named: Any) -> Fates:
        return Fates(known=frozenset(applier.ledger.recent()))

    monkeypatch.setattr(synchronise, "fates_in", all_is_common)
    assert outcome_of(PARTED).problem.startswith("I2: p0.0 has trained")


def test_results_of_other_contributions(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce_part = part.reduce_part

    def without_one(values: dict[str, torch.Tensor], *more: Any, **named: Any) -> Any:
        first = next(iter(values))
        return reduce_part({**values, first: torch.zeros_like(values[first])}, *more, **named)

    monkeypatch.setattr(part, "reduce_part", without_one)
    assert "not the average" in outcome_of(Schedule(**{**vars(CALM), "bits": 32})).problem


def test_nobody_opens_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    maybe_open = Turns._maybe_open
    monkeypatch.setattr(Turns, "_maybe_open", lambda self, fragment, *more: (
        maybe_open(self, fragment, *more) if fragment.ledger.state.version < 1 else None
    ))
    assert outcome_of(Schedule(**{**vars(CALM), "faults": (Crash(5.0, 0, 3, None),)})).problem.startswith("I3: ")


@pytest.mark.parametrize("what", ["a task", "a flag"])
def test_something_that_never_ends(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    opened: Callable[..., Any] = Opener.open

    async def then_waits(self: Opener, *more: Any, **named: Any) -> Any:
        commit = await opened(self, *more, **named)
        if what == "a task":
            self._context.spawn(asyncio.Event().wait())
        elif self._applier.ledger.pending_tokens == 0 and commit is not None:
            self._member._current = None
            monkeypatch.setattr(Member, "in_round", lambda self: True)
        return commit

    monkeypatch.setattr(Opener, "open", then_waits)
    assert outcome_of(CALM).problem.startswith("I3: ")


def test_an_error_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = Turns.applied

    def fails(self: Turns, fragment: Any, commit: Commit) -> None:
        applied(self, fragment, commit)
        self._context.spawn(_fail())

    async def _fail() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Turns, "applied", fails)
    assert "ValueError('a bug')" in outcome_of(CALM).problem
