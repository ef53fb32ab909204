#!/usr/bin/env python3
"""Write a swarm's model as a plain Hugging Face folder, from a live swarm or from a peer's home folder.

    scripts/export.py my-model --home ~/.swarm                       the newest checkpoint; the peer may run or not
    scripts/export.py my-model --initial-peers /ip4/203.0.113.7/...  downloaded and checked as a newcomer does

AutoModelForCausalLM.from_pretrained("my-model") then loads it without any code of ours. Its model card (README.md) says
what it was trained on and how to use it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entry import guarded, start

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from swarm.asking.held_out import Loss
    from swarm.asking.states import Weights
    from swarm.config import RunConfig

SAMPLE_TOKENS = 160
SHARD = "5GB"


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    from swarm.asking import states
    from swarm.model.export import check_replaceable

    check_replaceable(options.out.expanduser().resolve())
    if options.initial_peers:
        found = states.from_swarm(
            options.initial_peers, run_id=options.run_id, base=options.base, say=say,
            join_timeout_s=options.join_timeout_s,
        )
    else:
        found = states.from_folder(options.home, run_id=options.run_id, base=options.base, say=say)
    result = write(found, options.out, max_shard_bytes=options.max_shard_size)
    if not options.json:
        versions = ", ".join(map(str, result["versions"]))
        print(f"{result['run_id']}: {result['tokens']:,} tokens, versions {versions}, written to {result['folder']}")
    if options.evaluate:
        result |= evaluate(found.run, options.out, options.prompt)
        if not options.json:
            print(f"held-out loss {result['held_out_loss']:.3f} nats a token")
            print("\n".join(quoted(options.prompt + result["sample"])))
    if options.json:
        print(json.dumps(result))
    return 0


def write(found: Weights, out: Path, *, max_shard_bytes: int | None = None) -> dict[str, Any]:
    """Write the model with these global weights to `out`; returns what it is. Raises ConfigError or HomeError."""
    from swarm.asking import release

    release.write(found, out, max_shard_bytes=max_shard_bytes)
    return {
        "run_id": found.run.run_id,
        "tokens": found.tokens,
        "versions": [state.version for state in found.states],
        "digests": [state.digest for state in found.states],
        "names": found.names,
        "folder": str(out.expanduser().resolve()),
    }


def evaluate(config: RunConfig, out: Path, prompt: str) -> dict[str, Any]:
    """Loads the export as anybody would, and writes its held-out loss into its card."""
    import dataclasses

    from swarm.asking import report
    from swarm.model import card

    model, tokenizer = reload(out)
    losses = held_out_losses(config, model, tokenizer)
    table = {"held_out": [dataclasses.asdict(loss) for loss in losses]}
    card.add_evaluation(out, report.markdown(table))
    return {
        "held_out_loss": round(overall(losses), 4), "held_out": table["held_out"],
        "sample": sample(model, tokenizer, prompt),
    }


def reload(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As anybody would load it, without any code of ours."""
    from swarm.asking.target import load_export

    return load_export(folder)


def held_out_loss(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Nats a token on text that no peer of the run trains on."""
    return overall(held_out_losses(config, model, tokenizer))


def held_out_losses(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Loss]:
    """Of each source and objective."""
    from swarm.asking import held_out
    from swarm.asking.at_hand import AtHand
    from swarm.model.fragments import embedding_rows

    vocabulary = embedding_rows(model)
    batches = held_out.held_out(config, tokenizer, vocabulary=vocabulary)
    return held_out.losses(AtHand(model), tokenizer, batches)


def overall(losses: list[Loss]) -> float:
    from swarm.asking.held_out import overall

    return float(overall(losses)["nats_per_token"])


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    from swarm.model.evaluate import sample_text

    return sample_text(model, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS)


def quoted(text: str) -> list[str]:
    """Lines for a terminal: strangers trained the model, so what it writes could be anything."""
    from swarm.units import printable

    return [f"  | {printable(line.expandtabs(), max_chars=110)}".rstrip() for line in text.rstrip().splitlines()]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def size(text: str) -> int:
    from swarm.units import parse_bytes

    try:
        found = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if found < 1:
        raise argparse.ArgumentTypeError("must be at least one byte")
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write: a new one, an empty one, or an earlier export")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--home", type=Path, metavar="DIR", help="home folder of a peer, running or stopped, or one of its checkpoints"
    )
    source.add_argument("--initial-peers", nargs="+", metavar="MADDR", help="peers of a live swarm: from a join line")
    parser.add_argument("--run-id", metavar="ID", help="which run, where there are several")
    parser.add_argument(
        "--base", metavar="DIR",
        help="folder with the frozen model of a run with adapters, where it is neither on the hub nor known to --home",
    )
    parser.add_argument(
        "--join-timeout-s", type=float, default=20.0, metavar="S", help="give up joining after this long (20)"
    )
    parser.add_argument(
        "--max-shard-size", type=size, default=size(SHARD), metavar="SIZE",
        help=f"the weights are cut into files of at most so much ({SHARD})",
    )
    parser.add_argument(
        "--evaluate", action="store_true",
        help="reload it, show held-out loss and a text sample, and put the loss into the card",
    )
    parser.add_argument("--prompt", default="The ", metavar="TEXT", help="what the sample goes on from")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


if __name__ == "__main__":
    start(main)
