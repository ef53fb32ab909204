"""Loss on text that no peer of a run trains on, for each source and objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from swarm.asking.answerer import Answerer
from swarm.asking.manner import CAUSAL
from swarm.config import RunConfig
from swarm.data import held_out as held_out_data
from swarm.data.batch import Batch
from swarm.data.sources import documents
from swarm.data.stream import held_out_batches, tokenise
from swarm.data.tokenizer import text_bytes
from swarm.errors import ConfigError
from swarm.model.evaluate import mean_loss, perplexity
from swarm.model.prefix import IGNORED, targets_of

SEQUENCES = 256
"""spread over the text; of fewer, the first"""
Batches = Mapping[tuple[str, str], Batch]
"""(source, objective) -> its held-out rows"""


@dataclass(frozen=True)
class Loss:
    """Over the targets: tokens that a loss is taken of."""

    source: str
    objective: str
    nats_per_token: float
    nats_per_byte: float
    """of the text that the targets stand for"""
    targets: int
    sequences: int


def held_out(
    run: RunConfig, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, objectives: Sequence[str] = (),
    sequences: int = SEQUENCES,
) -> Batches:
    """The same rows on each machine that has the same text, cut and packed as in training. `objectives`: all that the
    run's phases have. Raises ConfigError where the text is not on this machine."""
    if run.data is None or run.phases or objectives:
        wanted = objectives or list(dict.fromkeys(phase.objective for phase in run.all_phases()))
        return {
            (source, objective): batch for objective in wanted for source, batch in held_out_data.held_out(
                run, tokenizer, vocabulary=vocabulary, objective=objective, sequences=sequences
            ).items()
        }
    tokens = tokenise(documents(run.data)[1], tokenizer)
    count = max(SEQUENCES, sequences)
    rows = held_out_batches(tokens, sequence_length=run.train.sequence_length, num_sequences_max=count)
    return {("data", CAUSAL): rows.part(slice(sequences))}


def losses(
    answerer: Answerer, tokenizer: PreTrainedTokenizerBase, batches: Batches, *,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Loss]:
    """Of each source under each objective. `on_progress(what, sequences done, of how many)`."""
    found = []
    for (source, objective), batch in batches.items():
        if not batch.num_targets:
            raise ConfigError(
                f"nothing of {source} can be predicted under {objective}", why="its rows are padding or prompts only",
                do="hold more of it out",
            )

        def tell(done: int, total: int, what: str = f"{source}, {objective}") -> None:
            on_progress(what, done, total)

        loss, targets = answerer.loss(batch, on_progress=tell)
        num_bytes = target_bytes(batch, tokenizer)
        found.append(Loss(source, objective, loss, loss * targets / max(1, num_bytes), targets, len(batch)))
    return found


def target_bytes(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of text that the targets stand for."""
    targets = targets_of(batch.tokens, batch.segments)[:, 1:]
    return sum(text_bytes(tokenizer, row[row != IGNORED].tolist()) for row in targets)


def overall(found: Iterable[Loss]) -> dict[str, float | int]:
    """All of them together, each token counting the same."""
    parts = list(found)
    loss = mean_loss((part.nats_per_token, part.targets) for part in parts)
    num_bytes = sum(part.nats_per_token * part.targets / part.nats_per_byte for part in parts if part.nats_per_byte)
    tokens = sum(part.targets for part in parts)
    return {
        "nats_per_token": loss, "nats_per_byte": loss * tokens / max(1.0, num_bytes), "perplexity": perplexity(loss),
        "sequences": sum(part.sequences for part in parts), "tokens": tokens,
    }
