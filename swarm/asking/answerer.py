"""What can be asked: an answerer. And how a text is written by asking one for a token at a time.

An export and a checkpoint are asked on this machine (at_hand.py), a live swarm through its chain (live.py); evaluation
and chat do not see the difference. How a run's model wants to be asked is its manner (manner.py): the last phase may
have taught it to read a prompt in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from swarm.data.batch import Batch
from swarm.model.evaluate import next_token

Choose = Callable[[torch.Tensor], int]
"""picks a token by the logits [vocabulary] of the last position"""


class Answerer(Protocol):
    def loss(
        self, batch: Batch, *, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[float, int]:
        """(mean loss in nats a token, targets that it is the mean of). `on_progress(sequences done, of how many)`, from
        any thread. Raises SwarmError where a live swarm does not answer."""

    def next_logits(self, ids: Sequence[int], *, prefix: int = 0) -> torch.Tensor:
        """fp32 [vocabulary] of what comes after `ids` (at least one), of which the first `prefix` see each other.
        Raises SwarmError as `loss` does."""


@dataclass(frozen=True)
class Manner:
    """How a run's model is asked."""

    sequence_length: int
    """tokens that it sees at once, those it writes among them"""
    end: int
    """the token that ends a text"""
    num_tokens: int
    """of the tokenizer; rows of the vocabulary beyond them decode to nothing"""
    prefix: bool = False
    """a prompt's tokens see each other (its last phase was a prefix objective), or else only those before them"""
    mark: tuple[int, ...] = ()
    """token ids before each prompt: the mode that UL2 taught for going on with a text"""


def write(
    answerer: Answerer, ids: Sequence[int], manner: Manner, *, choose: Choose, max_tokens: int
) -> Iterator[int]:
    """What comes after the prompt `ids`, token by token, until the end of the text (not included) or `max_tokens`.

    An empty prompt is the beginning of a text. Of a text longer than `sequence_length`, the model is shown the end.
    """
    prompt = list(ids) or [manner.end]
    text, room = list(prompt), manner.sequence_length - len(manner.mark)
    for _ in range(max_tokens):
        seen = text[-room:]
        prompted = len(manner.mark) + max(0, len(prompt) - (len(text) - len(seen)))
        token = choose(answerer.next_logits([*manner.mark, *seen], prefix=prompted if manner.prefix else 0))
        if token == manner.end:
            return
        text.append(token)
        yield token


def chooser(manner: Manner, *, temperature: float = 0.0, top_k: int = 0, seed: int = 0) -> Choose:
    """Temperature 0: always the likeliest token. Else drawn; the same seed, the same draws."""
    dice = torch.Generator().manual_seed(seed)
    return lambda logits: next_token(
        logits, temperature=temperature, top_k=top_k, num_tokens=manner.num_tokens, generator=dice
    )


def answer(
    answerer: Answerer, tokenizer: PreTrainedTokenizerBase, prompt: str, manner: Manner, *, max_tokens: int,
    stop: str | None = "\n",
) -> str:
    """The likeliest answer to a prompt, up to `stop` (not included), the end of the text, or `max_tokens`. Of a prompt
    that leaves no room for it, the end is asked."""
    room = max(1, manner.sequence_length - len(manner.mark) - max_tokens)
    ids = encode(tokenizer, prompt)[-room:]
    written: list[int] = []
    text = ""
    for token in write(answerer, ids, manner, choose=chooser(manner), max_tokens=max_tokens):
        written.append(token)
        text = decode(tokenizer, written)
        if stop is not None and stop in text:
            return text.partition(stop)[0]
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert isinstance(ids, list)
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text
