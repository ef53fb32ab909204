"""A model at hand says what plain transformers says, with a prefix, too; its cache changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.asking.answerer import Manner, chooser, write
from swarm.asking.at_hand import AtHand
from swarm.data.batch import Batch, Segment
from swarm.model.prefix import segment_mask

FAMILIES: dict[str, dict[str, Any]] = {
    "gptj": {"n_layer": 2, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 64, "vocab_size": 300},
    "llama": {
        "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 300,
    },
}
MANNER = Manner(sequence_length=40, end=-1, num_tokens=300)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(name, **FAMILIES[name], bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=FAMILIES, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


def ids_of(count: int, *, seed: int = 1) -> list[int]:
    found: list[int] = torch.randint(1, 299, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def written(model: Any, prompt: list[int], *, prefix: bool, count: int = 8) -> list[int]:
    manner = Manner(sequence_length=40, end=-1, num_tokens=300, prefix=prefix)
    return list(write(AtHand(model), prompt, manner, choose=chooser(manner), max_tokens=count))


@torch.no_grad()
def test_without_a_prefix_it_writes_what_generate_does(model: Any) -> None:
    prompt = ids_of(9)
    wanted = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert written(model, prompt, prefix=False) == wanted[0, 9:].tolist()


@torch.no_grad()
def test_with_a_prefix_it_writes_what_generate_does_as_the_card_says(model: Any) -> None:
    """`config.is_causal = False`: the prompt in both directions, and each new token through the cache."""
    differ = False
    for seed in range(4):
        prompt = ids_of(9, seed=seed)
        model.config.is_causal = False
        try:
            wanted = model.generate(
                torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        finally:
            del model.config.is_causal
        found = written(model, prompt, prefix=True)
        assert found == wanted[0, 9:].tolist()
        differ |= found != written(model, prompt, prefix=False)
    assert differ, "else this test shows nothing"


@torch.no_grad()
def test_the_cache_changes_nothing(model: Any) -> None:
    kept, text = AtHand(model), ids_of(12)
    for prefix in (0, 5):
        for end in range(6, 13):
            fresh = AtHand(model).next_logits(text[:end], prefix=prefix)
            assert torch.allclose(kept.next_logits(text[:end], prefix=prefix), fresh, atol=1e-5)
    other = [7, *text[1:]]
    assert torch.allclose(kept.next_logits(other), AtHand(model).next_logits(other), atol=1e-5), "another text"
    assert torch.allclose(kept.next_logits(other), AtHand(model).next_logits(other), atol=1e-5), "the same again"
    assert torch.allclose(kept.next_logits(other[:4]), AtHand(model).next_logits(other[:4]), atol=1e-5), "less"
    several = [*other, 3, 4, 5]
    assert torch.allclose(kept.next_logits(several), AtHand(model).next_logits(several), atol=1e-5), "many at once"


@torch.no_grad()
def test_a_prefix_is_seen_from_both_sides(model: Any) -> None:
    """What comes next depends on how the 2nd token sees the 5th, but only with a prefix that holds both."""
    text = ids_of(8)
    plain, prefixed = (AtHand(model).next_logits(text, prefix=prefix) for prefix in (0, 6))
    assert not torch.allclose(plain, prefixed, atol=1e-4)
    assert torch.allclose(AtHand(model).next_logits(text, prefix=1), plain, atol=1e-5), "one token sees itself anyway"


def test_the_loss_of_plain_rows_is_that_of_transformers(model: Any) -> None:
    rows = torch.tensor([ids_of(20, seed=seed) for seed in range(11)])
    heard: list[tuple[int, int]] = []
    loss, targets = AtHand(model).loss(Batch(rows), on_progress=lambda done, total: heard.append((done, total)))
    with torch.no_grad():
        assert loss == pytest.approx(model(input_ids=rows, labels=rows).loss.item(), rel=1e-5)
    assert targets == 11 * 19 and heard == [(8, 11), (11, 11)]


Rows = list[list[Segment]]


def alone(model: Any, tokens: torch.Tensor, prefix: int) -> tuple[float, int]:
    """A segment as a text of its own: sum of what its targets cost, and how many they are."""
    length = len(tokens)
    mask = segment_mask([[(prefix, length)]])
    with torch.no_grad():
        logits = model(input_ids=tokens[None], attention_mask=mask).logits[0, :-1]
    first = max(1, prefix)
    costs = functional.cross_entropy(logits, tokens[1:], reduction="none")[first - 1:]
    return float(costs.sum()), len(costs)


@pytest.mark.parametrize("rows", [
    [[(0, 12)]], [[(5, 12)]], [[(3, 7), (0, 5)]], [[(4, 4), (2, 5), (1, 3)], [(0, 2), (10, 10)]],
    [[(1, 1)] * 5 + [(3, 7)]],
])
def test_segments_of_a_row_are_texts_of_their_own(model: Any, rows: Rows) -> None:
    tokens = torch.tensor([ids_of(12, seed=seed) for seed in range(len(rows))])
    loss, targets = AtHand(model).loss(Batch(tokens, tuple(map(tuple, rows))))
    total, count = 0.0, 0
    for row, segments in zip(tokens, rows, strict=True):
        start = 0
        for prefix, length in segments:
            costs, found = alone(model, row[start:start + length], prefix)
            total, count, start = total + costs, count + found, start + length
    assert targets == count > 0
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_rows_of_padding_cost_nothing(model: Any) -> None:
    rows = torch.tensor([ids_of(6, seed=seed) for seed in range(9)])
    padded = Batch(rows, (*[((0, 6),)] * 8, ((6, 6),)))
    assert AtHand(model).loss(padded) == AtHand(model).loss(Batch(rows[:8]))
