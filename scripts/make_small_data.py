#!/usr/bin/env python3
"""The data of peers/runs/gpt-jt-small.yaml: small tasks with a right answer, in exactly the formats of the large sets.

    FOLDER/pile/00.jsonl.zst                       {text, meta} as the Pile has it; the standard library's text
    FOLDER/p3/*.jsonl                              {inputs, targets} as P3 has it: classification, cloze
    FOLDER/natural-instructions/{splits,tasks}/    as allenai/natural-instructions has it: classification, copying
    FOLDER/cot/*.json, *.jsonl                     subject: few-shot text; {inputs, targets}: sums, thought through
    FOLDER/tokenizer/                              byte-level BPE that has the words of these tasks

Seeded: the same files on every machine, except for the text, which is that of the machine's Python.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FOLDER = "data/gpt-jt-small"  # where the run looks for it
SEED = 0
EXAMPLES = 2_000
TEXT_BYTES = 4_000_000
DOCUMENT_BYTES = 8_000

ANIMALS = "cat dog horse cow sheep goat pig duck hen mouse fox wolf bear lion".split()
FOODS = "bread rice soup cheese butter apple pear cake pie jam honey salt bean egg".split()
GOOD = "good great lovely superb fine nice fun happy".split()
BAD = "bad awful poor dull sad ugly weak boring".split()
THINGS = "film book song meal hotel game play show trip story".split()
OPPOSITES = [pair.split("-") for pair in (
    "hot-cold big-small up-down left-right day-night wet-dry old-new open-shut fast-slow high-low hard-soft "
    "first-last rich-poor in-out"
).split()]
COLOURS = "red blue green black white pink".split()
VOCABULARY = 768
"""of the tokenizer, 256 bytes and the end of a text among them. With a token a word a model of this size learns the
tasks in minutes; byte by byte it was still guessing after 1.2 M tokens, under every objective"""
EOS = "<eos>"
Pair = tuple[str, str]


def kind(dice: random.Random) -> Pair:
    word, answer = dice.choice([(word, "animal") for word in ANIMALS] + [(word, "food") for word in FOODS])
    asks = dice.choice([
        "Is {} an animal or a food?", "Animal or food: {}?", "{} - what is it, animal or food?",
        "Sort {} as animal or food.", "Food or animal? It is {}.", "Which is {}: food or animal?",
    ])
    return asks.format(word), answer


def review(dice: random.Random) -> Pair:
    is_good = dice.random() < 0.5
    word, thing = dice.choice(GOOD if is_good else BAD), dice.choice(THINGS)
    asks = dice.choice([
        "The {} was {}. Good or bad?", "A {} that is {}. Is that good or bad?", "My {} was {}: good or bad?",
    ])
    return asks.format(thing, word), "good" if is_good else "bad"


def opposite(dice: random.Random) -> Pair:
    """Cloze: the word that is left out."""
    first, second = dice.sample(dice.choice(OPPOSITES), 2)
    asks = dice.choice([
        "The opposite of {} is ___.", "Not {} but ___.", "If it is not {}, it is ___.",
        "{} and ___ are opposites.", "It was {}, now it is ___.", "From {} to ___.",
    ])
    return asks.format(first), second


def verdict(dice: random.Random) -> Pair:
    is_good = dice.random() < 0.5
    word = dice.choice(GOOD if is_good else BAD)
    return f"the {dice.choice(THINGS)} was {word}", "positive" if is_good else "negative"


def parity(dice: random.Random) -> Pair:
    number = dice.randrange(300)
    return str(number), "odd" if number % 2 else "even"


def first_colour(dice: random.Random) -> Pair:
    colours = dice.sample(COLOURS, 3)
    return " ".join(colours), colours[0]


def sum_of_three(dice: random.Random) -> Pair:
    a, b, c = (dice.randint(1, 6) for _ in range(3))
    return f"{a} + {b} + {c} = ?", f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}. The answer is {a + b + c}"


P3: dict[str, Callable[[random.Random], Pair]] = {"kind": kind, "review": review, "opposite": opposite}
INSTRUCTIONS: dict[str, tuple[str, Callable[[random.Random], Pair]]] = {
    "task001_review_sentiment": ("Say whether the review is positive or negative.", verdict),
    "task002_number_parity": ("Say whether the number is odd or even.", parity),
    "task003_first_colour": ("Say the first of the colours.", first_colour),
}


def write(folder: Path, *, seed: int = SEED, examples: int = EXAMPLES, text_bytes: int = TEXT_BYTES) -> None:
    """All of it below `folder`; what is there is replaced. `examples`: of each task."""
    for name, make in P3.items():
        rows = [dict(zip(("inputs", "targets"), pair, strict=True)) for pair in _pairs(name, make, seed, examples)]
        _write_lines(folder / "p3" / f"{name}.jsonl", rows)
    instructions = folder / "natural-instructions"
    _write(instructions / "splits/default/train_tasks.txt", "".join(f"{name}\n" for name in INSTRUCTIONS).encode())
    for name, (definition, make) in INSTRUCTIONS.items():
        pairs = _pairs(name, make, seed, examples)
        instances = [
            {"id": f"{name}-{index}", "input": given, "output": [answer]} for index, (given, answer) in enumerate(pairs)
        ]
        positives = [{"input": given, "output": answer, "explanation": ""} for given, answer in pairs[:2]]
        task = {
            "Definition": [definition], "Positive Examples": positives, "Negative Examples": [], "Instances": instances,
        }
        _write(instructions / "tasks" / f"{name}.json", json.dumps(task, indent=1).encode())
    sums = _pairs("sums", sum_of_three, seed, examples)
    _write_lines(folder / "cot" / "sums.jsonl", [{"inputs": f"Q: {q}", "targets": answer} for q, answer in sums[24:]])
    shots = [f"Q: {question}\nA: {answer}." for question, answer in sums[:24]]  # no row of the other file
    subjects = {f"sums {n}": "\n\n".join(shots[n * 3 : n * 3 + 3]) for n in range(8)}
    _write(folder / "cot" / "few-shot.json", json.dumps(subjects, indent=1).encode())
    _write_lines(folder / "pile" / "00.jsonl.zst", _text(seed, text_bytes))
    _write_tokenizer(folder / "tokenizer", seed, examples)


def _pairs(name: str, make: Callable[[random.Random], Pair], seed: int, number: int) -> list[Pair]:
    """Different ones, so that what is held out is nowhere in what is trained on; fewer where there are no more."""
    dice = random.Random(f"{seed}/{name}")
    found = dict.fromkeys(make(dice) for _ in range(20 * number))
    return list(found)[:number]


def _text(seed: int, num_bytes: int) -> list[dict[str, Any]]:
    """Documents of the standard library in random order, the long ones cut: prose and code by turns."""
    from swarm.data.stdlib import standard_library

    documents = [(name, text[:DOCUMENT_BYTES]) for name, text in standard_library()]
    random.Random(f"{seed}/text").shuffle(documents)
    rows, left = [], num_bytes
    for name, text in documents:
        if left <= 0:
            break
        rows.append({"text": text, "meta": {"pile_set_name": name.split("/")[0]}})
        left -= len(text)
    return rows


def _write_tokenizer(folder: Path, seed: int, examples: int) -> None:
    """Learnt from the tasks alone: they are the same on every machine, and so must a run's tokenizer be."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from swarm.data.templates import ANSWER_WORDS

    tasks = {name: ("", make) for name, make in P3.items()} | INSTRUCTIONS | {"sums": ("", sum_of_three)}
    texts = [
        f"{definition}\nPossible labels:\n{given}\n{word} {answer}"
        for name, (definition, make) in tasks.items()
        for number, (given, answer) in enumerate(_pairs(name, make, seed, examples))
        for word in (ANSWER_WORDS[number % len(ANSWER_WORDS)], "Q:")
    ]

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),  # a number that is one token tells nothing of its last digit
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOS], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, clean_up_tokenization_spaces=False)
    made.save_pretrained(folder)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow

    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    _write(path, pyarrow.compress(data, codec="zstd", asbytes=True) if path.suffix == ".zst" else data)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main(arguments: Sequence[str]) -> int:
    from swarm.errors import HomeError
    from swarm.program import guarded

    options = make_parser().parse_args(arguments)
    folder = Path(options.folder).expanduser()

    def work() -> int:
        try:
            write(folder, seed=options.seed)
        except OSError as error:
            raise HomeError(f"cannot write to {folder}", why=str(error.strerror or error), do="name a folder") from None
        files = [path for path in folder.rglob("*") if path.is_file()]
        print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
        if options.folder == FOLDER:
            print("train on it: python -m swarm.peer --new-swarm --run peers/runs/gpt-jt-small.yaml")
        return 0

    return guarded(work)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", default=FOLDER, help=f"where to write it (default: {FOLDER})")
    parser.add_argument("--seed", type=int, default=SEED, help="other seed, other examples (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
