"""Loss and samples: right against plain transformers, repeatable, and without a trace on the training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.data.batch import Batch
from swarm.data.tokenizer import byte_tokenizer
from swarm.model.build import build_model
from swarm.model.evaluate import held_out_loss, mean_loss, next_token, perplexity, sample_text

CONFIG = {
    "model_type": "gptj",
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 2,
    "rotary_dim": 4,
    "n_positions": 48,
    "vocab_size": 300,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


@pytest.fixture
def model() -> Any:
    return build_model(
        RunConfig(name="test", model=ModelConfig(config=CONFIG), data=DataConfig(stdlib=True), fragments=1)
    )


def test_loss_is_that_of_transformers(model: Any) -> None:
    sequences = torch.randint(0, 257, (5, 24), generator=torch.Generator().manual_seed(0))
    model.eval()
    expected = model(input_ids=sequences, labels=sequences).loss.item()
    for batch in (1, 2, 5, 16):
        assert held_out_loss(model, Batch(sequences), batch_sequences=batch) == pytest.approx(expected, rel=1e-5)


def test_loss_of_a_model_that_knows_nothing_is_ln_of_its_vocabulary(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
    assert held_out_loss(model, Batch(torch.zeros(2, 10, dtype=torch.int64))) == pytest.approx(math.log(300), rel=1e-6)


def test_the_loss_of_segments_is_of_their_targets(model: Any) -> None:
    """As transformers says of each segment alone; rows without a target count for nothing."""
    model.eval()
    tokens = torch.randint(0, 257, (3, 12), generator=torch.Generator().manual_seed(1))
    segments = (((0, 5), (7, 7)), ((12, 12),), ((0, 3), (0, 9)))
    alone = [(tokens[0, :5], 4), (tokens[2, :3], 2), (tokens[2, 3:], 8)]
    with torch.no_grad():
        losses = [(float(model(input_ids=ids[None], labels=ids[None]).loss), count) for ids, count in alone]
    for rows in (1, 2, 16):
        found = held_out_loss(model, Batch(tokens, segments), batch_sequences=rows)
        assert found == pytest.approx(mean_loss(losses), rel=1e-5)
    assert held_out_loss(model, Batch(tokens[1:2], segments[1:2])) == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_loss_leaves_no_trace(model: Any, training: bool) -> None:
    model.train(training)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sequences = torch.arange(40).reshape(2, 20)
    first = held_out_loss(model, Batch(sequences))
    assert held_out_loss(model, Batch(sequences)) == first, "dropout (0.1 by default) was on"
    assert model.training is training
    assert all(module.training is training for module in model.modules() if isinstance(module, nn.Dropout))
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_mode_comes_back_after_an_error(model: Any) -> None:
    with pytest.raises(IndexError):
        held_out_loss(model, Batch(torch.full((1, 8), 9999)))
    assert model.training


def test_sample_repeats_and_leaves_the_random_state_alone(model: Any) -> None:
    tokenizer = byte_tokenizer()
    state = torch.get_rng_state()
    one = sample_text(model, tokenizer, "def f(", max_new_tokens=20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert sample_text(model, tokenizer, "def f(", max_new_tokens=20, seed=1) == one
    assert sample_text(model, tokenizer, "def f(", max_new_tokens=20, seed=2) != one
    assert model.training and model.config.use_cache is False


def test_greedy_sample_follows_the_logits(model: Any) -> None:
    prompt = "abc"
    text = sample_text(model, byte_tokenizer(), prompt, max_new_tokens=4, seed=0, temperature=0.0)
    ids = list(prompt.encode())
    model.eval()
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1, :257].argmax()))
    assert text == byte_tokenizer().decode(ids[3:], skip_special_tokens=True)


def test_rows_without_a_token_are_never_sampled(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.bias[257:] += 100.0
    assert sample_text(model, byte_tokenizer(), "abc", max_new_tokens=5, temperature=0.0) != ""


def test_end_of_text_ends_the_sample(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.bias[256] += 100.0
    assert sample_text(model, byte_tokenizer(), "abc", max_new_tokens=30) == ""


def test_prompts_of_any_length(model: Any) -> None:
    tokenizer = byte_tokenizer()
    assert isinstance(sample_text(model, tokenizer, "", max_new_tokens=5), str)
    long = "x" * 500
    assert sample_text(model, tokenizer, long, 8, seed=3) == sample_text(model, tokenizer, long[-40:], 8, seed=3)
    assert isinstance(sample_text(model, tokenizer, long, max_new_tokens=1000), str)


def test_the_mean_is_over_tokens() -> None:
    assert mean_loss([(1.0, 30), (4.0, 10)]) == pytest.approx(1.75)
    assert mean_loss(iter([(2.5, 7)])) == 2.5
    assert mean_loss([]) == mean_loss([(0.0, 0)]) == 0.0, "of a text without targets"


def test_perplexity_is_among_how_many_it_guesses() -> None:
    assert perplexity(math.log(300)) == pytest.approx(300) and perplexity(0.0) == 1.0
    assert math.isfinite(perplexity(1e6)), "a model that was never any good is no error"


LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, 9.0])


def draws(count: int = 400, **how: Any) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return [next_token(LOGITS, generator=generator, num_tokens=4, **how) for _ in range(count)]


def test_without_temperature_the_likeliest_comes_next() -> None:
    assert set(draws(10, temperature=0.0)) == set(draws(10, temperature=1.0, top_k=1)) == {1}, "4 is no token"


def test_tokens_come_as_often_as_their_chances_say() -> None:
    found = draws(4000, temperature=2.0)
    chances = torch.softmax(LOGITS[:4] / 2.0, dim=0)
    for token in range(4):
        assert found.count(token) / 4000 == pytest.approx(float(chances[token]), abs=0.03)


@pytest.mark.parametrize(("top_k", "tokens"), [(2, {1, 2}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (99, {0, 1, 2, 3})])
def test_top_k_leaves_out_the_others(top_k: int, tokens: set[int]) -> None:
    assert set(draws(temperature=5.0, top_k=top_k)) == tokens


def test_the_same_seed_draws_the_same() -> None:
    assert draws(temperature=1.0) == draws(temperature=1.0)
