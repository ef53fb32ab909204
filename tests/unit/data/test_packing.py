"""Rows: every example is in them, whole (or cut, if causal), nothing overlaps, little is empty."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.data.batch import num_targets
from swarm.data.example import Example
from swarm.data.marks import Marks
from swarm.data.objectives import make_objective
from swarm.data.packing import Packer, Row, to_batch
from swarm.data.tokenizer import byte_tokenizer
from swarm.errors import StateError
from swarm.model.evaluate import held_out_loss
from swarm.model.prefix import model_inputs
from swarm.train.run_source import hold

PAD = 7_777


def example(number: int, size: int, prefix: int) -> Example:
    return Example(np.arange(size, dtype=np.int32) + 100 * number, min(prefix, size - 1))


def segments_of(rows: list[Row]) -> list[tuple[list[int], int]]:
    found = []
    for row in rows:
        first = 0
        for prefix, size in row.segments:
            found.append((row.tokens[first : first + size].tolist(), prefix))
            first += size
    return found


def pack(examples: list[Example], *, length: int = 32, open_rows: int = 4) -> tuple[list[Row], Packer]:
    packer = Packer(length, PAD, open_rows=open_rows)
    return [row for one in examples for row in packer.add(one)] + packer.rest(), packer


@given(st.lists(st.tuples(st.integers(2, 32), st.integers(0, 31)), max_size=60), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_all_examples_are_in_rows_and_all_else_is_padding(sizes: list[tuple[int, int]], open_rows: int) -> None:
    examples = [example(number, *size) for number, size in enumerate(sizes)]
    rows, packer = pack(examples, open_rows=open_rows)
    for row in rows:
        assert len(row.tokens) == 32 == sum(size for _, size in row.segments) and row.tokens.dtype == np.int32
    found = segments_of(rows)
    padding = [(tokens, prefix) for tokens, prefix in found if PAD in tokens]
    assert all(set(tokens) == {PAD} and prefix == len(tokens) for tokens, prefix in padding), "nothing is learnt of it"
    assert sum(len(tokens) for tokens, _ in padding) == packer.padded
    whole = [(one.tokens.tolist(), one.prefix) for one in examples]
    kept = [one for one in found if PAD not in one[0]]
    assert sorted(one for one in whole if one[1]) == sorted(one for one in kept if one[1]), "what has a prefix is whole"
    causal = sorted(token for tokens, prefix in whole if not prefix for token in tokens)
    assert causal == sorted(token for tokens, prefix in kept if not prefix for token in tokens)
    assert to_batch(rows).tokens.shape == (len(rows), 32) if rows else not examples


def test_the_row_that_it_leaves_least_room_in() -> None:
    packer = Packer(10, PAD, open_rows=3)
    for number, size in enumerate((6, 7, 8)):
        assert packer.add(example(number, size, 1)) == []
    (row,) = packer.add(example(3, 3, 1))
    assert [size for _, size in row.segments] == [7, 3]
    assert [size for row in packer.rest() for _, size in row.segments] == [6, 4, 8, 2]


def test_where_nothing_fits_the_fullest_row_is_closed() -> None:
    packer = Packer(10, PAD, open_rows=2)
    assert packer.add(example(0, 5, 1)) == packer.add(example(1, 7, 1)) == []
    (row,) = packer.add(example(2, 6, 1))
    assert row.segments == ((1, 7), (3, 3)) and row.tokens[7:].tolist() == [PAD] * 3 and packer.padded == 3


def test_a_causal_example_is_cut_to_fill_it() -> None:
    packer = Packer(10, PAD, open_rows=2)
    packer.add(example(0, 5, 1))
    packer.add(example(1, 7, 1))
    (row,) = packer.add(example(2, 6, 0))
    assert row.segments == ((1, 7), (0, 3)) and row.tokens[7:].tolist() == [200, 201, 202]
    assert packer.padded == 0
    packer = Packer(10, PAD, open_rows=1)
    packer.add(example(0, 9, 1))
    (row,) = packer.add(example(1, 5, 0))
    assert row.segments == ((1, 9), (1, 1)), "a single token would teach nothing"


def test_little_is_empty() -> None:
    dice = np.random.RandomState(0)
    sizes = np.clip(dice.lognormal(4.5, 1.0, 3_000).astype(int), 2, 1024)
    _, packer = pack([example(0, size, 1) for size in sizes], length=1024, open_rows=16)
    assert packer.padded < 0.03 * sizes.sum()


@pytest.mark.parametrize("size", [0, 33])
def test_what_no_row_can_hold_is_a_bug(size: int) -> None:
    with pytest.raises(ValueError, match="in rows of 32"):
        Packer(32, PAD).add(Example(np.zeros(size, dtype=np.int32), 0))


def test_a_packer_goes_on_where_its_state_was_taken() -> None:
    examples = [example(number, 3 + number * 7 % 20, number % 3) for number in range(40)]
    whole = Packer(32, PAD, open_rows=3)
    for one in examples[:20]:
        whole.add(one)
    again = Packer(32, PAD, open_rows=3)
    again.load_state(json.loads(json.dumps(whole.state())))
    one, other = ([row for e in examples[20:] for row in p.add(e)] + p.rest() for p in (whole, again))
    assert segments_of(one) == segments_of(other) and whole.padded == again.padded


@pytest.mark.parametrize("state", [
    {}, {"rows": []}, {"rows": 5, "padded": 0}, {"rows": [[[0, [1] * 40]]], "padded": 0},
    {"rows": [[[0, ["x"]]]], "padded": 0}, {"rows": [[[9, [1]]]], "padded": 0}, {"rows": [[[0, [1]]]] * 4, "padded": 0},
    {"rows": [[[0.5, [1]]]], "padded": 0}, {"rows": [[[0]]], "padded": 0},
])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    packer = Packer(32, PAD, open_rows=3)
    packer.add(example(0, 5, 1))
    before = packer.state()
    with pytest.raises(StateError) as caught:
        packer.load_state(state)
    assert caught.value.do and packer.state() == before


@pytest.mark.parametrize("name", ["causal", "prefix", "ul2", "ul2r"])
def test_a_model_computes_packed_examples_as_each_alone(name: str) -> None:
    """From documents to logits, and to the mean loss: nothing of one example is in another, padding is in none."""
    model = hold(RunConfig(
        name="test", fragments=1, data=DataConfig(stdlib=True), model=ModelConfig(config={
            "model_type": "gptj", "n_layer": 2, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 64,
            "vocab_size": 320,
        }),
    )).model.eval()
    marks, dice = Marks.of(byte_tokenizer(), 320), np.random.RandomState(1)
    objective, packer = make_objective(name, sequence_length=48, marks=marks), Packer(48, marks.end, open_rows=2)
    documents = [dice.randint(0, 256, size).astype(np.uint16) for size in (5, 70, 20, 11, 33, 2)]
    rows = [row for text in documents for made in objective.examples(text, dice) for row in packer.add(made)]
    batch = to_batch(rows + packer.rest())
    assert batch.segments is not None and batch.num_segments > len(batch) > 2
    total = 0.0
    with torch.no_grad():
        logits = model(input_ids=batch.tokens, **model_inputs(model, batch.segments)).logits
        for tokens, found, row in zip(batch.tokens, logits, batch.segments, strict=True):
            first = 0
            for prefix, size in row:
                part = tokens[None, first : first + size]
                alone = model(input_ids=part, **model_inputs(model, (((prefix, size),),))).logits
                torch.testing.assert_close(found[first : first + size], alone[0], rtol=1e-5, atol=1e-5)
                if num_targets([(prefix, size)]):
                    given = max(1, prefix)
                    total += float(functional.cross_entropy(alone[0, given - 1 : -1], part[0, given:], reduction="sum"))
                first += size
    assert held_out_loss(model, batch) == pytest.approx(total / batch.num_targets, rel=1e-5)


def test_rows_of_one_causal_segment_are_a_plain_batch() -> None:
    plain = [Row(np.arange(8, dtype=np.int32), ((prefix, 8),)) for prefix in (0, 1)]
    batch = to_batch(plain)
    assert batch.segments is None and batch.tokens.dtype == torch.int64 and batch.tokens.tolist() == [[*range(8)]] * 2
    mixed = to_batch([*plain, Row(np.arange(8, dtype=np.int32), ((2, 8),))])
    assert mixed.segments == (((0, 8),), ((1, 8),), ((2, 8),)) and mixed.num_targets == 7 + 7 + 6
