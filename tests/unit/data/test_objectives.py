"""Causal and prefix-LM: nothing is lost, splits are where they should be, what is wrong is said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data.example import fit
from swarm.data.marks import Marks
from swarm.data.objectives import NAMES, make_objective, needs_segments
from swarm.errors import ConfigError

MARKS = Marks(99, (100, 101, 102), tuple(range(103, 130)))
TEXTS = st.lists(st.integers(0, 98), max_size=70).map(lambda ids: np.array(ids, dtype=np.uint16))


def dice(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


@pytest.mark.parametrize("name", ["causal", "prefix"])
@given(text=TEXTS, length=st.integers(8, 30), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_windows_are_the_text_and_its_end(name: str, text: np.ndarray, length: int, seed: int) -> None:
    examples = make_objective(name, sequence_length=length, marks=MARKS).examples(text, dice(seed))
    whole = [token for example in examples for token in example.tokens.tolist()]
    assert whole in ([*text.tolist(), 99], text.tolist())
    assert not whole or whole[-1] == 99 or len(text) % length == 0, "no row for an end alone"
    for tokens, prefix in examples:
        assert tokens.dtype == np.int32 and 2 <= len(tokens) <= length
        assert prefix == 0 if name == "causal" else 1 <= prefix < len(tokens)
    assert all(len(example.tokens) == length for example in examples[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_no_text_no_examples(name: str) -> None:
    objective = make_objective(name, sequence_length=16, marks=MARKS)
    assert objective.examples(np.array([], dtype=np.uint16), dice()) == []
    assert objective.examples(np.array([], dtype=np.uint16), dice(), prompt=3) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_same_for_the_same_dice(name: str) -> None:
    objective, text = make_objective(name, sequence_length=32, marks=MARKS), np.arange(90) % 99
    one, other, third = (objective.examples(text, dice(seed), prompt=0) for seed in (1, 1, 2))
    assert [(e.tokens.tolist(), e.prefix) for e in one] == [(e.tokens.tolist(), e.prefix) for e in other]
    if name != "causal":
        assert [(e.tokens.tolist(), e.prefix) for e in one] != [(e.tokens.tolist(), e.prefix) for e in third]


def test_prefixes_are_of_any_length() -> None:
    objective, text, throw = make_objective("prefix", sequence_length=16, marks=MARKS), np.arange(7), dice()
    counts = np.bincount([objective.examples(text, throw)[0].prefix for _ in range(2_000)], minlength=9)
    assert counts[0] == counts[8] == 0, "one token at least is given, and one is learnt"
    assert abs(counts[1:8] / 2_000 - 1 / 7).max() < 0.03


def test_a_task_is_split_at_the_end_of_its_prompt() -> None:
    text = np.arange(12)
    (example,) = make_objective("prefix", sequence_length=16, marks=MARKS).examples(text, dice(), prompt=9)
    assert example.tokens.tolist() == [*range(12), 99] and example.prefix == 9
    (example,) = make_objective("causal", sequence_length=16, marks=MARKS).examples(text, dice(), prompt=9)
    assert example.prefix == 0
    (example,) = make_objective("prefix", sequence_length=16, marks=MARKS).examples(text, dice(), prompt=50)
    assert example.tokens.tolist() == [*range(12), 99] and example.prefix == 12, "no answer: the end is one"


@pytest.mark.parametrize(("tokens", "prompt", "wanted"), [
    (30, 27, ([*range(15, 30), 99], 12)),  # the beginning of the prompt goes
    (30, 20, ([*range(13, 28)], 7)),  # down to half of the row, then the end of the answer, which has no end then
    (30, 4, ([*range(15)], 4)),
    (15, 12, ([*range(15), 99], 12)),
])
def test_of_a_task_longer_than_a_row(tokens: int, prompt: int, wanted: tuple[list[int], int]) -> None:
    objective = make_objective("prefix", sequence_length=16, marks=MARKS)
    (example,) = objective.examples(np.arange(tokens), dice(), prompt=prompt)
    assert (example.tokens.tolist(), example.prefix) == wanted


@given(tokens=st.integers(1, 60), prompt=st.integers(1, 80), room=st.integers(2, 40))
@settings(max_examples=80, deadline=None)
def test_what_is_left_of_a_task_is_a_part_of_it(tokens: int, prompt: int, room: int) -> None:
    part, given, whole = fit(np.arange(tokens), prompt, room)
    assert part.tolist() == list(range(int(part[0]), int(part[0]) + len(part))) and len(part) == min(tokens, room)
    assert 0 < given <= len(part) and int(part[0]) + given == min(prompt, tokens), "the split stays where it was"
    assert whole == (part[-1] == tokens - 1)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ConfigError, match="no objective 'ul3'") as caught:
        make_objective("ul3", sequence_length=64, marks=MARKS)
    assert "causal, prefix, ul2, ul2r" in caught.value.why and caught.value.do
    with pytest.raises(ConfigError, match="7 tokens are too short"):
        make_objective("causal", sequence_length=7, marks=MARKS)
    for marks in (Marks(256), Marks(256, (257, 258, 259), tuple(range(260, 267)))):
        with pytest.raises(ConfigError, match="no room for what ul2r marks") as caught:
            make_objective("ul2r", sequence_length=64, marks=marks)
        assert f"there are {len(marks.modes) + len(marks.sentinels)}" in caught.value.why
        assert "vocab_size" in caught.value.do
        assert make_objective("prefix", sequence_length=64, marks=marks) is not None


def test_who_needs_a_mask() -> None:
    assert [name for name in NAMES if needs_segments(name)] == ["prefix", "ul2", "ul2r"]
