"""A run's weights as a folder that anybody can use: model, tokenizer, run config, model card (model/export.py)."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from swarm.asking.manner import marks_of, run_manner
from swarm.asking.states import Weights
from swarm.config import canonical_json
from swarm.data.tokenizer import load_tokenizer
from swarm.model import card
from swarm.model.build import Model
from swarm.model.export import MAX_SHARD_BYTES, RUN_FILE, export, with_names
from swarm.model.fragments import embedding_rows


def write(found: Weights, out: Path, *, max_shard_bytes: int | None = None) -> None:
    """Raises ConfigError where `out` holds anything but an earlier export, HomeError where it cannot be written."""
    run, model = found.run, found.model()
    tokenizer, vocabulary = load_tokenizer(run), embedding_rows(model)
    export(
        model, _named(found, tokenizer, vocabulary), out, max_shard_bytes=max_shard_bytes or MAX_SHARD_BYTES,
        more_files={
            RUN_FILE: canonical_json(run), card.FILE: card.card(facts(found, model, tokenizer)).encode(),
        },
    )


def facts(found: Weights, model: Model, tokenizer: PreTrainedTokenizerBase) -> card.Facts:
    run, manner = found.run, run_manner(found.run, tokenizer, embedding_rows(model))
    return card.Facts(
        run, parameters=sum(parameter.numel() for parameter in model.parameters()), tokens=found.tokens,
        phases=[(phase.tokens, phase.objective, phase.mixture) for phase in run.all_phases()],
        heads=[(state.version, state.tokens, state.digest) for state in found.states],
        names=found.names, prefix=manner.prefix, mark=manner.mark,
        datasets=[source.hub for source in run.named_sources().values() if source.hub is not None],
    )


def _named(found: Weights, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> PreTrainedTokenizerBase:
    """With names for the marks that UL2 uses, where a phase of the run does."""
    uses_marks = any(phase.objective.startswith("ul2") for phase in found.run.all_phases())
    return with_names(tokenizer, marks_of(tokenizer, vocabulary).names) if uses_marks else tokenizer
