"""python -m swarm.chat: talk to an export, a checkpoint, or a live swarm.

    python -m swarm.chat my-model                                       line by line, until Ctrl+D
    python -m swarm.chat my-model --prompt "Once upon a time"           one answer
    python -m swarm.chat --initial-peers /ip4/203.0.113.7/...           a swarm, while it is trained

What you say and what it answers is one text, which it goes on with: /new begins another, Ctrl+C ends an answer. A live
swarm is asked for each token through its peers, with all of the text before it: slow, and nothing is downloaded.
Whoever holds the first or the last fragment sees your text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from swarm.asking.options import add_options, at_least_zero, check_options, positive
from swarm.errors import SwarmError
from swarm.program import guarded, start

if TYPE_CHECKING:
    from swarm.asking.conversation import Conversation
    from swarm.asking.target import Target

MAX_TOKENS = 160
HELP = "/new: forget what was said   /quit (or Ctrl+D): leave   Ctrl+C: end an answer"


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    check_options(parser, options)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    from swarm.asking import target
    from swarm.asking.answerer import chooser
    from swarm.asking.conversation import Conversation

    with _ends_at_once(), target.opened(
        options.target, initial_peers=options.initial_peers, run_id=options.run_id, base=options.base,
        device=options.device, join_timeout_s=options.join_timeout_s, say=say,
    ) as asked:
        choose = chooser(asked.manner, temperature=options.temperature, top_k=options.top_k, seed=options.seed)
        conversation = Conversation(
            asked, choose=choose, max_tokens=options.max_tokens, stop_at_newline=options.stop_at_newline
        )
        if options.prompt is not None:
            answered(conversation, asked, options, options.prompt, goes_on=True)
        else:
            talk(conversation, asked, options)
    return 0


def talk(conversation: Conversation, asked: Target, options: argparse.Namespace) -> None:
    """Line by line, until there are no more."""
    is_person = sys.stdin.isatty()
    if is_person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys in input()
        say(f"This is {asked.what}. {HELP}")
    for line in lines(is_person):
        if line == "/quit":
            return
        if line == "/new":
            conversation.forget()
        elif line.startswith("/"):
            say(HELP)
        elif line:
            try:
                answered(conversation, asked, options, line)
            except SwarmError as error:  # a swarm may answer again in a while
                say(str(error))
            except KeyboardInterrupt:
                if not options.json:
                    print(flush=True)


def lines(is_person: bool) -> Iterator[str]:
    while True:
        try:
            yield input("> " if is_person else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            say("that was not UTF-8 text")


def answered(
    conversation: Conversation, asked: Target, options: argparse.Namespace, line: str, *, goes_on: bool = False
) -> None:
    """Shows the answer as it comes, or all of it as one JSON object."""
    began, text, screen = time.monotonic(), "", Screen()
    for text in conversation.say(line, goes_on=goes_on):
        if not options.json:
            screen.show(text)
    seconds = time.monotonic() - began
    if options.json:
        print(json.dumps({
            **asked.facts, "prompt": line, "text": text, "tokens": len(conversation.ids), "seconds": round(seconds, 2),
        }), flush=True)
        return
    screen.show(text, is_all=True)
    if goes_on:
        say(f"{len(conversation.ids)} tokens in {seconds:.1f} s")


class Screen:
    """Shows a text as it grows. Strangers trained the model, so what it writes could be anything: nothing but plain
    characters gets to the terminal."""

    def __init__(self) -> None:
        self._shown = 0

    def show(self, text: str, *, is_all: bool = False) -> None:
        """`text`: all there is. What may be half a character waits until it is whole."""
        known = text if is_all else text.rstrip("\ufffd")
        new = known[self._shown:].expandtabs()
        self._shown = max(self._shown, len(known))
        print("".join(c if c.isprintable() or c == "\n" else "?" for c in new), end="\n" if is_all else "", flush=True)


@contextlib.contextmanager
def _ends_at_once() -> Iterator[None]:
    """Ctrl+C ends an answer here, SIGTERM the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: Any = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m swarm.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="go on with this text, and leave")
    parser.add_argument("--max-tokens", type=positive, default=MAX_TOKENS, metavar="N", help=f"at most ({MAX_TOKENS})")
    parser.add_argument("--stop-at-newline", action="store_true", help="an answer is one line")
    parser.add_argument("--temperature", type=at_least_zero, default=0.8, metavar="T", help="0: the likeliest (0.8)")
    parser.add_argument("--top-k", type=positive, default=0, metavar="K", help="of so many likeliest tokens (of all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one, another text (0)")
    parser.add_argument("--json", action="store_true", help="print each answer as one JSON object")
    return parser


if __name__ == "__main__":
    start(main)
