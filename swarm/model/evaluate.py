"""How good a model is: its loss on held-out text, and a sample to read.

The measure is the same for a model at hand and for one that a swarm is asked for (swarm/evaluate.py): the mean over all
tokens that a loss is taken of in training, which in plain text are all but each sequence's first. What needs a model
puts it back as it was (train or eval mode, torch's random state), so it may run between two inner steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from swarm.model.fragments import embedding_rows
from swarm.model.prefix import IGNORED, Rows, model_inputs, num_targets, targets_of


def held_out_loss(model: PreTrainedModel, batch: Rows, batch_sequences: int = 16) -> float:
    """Mean loss in nats a token, of all that `batch` has a loss taken of: in plain rows each token but the first, given
    those before it.

    `batch`: swarm.data's Batch, at least one row, at least two tokens a row. With byte tokens this is nats a byte.
    The mean is over tokens, so `batch_sequences` changes memory and speed, not the result. 0 where there is no target.
    """
    rows = range(0, len(batch.tokens), batch_sequences)
    with _evaluating(model):
        return mean_loss(_loss_of(model, batch, slice(first, first + batch_sequences)) for first in rows)


def _loss_of(model: PreTrainedModel, batch: Rows, rows: slice) -> tuple[float, int]:
    """(mean loss, targets) of these rows."""
    tokens = batch.tokens[rows].to(model.device)
    segments = None if batch.segments is None else batch.segments[rows]
    targets = targets_of(tokens, segments)
    count = num_targets(targets)
    if not count:
        return 0.0, 0
    logits = model(input_ids=tokens, **model_inputs(model, segments)).logits[:, :-1].float()  # [rows, length - 1, ids]
    loss = functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)
    return loss.item(), count


def mean_loss(parts: Iterable[tuple[float, int]]) -> float:
    """From (mean loss, tokens that it is the mean of) of parts of a text: that of all of it. 0 of no tokens."""
    total, count = 0.0, 0
    for loss, tokens in parts:
        total += loss * tokens
        count += tokens
    return total / max(1, count)


def perplexity(loss: float) -> float:
    """Of a mean loss in nats a token: among how many equally likely ones each token is found."""
    return math.exp(min(loss, 700.0))


def next_token(
    logits: torch.Tensor, *, temperature: float, top_k: int = 0, num_tokens: int, generator: torch.Generator
) -> int:
    """One of the tokens that may come next, by `logits` [vocabulary] of the last position.

    `temperature` 0: the likeliest; `top_k`: one of so many likeliest (0: any). `num_tokens`: those that the tokenizer
    has; rows beyond it (a vocabulary rounded up) would decode to nothing.
    """
    scores = logits[:num_tokens].float()
    if temperature == 0:
        return int(scores.argmax())
    likeliest = scores.topk(min(top_k, len(scores)) if top_k else len(scores))
    chances = torch.softmax(likeliest.values / temperature, dim=0)
    return int(likeliest.indices[torch.multinomial(chances, 1, generator=generator)])


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 100,
    seed: int = 0,
    temperature: float = 0.8,
) -> str:
    """What the model writes after `prompt` (not included), up to its end-of-text token or `max_new_tokens`.

    The same on one machine for the same seed; temperature 0 is greedy. An empty prompt starts from the end-of-text
    token. A prompt too long for the model's positions loses its beginning.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.eos_token_id]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - 1)
        ids = ids[-(positions - max_new_tokens) :]
    inputs = torch.tensor([ids], device=model.device)
    # rows of the embedding that no token uses (a vocabulary rounded up) would decode to nothing
    unused = list(range(len(tokenizer), embedding_rows(model)))
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    generator: Any = model  # PreTrainedModel does not declare it, each causal LM has it
    devices = [model.device] if model.device.type == "cuda" else []
    with _evaluating(model), torch.random.fork_rng(devices=devices):
        # not torch.manual_seed: it reseeds every GPU, and only this one's state comes back
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        output = generator.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            suppress_tokens=unused or None,
            **how,
        )
    text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
