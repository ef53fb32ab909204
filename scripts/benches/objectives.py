"""What making examples costs, on one core: tokens of text a second, from token ids to batches that can be sent.

Documents of random ids, as long as those of web text (the median is 600 tokens) or as tasks (60), their lengths
log-normal. Time is the process's own: other work on the machine does not count. Beside it: what of the rows is padding,
and what of them a loss is taken of.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np

from benches import table as tables
from swarm.data.marks import Marks
from swarm.data.objectives import NAMES, make_objective
from swarm.data.packing import Packer, Row, to_batch

NAME = "objectives"
HELP = "tokens a second of each objective with packing, one core; padding"

LENGTH, VOCABULARY, SEQUENCES = 2048, 50_257, 16
MARKS = Marks(50_256, (50_257, 50_258, 50_259), tuple(range(50_260, 50_400)))
"""GPT-J's"""
MEDIANS = {"web": 600, "tasks": 60}
SPREAD = 1.0
"""of the logarithm of the length"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--objective", nargs="+", default=list(NAMES), choices=NAMES, help="which ones (all)")
    parser.add_argument("--tokens", type=int, default=4_000_000, metavar="N", help="of text (4,000,000)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    tokens = min(options.tokens, 200_000) if options.quick else options.tokens
    rows = []
    for texts, median in MEDIANS.items():
        documents = some_documents(tokens, median=median)
        rows += [{"texts": texts, "objective": name, **one(name, documents)} for name in options.objective]
    return {"tokens": tokens, "sequence_length": LENGTH, "rows": rows}


def some_documents(tokens: int, *, median: int) -> list[Any]:
    """Arrays of random ids, uint16, of so many tokens together."""
    dice = np.random.RandomState(0)
    found, total = [], 0
    while total < tokens:
        size = max(1, int(dice.lognormal(math.log(median), SPREAD)))
        found.append(dice.randint(0, VOCABULARY, size).astype(np.uint16))
        total += size
    return found


def one(name: str, documents: list[Any]) -> dict[str, Any]:
    objective, packer = make_objective(name, sequence_length=LENGTH, marks=MARKS), Packer(LENGTH, MARKS.end)
    dice, waiting, batches = np.random.RandomState(1), list[Row](), []
    began = time.process_time()
    for text in documents:
        for example in objective.examples(text, dice):
            waiting += packer.add(example)
        while len(waiting) >= SEQUENCES:
            batches.append(to_batch(waiting[:SEQUENCES]))
            del waiting[:SEQUENCES]
    seconds = time.process_time() - began
    sent = max(1, sum(batch.numel() for batch in batches))
    return {
        "tokens_per_s": round(sum(map(len, documents)) / seconds),
        "padding_percent": round(100 * packer.padded / sent, 2),
        "target_percent": round(100 * sum(batch.num_targets for batch in batches) / sent, 1),
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        [row["texts"], row["objective"], f"{row['tokens_per_s'] / 1e6:.1f}", row["padding_percent"],
         row["target_percent"]]
        for row in result["rows"]
    ]
    return tables.markdown(["texts", "objective", "M tokens/s", "padding %", "targets %"], lines)
