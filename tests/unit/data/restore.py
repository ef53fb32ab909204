"""The way back: the text that an example was made of, to hold objectives against."""

from __future__ import annotations

import numpy as np

from swarm.data.example import Example
from swarm.data.marks import MODES, Marks


def restored(example: Example, marks: Marks) -> tuple[str, list[int], list[tuple[int, int]]]:
    """(mode, text without its end, (start, length) of each hidden span) of a UL2 example. Checks its form."""
    tokens = example.tokens.tolist()
    assert tokens[0] in marks.modes
    mode = MODES[marks.modes.index(tokens[0])]
    given, learnt = tokens[1 : example.prefix], tokens[example.prefix :]
    if mode == "[S2S]":
        text = given + learnt
        return mode, text[:-1] if text[-1] == marks.end else text, []
    assert learnt[-1] == marks.end
    spans: dict[int, list[int]] = {}
    for token in learnt[:-1]:
        if token in marks.sentinels:
            assert token == marks.sentinels[len(spans)], "sentinels in their order"
            spans[token] = []
        else:
            list(spans.values())[-1].append(token)
    text, places = [], []
    for token in given:
        if token in spans:
            places.append((len(text), len(spans[token])))
            text += spans.pop(token)
        else:
            text.append(token)
    assert not spans, "a span that was nowhere hidden"
    return mode, text, places


def given_twice(example: Example, marks: Marks) -> bool:
    """Two hidden spans side by side: they are one."""
    is_sentinel = np.isin(example.tokens[: example.prefix], marks.sentinels)
    return bool((is_sentinel[1:] & is_sentinel[:-1]).any())
