"""Writing by asking for a token at a time: what is shown to an answerer, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.asking.answerer import Manner, answer, chooser, decode, encode, write
from swarm.data.batch import Batch
from swarm.data.tokenizer import byte_tokenizer

MANNER = Manner(sequence_length=8, end=256, num_tokens=257)
ROOMY = Manner(sequence_length=60, end=256, num_tokens=257)


class Parrot:
    """Says what a function of what it was shown says, and remembers what that was."""

    def __init__(self, says: Callable[[list[int]], int]) -> None:
        self.says = says
        self.shown: list[tuple[list[int], int]] = []

    def loss(self, batch: Batch, *, on_progress: object = None) -> tuple[float, int]:
        raise NotImplementedError

    def next_logits(self, ids: Sequence[int], *, prefix: int = 0) -> torch.Tensor:
        self.shown.append((list(ids), prefix))
        return torch.nn.functional.one_hot(torch.tensor(self.says(list(ids))), 300).float()


def reads_out(text: str) -> Parrot:
    """Writes this text and then ends, whatever was asked."""
    parrot = Parrot(lambda ids: 256)
    parrot.says = lambda ids: [*text.encode(), 256][len(parrot.shown) - 1]
    return parrot


def last(ids: list[int]) -> int:
    return ids[-1] + 1


def test_it_goes_on_until_it_may_not() -> None:
    parrot = Parrot(last)
    found = list(write(parrot, [1, 2], MANNER, choose=chooser(MANNER), max_tokens=3))
    assert found == [3, 4, 5]
    assert parrot.shown == [([1, 2], 0), ([1, 2, 3], 0), ([1, 2, 3, 4], 0)]


def test_the_end_of_the_text_ends_it_and_is_not_told() -> None:
    assert list(write(Parrot(last), [253], MANNER, choose=chooser(MANNER), max_tokens=9)) == [254, 255]


def test_an_empty_prompt_is_the_beginning_of_a_text() -> None:
    parrot = Parrot(lambda ids: 7)
    assert list(write(parrot, [], MANNER, choose=chooser(MANNER), max_tokens=1)) == [7]
    assert parrot.shown == [([256], 0)]


def test_of_a_long_text_it_is_shown_the_end() -> None:
    parrot = Parrot(lambda ids: 9)
    list(write(parrot, list(range(7)), MANNER, choose=chooser(MANNER), max_tokens=4))
    assert [ids for ids, _ in parrot.shown] == [
        [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 9], [1, 2, 3, 4, 5, 6, 9, 9], [2, 3, 4, 5, 6, 9, 9, 9],
    ]


def test_where_a_prefix_was_learnt_the_prompt_is_one() -> None:
    manner = Manner(sequence_length=8, end=256, num_tokens=257, prefix=True, mark=(299,))
    parrot = Parrot(lambda ids: 9)
    list(write(parrot, [1, 2, 3, 4, 5], manner, choose=chooser(manner), max_tokens=5))
    assert parrot.shown == [
        ([299, 1, 2, 3, 4, 5], 6), ([299, 1, 2, 3, 4, 5, 9], 6), ([299, 1, 2, 3, 4, 5, 9, 9], 6),
        ([299, 2, 3, 4, 5, 9, 9, 9], 5), ([299, 3, 4, 5, 9, 9, 9, 9], 4),
    ], "what was written is no part of it, and the mark always is"


@given(st.integers(1, 20), st.integers(1, 30), st.booleans(), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_it_is_never_shown_more_than_it_sees_at_once(prompt: int, tokens: int, prefix: bool, mark: int) -> None:
    manner = Manner(sequence_length=8, end=256, num_tokens=257, prefix=prefix, mark=(299,) * mark)
    parrot = Parrot(lambda ids: 9)
    assert len(list(write(parrot, [1] * prompt, manner, choose=chooser(manner), max_tokens=tokens))) == tokens
    for ids, prompted in parrot.shown:
        assert len(ids) <= 8 and ids[:mark] == [299] * mark
        # the prompt's tokens are ones: all of those that are still there, and the mark, see each other
        assert prompted == (mark + ids.count(1) if prefix else 0)


def test_an_answer_ends_with_its_line() -> None:
    tokenizer = byte_tokenizer()
    say = reads_out(" yes\nand more")
    assert answer(say, tokenizer, "Is it?", ROOMY, max_tokens=30) == " yes"
    assert len(say.shown) == 5, "what nobody reads is not asked for"
    assert answer(reads_out("a\nb"), tokenizer, "x", MANNER, max_tokens=30, stop=None) == "a\nb"
    assert answer(reads_out("abcdef"), tokenizer, "x", MANNER, max_tokens=3) == "abc"
    assert answer(reads_out("\nlate"), tokenizer, "x", MANNER, max_tokens=9) == "", "as HELM counts it"
    assert answer(reads_out(""), tokenizer, "x", MANNER, max_tokens=9) == ""


def test_an_answer_has_its_room() -> None:
    """Of a prompt that is too long the end is asked, so that all of it stays while the answer is written."""
    parrot = reads_out("abc")
    assert answer(parrot, byte_tokenizer(), "0123456789", MANNER, max_tokens=3) == "abc"
    assert [bytes(ids) for ids, _ in parrot.shown] == [b"56789", b"56789a", b"56789ab"]
    assert answer(reads_out("abc"), byte_tokenizer(), "0123456789", MANNER, max_tokens=99) == "abc"


def test_rows_of_the_vocabulary_without_a_token_are_never_chosen() -> None:
    logits = torch.zeros(300)
    logits[299], logits[5] = 9.0, 1.0
    assert chooser(MANNER)(logits) == 5
    drawn = chooser(MANNER, temperature=5.0, seed=1)
    assert max(drawn(logits) for _ in range(200)) < 257


def test_the_same_seed_draws_the_same() -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    draws = [[chooser(MANNER, temperature=1.0, seed=seed)(logits) for _ in range(1)] for seed in (3, 3)]
    assert draws[0] == draws[1]
    some = chooser(MANNER, temperature=1.0, top_k=2)
    assert len({some(logits) for _ in range(50)}) == 2


@pytest.mark.parametrize("text", ["", "plain", "naïve\n漢字 \t"])
def test_texts_become_ids_and_come_back(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert decode(tokenizer, encode(tokenizer, text)) == text
    assert decode(tokenizer, [*encode(tokenizer, text), 256]) == text, "marks are no text"
