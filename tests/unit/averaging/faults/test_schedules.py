"""A thousand swarms under drawn faults: one truth, no token lost or counted twice, nobody waits for ever, no centre.

The same ones as `scripts/faults.py`, which plays as many as one likes and shows one by its seed.
"""

from __future__ import annotations

import pytest

from tests.unit.averaging.faults.schedule import Crash, Cut, Freeze, Join, Schedule, Storm, draw
from tests.unit.averaging.faults.story import KEYS, LAYOUTS, Outcome, outcome_of

COUNT, GROUPS = 1000, 40


@pytest.mark.parametrize("group", range(GROUPS))
def test_all_holds_under_every_schedule(group: int) -> None:
    for seed in range(group, COUNT, GROUPS):
        outcome = outcome_of(draw(seed))
        assert not outcome.problem, f"scripts/faults.py --seed {seed}: {outcome.problem}"
        check_figures(outcome)


HARD = [
    2520,  # a peer parted from the others, without memory for old versions, averaged with itself faster than they could
           # download what it had (turns.py: _waits_for_downloads)
]


@pytest.mark.parametrize("seed", HARD)
def test_what_once_failed_holds(seed: int) -> None:
    outcome = outcome_of(draw(seed))
    assert not outcome.problem, f"scripts/faults.py --seed {seed}: {outcome.problem}"
    check_figures(outcome)


def check_figures(outcome: Outcome) -> None:
    """A schedule in which nothing happens proves nothing."""
    schedule = outcome.schedule
    assert outcome.commits >= outcome.versions >= 1
    assert outcome.tokens_trained > 0
    deadly = any(isinstance(fault, Crash) for fault in schedule.faults)
    parted = any(isinstance(fault, Cut) and fault.for_s is None for fault in schedule.faults)
    assert 0 <= outcome.tokens_lost < outcome.tokens_trained
    assert outcome.tokens_lost == 0 or deadly or parted, "tokens die with a process, or are the other side's"


def test_the_same_seed_is_the_same_story() -> None:
    one, other = (outcome_of(draw(38)) for _ in range(2))
    assert one.log == other.log and len(one.log) > 10
    assert one == other


def test_a_schedule_is_drawn_the_same_each_time_and_is_sound() -> None:
    for seed in range(300):
        schedule = draw(seed)
        assert schedule == draw(seed) and schedule.seed == seed
        count = len(schedule.holds)
        assert len(schedule.little) == len(schedule.every_s) == count <= len(KEYS)
        assert {index for holds in schedule.holds for index in holds} <= set(range(len(LAYOUTS)))
        assert 0 in schedule.holds[0], "the first fragment is held at the start"
        assert [fault.at_s for fault in schedule.faults] == sorted(fault.at_s for fault in schedule.faults)
        assert schedule.until_s > max((fault.at_s for fault in schedule.faults), default=0.0)
        gone = {f.peer for f in schedule.faults if isinstance(f, Crash) and f.back_s is None}
        assert gone < set(range(count)), "somebody is left"


def test_every_kind_of_fault_is_drawn_and_any_peer_is_hit() -> None:
    schedules = [draw(seed) for seed in range(COUNT)]
    faults = [fault for schedule in schedules for fault in schedule.faults]
    crashes = [fault for fault in faults if isinstance(fault, Crash)]
    assert {fault.peer for fault in crashes} == set(range(5)), "the first one too"
    assert {type(fault) for fault in faults} == {Crash, Freeze, Cut, Storm, Join}
    assert any(crash.back_s is None for crash in crashes) and any(crash.back_s for crash in crashes)
    assert any(isinstance(fault, Cut) and fault.for_s is None for fault in faults), "some lines are never mended"
    assert {schedule.bits for schedule in schedules} == {4, 8, 32}
    assert any(len(schedule.holds) == 1 for schedule in schedules) and any(s.twice and s.loss for s in schedules)
    assert len({crash.steps for crash in crashes}) == 80, "at any step"


def test_who_cannot_talk_at_the_end_is_on_another_side() -> None:
    def sides(*faults: Cut) -> list[set[int]]:
        return Schedule(
            seed=0, holds=((0,),) * 4, little=(False,) * 4, every_s=(1.0,) * 4, bits=4, loss=0.0, twice=0.0,
            delay_s=0.1, faults=faults,
        ).sides()

    assert sides() == [{0, 1, 2, 3}]
    assert sides(Cut(1.0, (0, 1), 5.0)) == [{0, 1, 2, 3}], "it is mended"
    assert sides(Cut(1.0, (0, 1), None)) == [{0, 1}, {2, 3}]
    assert sides(Cut(1.0, (0, 1), None), Cut(2.0, (1, 2), None)) == [{1}, {0}, {2}, {3}]


def test_people_can_read_it() -> None:
    text = draw(222).text()
    assert text.startswith("seed 222: ") and "p0 holds fragment 0" in text and "Cut(" in text
    assert all(len(line) < 120 for line in text.splitlines())
