"""Answers are compared as HELM compares them: by hand-made cases, and macro-F1 by its definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data.scores import final_answer, macro_f1, mean, normal_form, quasi_exact_match

LABELS = st.sampled_from(["yes", "no", "it depends"])


@pytest.mark.parametrize(("text", "form"), [
    ("The University.", "university"), ("  a  B\tc\n", "b c"), ("ADE-related", "aderelated"),
    ("an apple a day", "apple day"),
    ("theory", "theory"), ("", ""), ("The", ""), ("doesn't mention", "doesnt mention"), ("!?", ""),
])
def test_the_normal_form_leaves_out_what_does_not_matter(text: str, form: str) -> None:
    assert normal_form(text) == form


@pytest.mark.parametrize(("answer", "right", "same"), [
    (" not ADE-related", "not ADE-related", True), ("not ade related", "not ADE-related", False),
    ("ADE-related", "not ADE-related", False), ("The company", "company", True), ("company and more", "company", False),
    ("", "", False), ("the", "a", False), ("12.", "12", True), ("1 2", "12", False),
])
def test_quasi_exact_match(answer: str, right: str, same: bool) -> None:
    assert quasi_exact_match(answer, right) is same


@given(st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_the_normal_form_is_a_fixed_point_of_what_matters(text: str) -> None:
    form = normal_form(text)
    assert form == form.strip() and "  " not in form and not set(form) & set("!?.,-'\"")
    assert quasi_exact_match(text, f"  {text.upper()} !") is (normal_form(text) == normal_form(text.upper()) != "")


def test_macro_f1_by_hand() -> None:
    rights = ["yes", "yes", "yes", "no"]
    # yes: 2 hits, 2 answered, 3 right: 4/5; no: 1 hit, 2 answered, 1 right: 2/3
    assert macro_f1(["yes", "Yes.", "no", "no"], rights) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert macro_f1(rights, rights) == 1.0
    assert macro_f1(["yes"] * 4, rights) == pytest.approx((6 / 7 + 0) / 2), "always the same is no good answer"


def test_an_answer_that_is_no_label_is_a_miss_only() -> None:
    assert macro_f1(["rubbish", "yes", "no"], ["yes", "yes", "no"]) == pytest.approx((2 / 3 + 1) / 2)
    assert macro_f1(["", ""], ["yes", "no"]) == 0.0


def test_a_label_that_is_answered_though_it_is_never_right_counts() -> None:
    assert macro_f1(["maybe", "no"], ["yes", "no"], labels=["yes", "no", "maybe"]) == pytest.approx(1 / 3)
    assert macro_f1(["no", "no"], ["no", "no"], labels=["yes", "no", "maybe"]) == 1.0


@given(st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_macro_f1_is_that_of_precision_and_recall(pairs: list[tuple[str, str]]) -> None:
    answers, rights = [a for a, _ in pairs], [r for _, r in pairs]
    scores = []
    for label in set(rights):
        hits = sum(a == r == label for a, r in pairs)
        precision = hits / answers.count(label) if label in answers else 0.0
        recall = hits / rights.count(label)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert macro_f1(answers, rights) == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize(("answers", "rights"), [([], []), (["a"], []), (["a"], ["b", "c"])])
def test_as_many_answers_as_questions(answers: list[str], rights: list[str]) -> None:
    with pytest.raises(ValueError, match="questions"):
        macro_f1(answers, rights)


@pytest.mark.parametrize(("text", "answer"), [
    ("3 and 4 are 7. The answer is 7.", "7."), ("so the Answer is: no", "no"), ("12", "12"), (" yes \n", "yes"),
    ("the answer is 3, no: the answer is 4", "4"), ("the answer is", ""),
])
def test_a_chain_of_thought_ends_in_its_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_the_mean() -> None:
    assert mean(iter([1.0, 2.0, 6.0])) == 3.0
