"""UL2 (https://arxiv.org/abs/2205.05131) and UL2R (https://arxiv.org/abs/2210.11399) for models that only decode.

A text has spans hidden, and the model says what was there; or it is split and the model writes on (S):

    R, X   [mode] some <0> is hidden <1> | <0> text <1> here <end>
    S      [S2S] the first part of | a text <end>

What stands before the bar sees itself and is given; what comes after is learnt. <0>, <1> are sentinels. A text that is
longer than a row is cut into windows, each with a denoiser of its own: as long as the row, and as the sentinels last
(many short spans need many). The shares of the denoisers are shares of the text's tokens, whatever the windows.
"""

from __future__ import annotations

import itertools
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swarm.data.example import Example, Ids, fit
from swarm.data.marks import MODES, NLG, NLU, S2S, Marks


@dataclass(frozen=True)
class Denoiser:
    mode: str
    share: float
    """of a text's tokens"""
    rate: float
    """of a text's tokens is hidden, on average"""
    span: float = 0.0
    """tokens of a hidden span, on average; 0: everything from a random place on, which may be up to twice the rate"""


UL2 = (
    Denoiser(NLU, 1 / 7, 0.15, 3), Denoiser(NLU, 1 / 7, 0.15, 8),
    Denoiser(NLG, 1 / 7, 0.5, 3), Denoiser(NLG, 1 / 7, 0.5, 8),
    Denoiser(NLG, 1 / 7, 0.15, 64), Denoiser(NLG, 1 / 7, 0.5, 64),
    Denoiser(S2S, 1 / 7, 0.25),
)
"""Table 1 of the paper, in equal parts"""
UL2R = (
    Denoiser(S2S, 0.5, 0.5), Denoiser(NLU, 0.25, 0.15, 3), Denoiser(NLG, 0.125, 0.15, 32), Denoiser(NLG, 0.125, 0.5, 3),
)
"""as PaLM was continued; any place may be where S splits"""


class Denoising:
    """The objective."""

    def __init__(self, denoisers: Sequence[Denoiser], *, length: int, marks: Marks) -> None:
        """`length`: of a row; `marks` with modes and sentinels."""
        self._denoisers, self._length, self._end = denoisers, length, marks.end
        self._modes = dict(zip(MODES, marks.modes, strict=True))
        self._sentinels = np.array(marks.sentinels, dtype=np.int32)
        self.windows = [window(one, length, len(marks.sentinels)) for one in denoisers]
        """tokens of a text in the longest example of each denoiser"""
        self._least = min(self.windows)
        self._shares = list(itertools.accumulate(one.share for one in denoisers))

    def examples(self, text: Ids, dice: np.random.RandomState, *, prompt: int = 0) -> list[Example]:
        found = []
        first = 0
        while first < len(text):
            index = self._choose(len(text) - first, dice)
            one, part = self._denoisers[index], text[first : first + self.windows[index]]
            if one.span:
                first += len(part)
                found.append(self._hide(one, part, dice))
            elif prompt and not first:
                part, given, ends = fit(text, prompt, self._length - 2)
                first = len(text)
                found.append(self._split(one, part, given, ends=ends))
            else:
                first += len(part)
                given = split_at(len(part), one.rate, dice)
                found.append(self._split(one, part, given, ends=first == len(text)))
        return found

    def _choose(self, left: int, dice: np.random.RandomState) -> int:
        """Whose turn it is, with so many tokens left: who takes more at once has its turn less often."""
        odds = self._shares  # where all take all of it
        if left > self._least:
            each = zip(self._denoisers, self.windows, strict=True)
            odds = list(itertools.accumulate(one.share / min(size, left) for one, size in each))
        return min(bisect(odds, dice.random_sample() * odds[-1]), len(odds) - 1)

    def _split(self, one: Denoiser, part: Ids, given: int, *, ends: bool) -> Example:
        tokens = np.empty(1 + len(part) + ends, dtype=np.int32)
        tokens[-1] = self._end
        tokens[0], tokens[1 : 1 + len(part)] = self._modes[one.mode], part
        return Example(tokens, 1 + given)

    def _hide(self, one: Denoiser, part: Ids, dice: np.random.RandomState) -> Example:
        starts, lengths = spans(len(part), one, dice, most=len(self._sentinels))
        given, learnt = hide(part, starts, lengths, self._sentinels)
        tokens = np.empty(2 + len(given) + len(learnt), dtype=np.int32)
        tokens[0], tokens[-1] = self._modes[one.mode], self._end
        tokens[1 : 1 + len(given)], tokens[1 + len(given) : -1] = given, learnt
        return Example(tokens, 1 + len(given))


def window(one: Denoiser, length: int, num_sentinels: int) -> int:
    """Tokens of a text whose example never has more than `length`, nor more spans than there are sentinels."""
    if not one.span:
        return length - 2

    def fits(tokens: int) -> bool:
        most = int((int(tokens * one.rate) + 1) / one.span) + 1
        return tokens + 2 * most + 2 <= length and most <= num_sentinels

    return max((tokens for tokens in range(2, length) if fits(tokens)), default=2)


def split_at(num_tokens: int, rate: float, dice: np.random.RandomState) -> int:
    """Tokens that are given of so many: what is left is uniform up to twice the rate. At least one is left."""
    return min(num_tokens - 1, num_tokens - round(num_tokens * 2 * rate * dice.random_sample()))


def spans(num_tokens: int, one: Denoiser, dice: np.random.RandomState, *, most: int) -> tuple[Ids, Ids]:
    """(starts, lengths) of the hidden spans of a text; they do not touch. All ways to cut what is hidden into so many
    spans, and what is not into what lies between them, are equally likely."""
    hidden = min(max(1, _round(num_tokens * one.rate, dice)), max(1, num_tokens - 1))
    count = min(max(1, _round(hidden / one.span, dice)), hidden, num_tokens - hidden + 1, most)
    lengths = _cut(hidden, count, dice)
    gaps = _cut(num_tokens - hidden + 2, count + 1, dice)
    gaps[0] -= 1  # the first and the last gap may be nothing
    return gaps[:-1].cumsum() + lengths.cumsum() - lengths, lengths


def hide(text: Ids, starts: Ids, lengths: Ids, sentinels: Ids) -> tuple[Ids, Ids]:
    """(the text with a sentinel in place of each span, each sentinel with its span)"""
    count = len(starts)
    edges = np.zeros(len(text) + 1, dtype=np.int8)
    edges[starts] = 1
    edges[starts + lengths] = -1
    hidden = edges[:-1].cumsum(dtype=np.int8).view(np.bool_)
    given = np.array(text, dtype=np.int32)
    given[starts] = sentinels[:count]
    shown = ~hidden
    shown[starts] = True
    taken = text[hidden]
    learnt = np.empty(len(taken) + count, dtype=np.int32)
    before = lengths.cumsum() - lengths + np.arange(count)
    is_span = np.ones(len(learnt), dtype=np.bool_)
    is_span[before] = False
    learnt[before], learnt[is_span] = sentinels[:count], taken
    return given[shown], learnt


def _round(value: float, dice: np.random.RandomState) -> int:
    """Up or down at random, so that the mean is the value."""
    return int(value + dice.random_sample())


def _cut(total: int, parts: int, dice: np.random.RandomState) -> Ids:
    """int64 [parts], each at least 1, that add up to `total`; all ways are equally likely."""
    edges = np.empty(parts + 1, dtype=np.int64)
    edges[0], edges[-1] = 0, total
    edges[1:-1] = dice.permutation(total - 1)[: parts - 1] + 1
    edges.sort()
    return edges[1:] - edges[:-1]  # np.diff takes longer than all the rest
