"""How a run's model wants to be asked, which is what its last phase taught it.

After a prefix objective a prompt's tokens see each other, as GPT-JT's do. After UL2 a prompt also begins with the mark
of the mode that goes on with a text ([S2S]): without it the model may take the prompt for one with holes.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from swarm.asking.answerer import Manner
from swarm.config import RunConfig
from swarm.data.marks import Marks

CAUSAL = "causal"


def manner_of(
    tokenizer: PreTrainedTokenizerBase, *, sequence_length: int, objective: str = CAUSAL, vocabulary: int
) -> Manner:
    """`objective`: of the last phase, as the run config names it; `vocabulary`: rows of the model's embedding."""
    end: Any = tokenizer.eos_token_id
    kind = objective.partition(":")[0]
    marks = marks_of(tokenizer, vocabulary)
    taken, num_tokens = {*marks.modes, *marks.sentinels}, min(len(tokenizer), vocabulary)
    while num_tokens - 1 in taken:  # some tokenizers name them, exported ones do: they are no text all the same
        num_tokens -= 1
    return Manner(
        sequence_length=sequence_length, end=end, num_tokens=num_tokens, prefix=kind != CAUSAL,
        mark=marks.modes[:1] if kind in ("ul2", "ul2r") else (),
    )


def run_manner(run: RunConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Manner:
    """As its last phase wants it."""
    objective = run.all_phases()[-1].objective
    return manner_of(
        tokenizer, sequence_length=run.train.sequence_length, objective=objective, vocabulary=vocabulary
    )


def marks_of(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Marks:
    """What stands for no text in a run with this tokenizer and so many rows of the embedding."""
    return Marks.of(tokenizer, vocabulary)
