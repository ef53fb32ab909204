"""How long openers wait: by what was measured, and longer where somebody who lives was too late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.averaging import plan
from swarm.averaging.patience import ANSWER_S, GREETING_S, MOST, Patience

SIZE = 256_000
GUESS_S = 12.0
"""ten seconds, and 256 kB at 1 Mbit/s"""


def learnt(*, round_s: float, answer_s: float, rounds: int = plan.FEWEST) -> Patience:
    patience = Patience(SIZE)
    for _ in range(rounds):
        patience.all_answered(answer_s)
        patience.committed(round_s, whole=True)
    return patience


def test_before_anything_is_known_it_is_the_guess() -> None:
    patience = learnt(round_s=1.0, answer_s=0.2, rounds=plan.FEWEST - 1)
    assert patience.push_s() == GUESS_S
    assert patience.answer_s(patience.push_s()) == GUESS_S + GREETING_S


def test_then_it_is_twice_what_rounds_and_answers_take() -> None:
    patience = learnt(round_s=20.0, answer_s=4.0)
    assert patience.push_s() == 40.0 and patience.answer_s(40.0) == 8.0
    assert learnt(round_s=0.1, answer_s=0.1).answer_s(3.0) == ANSWER_S


@pytest.mark.parametrize("patience", [Patience(SIZE), learnt(round_s=20.0, answer_s=4.0)])
def test_who_was_too_late_makes_it_longer_and_rounds_without_shorter(patience: Patience) -> None:
    push_s, answer_s = patience.push_s(), patience.answer_s(patience.push_s())
    patience.too_short()
    assert patience.push_s() == 2 * push_s and patience.answer_s(patience.push_s()) > 1.8 * answer_s
    for _ in range(5):
        patience.too_short()
    assert patience.push_s() == MOST * push_s, "somebody who never answers holds nobody up for ever"
    patience.committed(20.0, whole=False)
    assert patience.push_s() == MOST * push_s, "who was left out would be left out again"
    for _ in range(40):
        patience.all_answered(4.0)
        patience.committed(20.0, whole=True)
    assert patience.push_s() == 40.0


def test_it_goes_back_slowly_so_that_what_the_late_took_is_known_by_then() -> None:
    """One peer takes 2.5 s, the others 0.3, so that two seconds are waited for."""
    patience = learnt(round_s=2.0, answer_s=0.3, rounds=10)
    late = []
    for _ in range(60):
        in_time = patience.answer_s(0.0) > 2.5
        late.append(not in_time)
        if in_time:
            patience.all_answered(2.5)
        else:
            patience.too_short()
        patience.committed(3.0, whole=in_time)
    assert sum(late) <= 3 and not any(late[30:]), "no more than twice before half of what is remembered are its times"


def test_what_another_opener_has_found_out_is_taken_over() -> None:
    patient, other = Patience(SIZE), Patience(SIZE)
    patient.too_short()
    other.heard(patient.push_s())
    assert other.push_s() == patient.push_s() == 2 * GUESS_S
    other.heard(GUESS_S / 4)
    assert other.push_s() == 2 * GUESS_S, "one who has had no trouble yet is no reason"
    other.heard(plan.LONGEST_S)
    assert other.push_s() == MOST * GUESS_S, "whatever a stranger says"


@given(st.lists(st.sampled_from(["late", "whole", "part"]) | st.floats(0.01, 600), max_size=60), st.floats(0.001, 900))
def test_it_always_has_a_bound(story: list[str | float], round_s: float) -> None:
    patience = Patience(SIZE)
    for event in story:
        if event == "late":
            patience.too_short()
        elif isinstance(event, float):
            patience.heard(event)
        else:
            patience.all_answered(round_s)
            patience.committed(round_s, whole=event == "whole")
        assert 3.0 <= patience.push_s() <= plan.LONGEST_S
        assert ANSWER_S <= patience.answer_s(patience.push_s()) <= MOST * plan.LONGEST_S + GREETING_S
