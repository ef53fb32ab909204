"""How a run's model is asked follows from its last phase; marks are no text, whatever they are called."""

from __future__ import annotations

import pytest

from swarm.asking.manner import manner_of
from swarm.data.marks import Marks
from swarm.data.tokenizer import byte_tokenizer
from swarm.model.export import with_names


@pytest.mark.parametrize(("objective", "prefix", "mark"), [
    ("causal", False, ()), ("prefix", True, ()), ("ul2", True, (257,)), ("ul2r", True, (257,)), ("prefix:x", True, ()),
])
def test_the_objective_decides(objective: str, prefix: bool, mark: tuple[int, ...]) -> None:
    manner = manner_of(byte_tokenizer(), sequence_length=64, objective=objective, vocabulary=300)
    assert (manner.prefix, manner.mark) == (prefix, mark)
    assert (manner.sequence_length, manner.end, manner.num_tokens) == (64, 256, 257)


@pytest.mark.parametrize("objective", ["causal", "prefix", "ul2"])
def test_named_marks_are_no_text(objective: str) -> None:
    """GPT-J's tokenizer names its spare rows, and an exported one ours."""
    named = with_names(byte_tokenizer(), Marks.of(byte_tokenizer(), 300).names)
    assert len(named) == 300
    assert manner_of(named, sequence_length=8, objective=objective, vocabulary=300).num_tokens == 257


def test_a_vocabulary_without_spare_rows() -> None:
    manner = manner_of(byte_tokenizer(), sequence_length=8, vocabulary=257)
    assert manner.num_tokens == 257 and manner.mark == () and not manner.prefix
