#!/usr/bin/env python3
"""How good a swarm's model is now: its loss on text that no peer trains on, asked through the peers themselves.

    scripts/evaluate.py --initial-peers /ip4/203.0.113.7/...

Nothing of the model is downloaded and nobody needs to hold all of it: the text goes from peer to peer as in training.
The peers answer with the weights that they are training, and training comes first: at a busy swarm this takes a while.
The run's text must be on this machine, too. Joins as an observer, which peers do not count.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import export
from entry import guarded, start


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    result = evaluate(options)
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{result['run_id']}: {result['sequences']} sequences, {result['tokens']:,} tokens, {result['seconds']} s")
    print(f"held-out loss {result['nats_per_byte']:.4f} nats a byte, {result['nats_per_token']:.4f} nats a token")
    print(f"perplexity {result['perplexity']:.2f}")
    return 0


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """What --json prints. Raises SwarmError."""
    from swarm.data.tokenizer import load_tokenizer, text_bytes
    from swarm.evaluate import Asker
    from swarm.model.evaluate import perplexity
    from swarm.observer import Observer

    with Observer(options.initial_peers, run_id=options.run_id, join_timeout_s=options.join_timeout_s) as observer:
        config = observer.run
        tokenizer = load_tokenizer(config)
        sequences = export.held_out_sequences(config, tokenizer).part(slice(options.sequences))
        asker = Asker(observer)
        began = shown = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown > options.interval:
                shown = time.monotonic()
                export.say(f"{done} of {total} sequences")

        loss = asker.loss(sequences, on_progress=tell)
    num_bytes = sum(text_bytes(tokenizer, sequence[1:].tolist()) for sequence in sequences.tokens)
    return {
        "run_id": config.run_id,
        "nats_per_token": loss,
        "nats_per_byte": loss * sequences.num_targets / max(1, num_bytes),
        "perplexity": perplexity(loss),
        "sequences": len(sequences),
        "tokens": sequences.num_targets,
        "seconds": round(time.monotonic() - began, 2),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="MADDR", help="peers: from the join line")
    parser.add_argument("--run-id", metavar="ID", help="which run, where several share one network")
    parser.add_argument(
        "--sequences", type=positive, default=export.HELD_OUT_SEQUENCES, metavar="N",
        help=f"at most so many of the held-out text ({export.HELD_OUT_SEQUENCES})",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--interval", type=float, default=3.0, metavar="S", help="seconds between two words (3)")
    parser.add_argument(
        "--join-timeout-s", type=float, default=20.0, metavar="S", help="give up joining after this long (20)"
    )
    return parser


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    start(main)
