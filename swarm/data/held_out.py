"""What no peer trains on, of each source: rows to measure a loss with, and questions to ask.

The same on every machine: which samples are held out follows from their names (sources.py), and their order and
wording from the run's seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from swarm.config import RunConfig
from swarm.data.batch import Batch
from swarm.data.marks import Marks
from swarm.data.objectives import make_objective
from swarm.data.packing import to_batch
from swarm.data.sample import Sample
from swarm.data.shelf import dice_of
from swarm.data.sources import is_held_out
from swarm.data.supply import Stock, layout_of, pack_rows
from swarm.data.templates import Pack, labels_of, packs, put

SEQUENCES = 64
STREAMED_SHARDS, STREAMED_SAMPLES = 8, 2_500
"""of a streamed source so many are looked at, from the beginning of each shard on"""


@dataclass(frozen=True)
class Question:
    """One held-out example of a task, as it is put to the model."""

    name: str
    prompt: str
    answer: str
    labels: tuple[str, ...]
    """all answers of the task, where they are few"""


def held_out(
    run: RunConfig, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, objective: str | None = None,
    sequences: int = SEQUENCES, cache: Path | None = None,
) -> dict[str, Batch]:
    """Source -> at most `sequences` rows. A source of which nothing is held out is not there.

    `objective`: default: of the last phase that mixes the source. Raises ConfigError, NetworkError: a source that
    cannot be read.
    """
    marks = Marks.of(tokenizer, vocabulary)
    found = {}
    for name, source in run.named_sources().items():
        how = objective or [phase.objective for phase in run.all_phases() if name in phase.mixture][-1]
        dice, layout = dice_of(f"{run.seed}/held out/{name}/{how}"), layout_of(run, source, tokenizer)
        enough = 2 * sequences * layout.room_chars  # a row may be padded, and a document longer than one
        samples, chars = [], 0
        for sample in _held(Stock(name, source, cache=cache)):
            samples.append(sample)
            chars += len(sample.prompt) + len(sample.text)
            if chars > enough and len(samples) > sequences:
                break
        chosen = packs(samples, dice, shots=source.shots, room_chars=layout.room_chars)
        rows = pack_rows(
            chosen, make_objective(how, sequence_length=run.train.sequence_length, marks=marks), tokenizer, dice,
            length=run.train.sequence_length, pad=marks.end,
        )
        if rows:
            found[name] = to_batch([rows[index] for index in sorted(dice.permutation(len(rows))[:sequences])])
    return found


def held_out_questions(run: RunConfig, *, most: int = 200, cache: Path | None = None) -> dict[str, list[Question]]:
    """Source of tasks -> at most `most` of its held-out examples, spread over its tasks, without solved ones before.
    Sources of plain text are not there. Raises as `held_out`."""
    found = {}
    for name, source in run.named_sources().items():
        samples = [sample for sample in _held(Stock(name, source, cache=cache)) if sample.prompt]
        if not samples:
            continue
        tasks: dict[str, list[Sample]] = {}
        for sample in samples:
            tasks.setdefault(sample.task, []).append(sample)
        labels = {task: labels_of(members) for task, members in tasks.items()}
        dice = dice_of(f"{run.seed}/questions/{name}")
        chosen = [samples[index] for index in sorted(dice.permutation(len(samples))[:most])]
        questions = []
        for sample in chosen:
            prompt, answer = put(Pack((sample,), labels[sample.task]), dice)
            questions.append(Question(sample.name, prompt, answer.strip(), labels[sample.task]))
        found[name] = questions
    return found


def _held(stock: Stock) -> Iterator[Sample]:
    """The held-out samples; of a streamed source those of its beginning."""
    if not stock.source.streaming:
        yield from stock.sides()[1]
        return
    for shard in stock.shards()[:STREAMED_SHARDS]:
        for sample in islice(shard.samples(), STREAMED_SAMPLES):
            if sample.text and is_held_out(sample.name, held_out_percent=stock.source.held_out_percent):
                yield sample
