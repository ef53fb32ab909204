#!/usr/bin/env python3
"""Let a swarm's model write, now, while it is trained and wherever its parts are.

    scripts/generate.py "Once upon a time" --initial-peers /ip4/203.0.113.7/...

Each token is asked for through the peers, with all of the text before it (as much as a training sequence has), so it is
slow, and nothing is downloaded; for more than a taste, export the model (scripts/export.py). Whoever holds the first or
the last fragment sees your text. Joins as an observer, which peers do not count.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import export
from entry import guarded, start
from evaluate import positive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    from swarm.data.tokenizer import load_tokenizer
    from swarm.observer import Observer

    with Observer(options.initial_peers, run_id=options.run_id, join_timeout_s=options.join_timeout_s) as observer:
        tokenizer = load_tokenizer(observer.run)
        began, ids = time.monotonic(), []
        lines = Lines(options.prompt)
        for token in tokens(options, observer, tokenizer):
            ids.append(token)
            if not options.json:
                lines.show(text_of(tokenizer, ids))
        text, seconds = text_of(tokenizer, ids), time.monotonic() - began
        if options.json:
            print(json.dumps({
                "run_id": observer.run.run_id, "prompt": options.prompt, "text": text, "tokens": len(ids),
                "seconds": round(seconds, 2),
            }))
        else:
            lines.show(text, is_all=True)
            export.say(f"{len(ids)} tokens in {seconds:.1f} s")
    return 0


def tokens(options: argparse.Namespace, observer: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """What the swarm writes after the prompt, as it comes. Raises SwarmError."""
    import torch

    from swarm.evaluate import Asker
    from swarm.model.evaluate import next_token

    dice = torch.Generator().manual_seed(options.seed)

    def choose(logits: torch.Tensor) -> int:
        return next_token(
            logits, temperature=options.temperature, top_k=options.top_k, num_tokens=len(tokenizer), generator=dice
        )

    end: Any = tokenizer.eos_token_id
    ids: list[int] = tokenizer.encode(options.prompt, add_special_tokens=False) or [end]
    yield from Asker(observer).write(ids, choose=choose, end=end, max_tokens=options.max_tokens)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


class Lines:
    """Shows a text line by line, as it grows."""

    def __init__(self, prompt: str) -> None:
        self._prompt, self._shown = prompt, 0

    def show(self, text: str, *, is_all: bool = False) -> None:
        """`text`: what has come after the prompt. The last line waits until it is whole."""
        lines = (self._prompt + text).split("\n")
        for line in lines[self._shown:None if is_all else -1]:
            print("\n".join(export.quoted(line)) or "  |", flush=True)
            self._shown += 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="what it goes on from")
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="MADDR", help="peers: from the join line")
    parser.add_argument("--run-id", metavar="ID", help="which run, where several share one network")
    parser.add_argument("--max-tokens", type=positive, default=export.SAMPLE_TOKENS, metavar="N", help="at most")
    parser.add_argument("--temperature", type=at_least_zero, default=0.8, metavar="T", help="0: the likeliest (0.8)")
    parser.add_argument("--top-k", type=positive, default=0, metavar="K", help="of so many likeliest tokens (of all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one, another text (0)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument(
        "--join-timeout-s", type=float, default=20.0, metavar="S", help="give up joining after this long (20)"
    )
    return parser


def at_least_zero(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


if __name__ == "__main__":
    start(main)
