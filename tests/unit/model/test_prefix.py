"""Rows cut into segments: who sees whom, where positions begin, of what a loss is taken, and that models heed it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.model.build import build_model
from swarm.model.prefix import (
    IGNORED,
    are_causal,
    attention,
    model_inputs,
    num_targets,
    segment_mask,
    takes_positions,
    targets_of,
)

Segments = tuple[tuple[tuple[int, int], ...], ...]
SIZES: dict[str, dict[str, Any]] = {
    "gptj": {"n_layer": 2, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 32, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
}


def tiny(family: str) -> Any:
    return build_model(RunConfig(
        name="test", model=ModelConfig(config={"model_type": family, "vocab_size": 257, **SIZES[family]}),
        data=DataConfig(stdlib=True), fragments=1,
    ))


def sees(segments: Segments) -> list[list[list[bool]]]:
    """By the definition, token by token."""
    rows = []
    for row in segments:
        places = [(number, offset, prefix) for number, (prefix, size) in enumerate(row) for offset in range(size)]
        rows.append([
            [one == other and (key <= query or key < prefix) for other, key, _ in places]
            for one, query, prefix in places
        ])
    return rows


@st.composite
def some_segments(draw: st.DrawFn) -> Segments:
    length = draw(st.integers(1, 12))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        left, row = length, []
        while left:
            size = draw(st.integers(1, left))
            row.append((draw(st.integers(0, size)), size))
            left -= size
        rows.append(tuple(row))
    return tuple(rows)


@given(some_segments())
@settings(max_examples=60, deadline=None)
def test_a_token_sees_its_segments_prefix_and_what_came_before(segments: Segments) -> None:
    mask = segment_mask(segments)
    assert (mask == 0)[:, 0].tolist() == sees(segments)
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    tokens = torch.arange(mask.shape[0] * mask.shape[2]).view(mask.shape[0], -1)
    targets = targets_of(tokens, segments)
    offsets = [[(offset, prefix) for prefix, size in row for offset in range(size)] for row in segments]
    wanted = [
        [int(token) if offset >= max(1, prefix) else IGNORED for token, (offset, prefix) in zip(*both, strict=True)]
        for both in zip(tokens, offsets, strict=True)
    ]
    assert targets.tolist() == wanted
    assert num_targets(targets) == sum(token != IGNORED for row in wanted for token in row)
    if not are_causal(segments):
        positions = attention(segments, dtype=torch.float32)["position_ids"]
        assert positions.tolist() == [[offset for offset, _ in row] for row in offsets]


def test_each_row_has_a_prefix_of_its_own() -> None:
    """In Together's code all rows of a microbatch saw the longest prefix: their masks were one."""
    together = segment_mask((((0, 4),), ((2, 4),), ((4, 4),)))
    for number, row in enumerate((((0, 4),), ((2, 4),), ((4, 4),))):
        assert torch.equal(together[number], segment_mask((row,))[0])
    assert [int((mask == 0).sum()) for mask in together] == [10, 11, 16]


def test_padding_is_learnt_from_by_nobody() -> None:
    """In Together's code the end-of-text that filled a row was in the loss."""
    tokens = torch.tensor([[5, 6, 7, 9, 9, 9], [9, 9, 9, 9, 9, 9]])
    assert targets_of(tokens, (((1, 3), (3, 3)), ((6, 6),))).tolist() == [[-100, 6, 7] + [-100] * 3, [-100] * 6]


def test_in_the_type_of_the_hidden_states() -> None:
    mask = segment_mask((((1, 2), (0, 1)),), dtype=torch.bfloat16)
    low = torch.finfo(torch.bfloat16).min
    assert mask.dtype == torch.bfloat16 and mask[0, 0].tolist() == [[0, low, low], [0, 0, low], [low, low, 0]]


@pytest.mark.parametrize("segments", [None, (((0, 8),), ((1, 8),))])
def test_nothing_is_made_where_all_is_causal(segments: Segments | None) -> None:
    assert are_causal(segments) and attention(segments, dtype=torch.float32) == {}
    tokens = torch.arange(16).view(2, 8)
    if segments is None:
        assert targets_of(tokens, segments) is tokens
    assert num_targets(targets_of(tokens, segments)) == 14


@pytest.mark.parametrize("segments", [(((0, 4), (0, 4)),), (((2, 8),),), (((0, 7), (1, 1)),)])
def test_what_is_not_causal_has_a_mask_and_positions(segments: Segments) -> None:
    assert not are_causal(segments) and attention(segments, dtype=torch.float32).keys() == {
        "attention_mask", "position_ids"
    }


PACKED: Segments = (((3, 7), (0, 5), (2, 8), (4, 4)), ((0, 24),), ((20, 20), (1, 4)))


@pytest.mark.parametrize("family", list(SIZES))
def test_a_packed_row_is_computed_as_each_segment_alone(family: str) -> None:
    """Logits and gradients, to 1e-5: rows, documents and prefixes never see each other."""
    packed = tiny(family)
    alone = copy.deepcopy(packed)
    tokens = torch.randint(0, 257, (3, 24), generator=torch.Generator().manual_seed(1))
    logits = packed(input_ids=tokens, **model_inputs(packed, PACKED)).logits
    packed.loss_function(
        logits=logits, labels=targets_of(tokens, PACKED), vocab_size=257, num_items_in_batch=1
    ).backward()
    for number, row in enumerate(PACKED):
        first = 0
        for segment in row:
            part = tokens[number : number + 1, first : first + segment[1]]
            found = alone(input_ids=part, **model_inputs(alone, ((segment,),))).logits
            torch.testing.assert_close(logits[number, first : first + segment[1]], found[0], rtol=1e-5, atol=1e-5)
            targets = targets_of(part, ((segment,),))
            if num_targets(targets):
                alone.loss_function(logits=found, labels=targets, vocab_size=257, num_items_in_batch=1).backward()
            first += segment[1]
    for (name, one), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert float((one.grad - other.grad).norm()) <= 1e-5 * float(other.grad.norm()) + 1e-7, name


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_models_heed_a_prefix(family: str) -> None:
    model = tiny(family).eval()
    tokens = torch.randint(0, 257, (2, 8), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 257
    how = model_inputs(model, (((0, 8),), ((5, 8),)))
    with torch.no_grad():
        one, other = (model(input_ids=ids, **how).logits for ids in (tokens, changed))
        causal = model(input_ids=tokens).logits
    assert torch.equal(one[0, :3], other[0, :3]), "nothing of what comes later, where there is no prefix"
    torch.testing.assert_close(one[0], causal[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(one[1, 0], other[1, 0]), "inside the prefix the first token sees the fourth"


def test_positions_are_left_out_where_a_model_takes_none() -> None:
    class Deaf(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        @property
        def base_model(self) -> torch.nn.Module:
            return self

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None: ...

    assert not takes_positions(Deaf()) and model_inputs(Deaf(), PACKED).keys() == {"attention_mask"}
    assert takes_positions(tiny("gptj"))
