"""UL2 and UL2R: every token comes back, rates and spans are as published, and Together's bugs are not here."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data.denoising import UL2, UL2R, Denoiser, Denoising, spans, split_at, window
from swarm.data.example import Example
from swarm.data.marks import Marks
from tests.unit.data.restore import given_twice, restored

MARKS = Marks(50_256, (50_257, 50_258, 50_259), tuple(range(50_260, 50_400)))
FEW = Marks(99, (100, 101, 102), tuple(range(103, 115)))
ONE = {"R3": UL2[0], "R8": UL2[1], "X3": UL2[2], "X8": UL2[3], "X64": UL2[4], "X64.5": UL2[5], "X32": UL2R[2]}


def text_of(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 50_256, tokens).astype(np.uint16)


@pytest.mark.parametrize("mixture", [UL2, UL2R], ids=["ul2", "ul2r"])
@given(
    ids=st.lists(st.integers(0, 98), max_size=200), length=st.integers(8, 64), seed=st.integers(0, 10**6),
    prompt=st.integers(0, 40),
)
@settings(max_examples=100, deadline=None)
def test_every_token_comes_back(
    mixture: tuple[Denoiser, ...], ids: list[int], length: int, seed: int, prompt: int
) -> None:
    """In its place, once. Of a task too long for a row, what `fit` leaves of it."""
    objective = Denoising(mixture, length=length, marks=FEW)
    text = np.array(ids, dtype=np.uint16)
    examples = objective.examples(text, np.random.RandomState(seed), prompt=prompt)
    back: list[int] = []
    for example in examples:
        assert example.tokens.dtype == np.int32 and 0 < example.prefix < len(example.tokens) <= length
        mode, part, places = restored(example, FEW)
        assert (mode == "[S2S]") == (not places) and not given_twice(example, FEW)
        back += part
    if prompt and len(text) > length - 2:
        assert "".join(map(chr, back)) in "".join(map(chr, ids))
    else:
        assert back == ids
    assert bool(examples) == bool(ids)


def test_the_form_of_an_example() -> None:
    """[mode] given <0> given <1> | <0> span <1> span <end>"""
    objective = Denoising([Denoiser("[NLG]", 1.0, 0.5, 3)], length=64, marks=FEW)
    (example,) = objective.examples(np.arange(20), np.random.RandomState(3))
    tokens = example.tokens.tolist()
    sentinels = [token for token in tokens if token in FEW.sentinels]
    half = len(sentinels) // 2
    assert tokens[0] == FEW.modes[2] and tokens[-1] == FEW.end
    assert sentinels == [*FEW.sentinels[:half]] * 2 and half >= 3
    assert tokens[example.prefix] == FEW.sentinels[0], "the first target is the first sentinel"
    assert sum(token in FEW.sentinels for token in tokens[: example.prefix]) == half


@pytest.mark.parametrize("name", list(ONE))
def test_rates_and_spans_are_as_published(name: str) -> None:
    """Within 1 % over a million tokens, in windows as long as a row of 2048 allows."""
    one, dice = ONE[name], np.random.RandomState(1)
    size = window(one, 2048, 140)
    hidden = count = 0
    rounds = 1_000_000 // size
    longest = 0
    for _ in range(rounds):
        starts, lengths = spans(size, one, dice, most=140)
        assert starts[0] >= 0 and starts[-1] + lengths[-1] <= size and (lengths > 0).all()
        assert (starts[1:] > starts[:-1] + lengths[:-1]).all(), "spans do not touch"
        hidden, count, longest = hidden + int(lengths.sum()), count + len(lengths), max(longest, len(lengths))
    assert hidden / (rounds * size) == pytest.approx(one.rate, rel=0.01)
    assert hidden / count == pytest.approx(one.span, rel=0.01)
    assert longest <= 140


def test_spans_are_anywhere_and_of_any_length() -> None:
    dice, one = np.random.RandomState(2), Denoiser("[NLU]", 1.0, 0.15, 3)
    first, last, where, sizes = 0, 0, np.zeros(100), Counter[int]()
    for _ in range(4_000):
        starts, lengths = spans(100, one, dice, most=50)
        first, last = first + (starts[0] == 0), last + (starts[-1] + lengths[-1] == 100)
        sizes.update(lengths.tolist())
        for start, length in zip(starts, lengths, strict=True):
            where[start : start + length] += 1
    assert 0.03 < first / 4_000 < 0.09 and 0.03 < last / 4_000 < 0.09, "T5's code hides the last token always"
    assert where.min() > 0.3 * where.mean() and where[10:90].std() < 0.1 * where.mean(), "a little less at the ends"
    assert set(range(1, 10)) <= set(sizes), "one to many tokens"


@pytest.mark.parametrize(("rate", "most"), [(0.25, 50), (0.5, 100)])
def test_what_s_hides_is_uniform(rate: float, most: int) -> None:
    dice = np.random.RandomState(3)
    left = np.array([100 - split_at(100, rate, dice) for _ in range(20_000)])
    assert left.min() == 1 and left.max() == most
    assert left.mean() == pytest.approx(100 * rate, rel=0.015)


@pytest.mark.parametrize(
    ("mixture", "texts"), [(UL2, "long"), (UL2R, "long"), (UL2R, "short")], ids=["ul2", "ul2r", "ul2r, short"]
)
def test_shares_are_of_the_texts_tokens(mixture: tuple[Denoiser, ...], texts: str) -> None:
    """Though X with many spans takes 837 tokens at once and S 2046; and whatever the documents are."""
    objective, dice = Denoising(mixture, length=2048, marks=MARKS), np.random.RandomState(4)
    found: Counter[str] = Counter()
    total = 3_000_000 if texts == "long" else 600_000
    size = 30_000 if texts == "long" else 150
    text = np.zeros(size, dtype=np.uint16)
    for _ in range(total // size):
        for example in objective.examples(text, dice):
            hidden = int((example.tokens == 0).sum())
            found[{50_257: "[S2S]", 50_258: "[NLU]", 50_259: "[NLG]"}[int(example.tokens[0])]] += hidden
    wanted: Counter[str] = Counter()
    for one in mixture:
        wanted[one.mode] += one.share  # type: ignore[assignment]
    assert sum(found.values()) == total // size * size, "each token of the text is in one example, once"
    for mode, share in wanted.items():
        assert found[mode] / total == pytest.approx(share, abs=0.03), mode


def test_windows_are_as_long_as_rows_and_sentinels_allow() -> None:
    assert Denoising(UL2R, length=2048, marks=MARKS).windows == [2046, 1858, 2026, 837]
    for one in ONE.values():
        size = window(one, 512, 60)
        for seed in range(30):
            objective = Denoising([one], length=512, marks=Marks(9, (1, 2, 3), tuple(range(10, 70))))
            (example, *_) = objective.examples(np.zeros(3 * size, dtype=np.uint16), np.random.RandomState(seed))
            assert len(example.tokens) <= 512


def test_only_the_end_of_a_document_is_an_end_for_s() -> None:
    """R and X end their answers; S goes on with a text, which is not over at the end of a window."""
    objective = Denoising([Denoiser("[S2S]", 1.0, 0.5)], length=16, marks=FEW)
    examples = objective.examples(np.arange(30), np.random.RandomState(0))
    assert [example.tokens[-1] == FEW.end for example in examples] == [False, False, True]


def test_s_splits_a_task_at_the_end_of_its_prompt() -> None:
    objective = Denoising([Denoiser("[S2S]", 1.0, 0.5)], length=16, marks=FEW)
    (example,) = objective.examples(np.arange(12), np.random.RandomState(0), prompt=9)
    assert example.tokens.tolist() == [100, *range(12), 99] and example.prefix == 10
    (example,) = objective.examples(np.arange(40), np.random.RandomState(0), prompt=37)
    assert example.tokens.tolist() == [100, *range(26, 40), 99] and example.prefix == 12


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_texts_of_a_few_tokens_have_something_hidden(tokens: int) -> None:
    for name, one in ONE.items():
        (example,) = Denoising([one], length=32, marks=FEW).examples(np.arange(tokens), np.random.RandomState(1))
        _, text, places = restored(example, FEW)
        assert text == list(range(tokens)) and places, name


def as_lists(examples: list[Example]) -> list[tuple[list[int], int]]:
    return [(example.tokens.tolist(), example.prefix) for example in examples]


def test_nothing_is_left_of_the_example_before() -> None:
    """Together's code appended to one list that all examples shared: prefixes grew without end."""
    objective, text = Denoising(UL2R, length=512, marks=MARKS), text_of(400)
    seeds, before = range(9), text.copy()
    fresh = [Denoising(UL2R, length=512, marks=MARKS) for _ in seeds]
    alone = [as_lists(one.examples(text, np.random.RandomState(s))) for one, s in zip(fresh, seeds, strict=True)]
    assert [as_lists(objective.examples(text, np.random.RandomState(s))) for s in seeds] == alone
    assert np.array_equal(text, before), "and the text is not touched"


def test_no_two_hidden_spans_side_by_side() -> None:
    """Together's code meant to leave something between them, and never set the flag for it."""
    objective, dice = Denoising([UL2[2], UL2[0]], length=512, marks=MARKS), np.random.RandomState(5)
    for _ in range(300):
        for example in objective.examples(text_of(300), dice):
            assert not given_twice(example, MARKS)
