#!/usr/bin/env python3
"""Write a swarm's model as a plain Hugging Face folder, from a live swarm or from a peer's home folder.

    scripts/export.py my-model --home ~/.swarm                       the newest checkpoint; the peer may run or not
    scripts/export.py my-model --initial-peers /ip4/203.0.113.7/...  downloaded and checked as a newcomer does

AutoModelForCausalLM.from_pretrained("my-model") then loads it without any code of ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entry import guarded, start

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from swarm.averaging.global_state import GlobalState
    from swarm.config import RunConfig
    from swarm.data.batch import Batch
    from swarm.train.run_source import Held

HELD_OUT_SEQUENCES = 256
SAMPLE_TOKENS = 160


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    from swarm.model.export import check_replaceable

    check_replaceable(options.out.expanduser().resolve())
    if options.initial_peers:
        config, held, states = from_swarm(
            options.initial_peers, run_id=options.run_id, say=say, join_timeout_s=options.join_timeout_s
        )
    else:
        config, held, states = from_home(options.home, run_id=options.run_id, say=say)
    result = write(config, held, states, options.out)
    if not options.json:
        versions = ", ".join(map(str, result["versions"]))
        print(f"{result['run_id']}: {result['tokens']:,} tokens, versions {versions}, written to {result['folder']}")
    if options.evaluate:
        model, tokenizer = reload(options.out)
        result["held_out_loss"] = round(held_out_loss(config, model, tokenizer), 4)
        result["sample"] = sample(model, tokenizer, options.prompt)
        if not options.json:
            print(f"held-out loss {result['held_out_loss']:.3f} nats a token")
            print("\n".join(quoted(options.prompt + result["sample"])))
    if options.json:
        print(json.dumps(result))
    return 0


def from_home(
    path: Path, *, run_id: str | None = None, say: Callable[[str], None]
) -> tuple[RunConfig, Held, list[GlobalState]]:
    """The newest whole checkpoint in a home folder. `say` gets what a person should know. Raises SwarmError."""
    from swarm.errors import HomeError, StateError
    from swarm.host.home import Home
    from swarm.train import checkpoint, run_source

    home = Home.open(path, exclusive=False)
    if run_id is None and home.last_run_id is None:
        raise HomeError(
            f"there is no run in {home.path}", why="no peer with this home folder has started or joined one",
            do="give the --home of a peer that has, or --initial-peers to export from a live swarm",
        )
    config = run_source.remembered(home, run_id)
    held = run_source.hold(config)
    folder = home.run_folder(config.run_id) / "checkpoints"
    saved = checkpoint.load_newest(
        folder, numels={index: layout.numel for index, layout in held.layouts.items()}, num_fragments=config.fragments,
        num_buffers=len(held.states[0].buffers), warn=say,
    )
    if saved is None:
        raise StateError(
            f"there is no checkpoint of {config.run_id} in {folder}",
            why="a peer writes one each minute and when it leaves",
            do="wait for the first one, or export from the live swarm with --initial-peers",
        )
    if len(saved.states) < config.fragments:
        raise StateError(
            f"the newest checkpoint in {folder} is not the whole model",
            why=f"that peer holds {len(saved.states)} of its {config.fragments} fragments; others hold the rest",
            do="export from the live swarm with --initial-peers",
        )
    return config, held, saved.states


def from_swarm(
    initial_peers: list[str], *, run_id: str | None = None, say: Callable[[str], None], join_timeout_s: float = 20.0
) -> tuple[RunConfig, Held, list[GlobalState]]:
    """Every fragment at its newest attested version, from the peers that hold it. Raises SwarmError."""
    from swarm.observer import Observer
    from swarm.train import run_source

    with Observer(initial_peers, run_id=run_id, join_timeout_s=join_timeout_s) as observer:
        held = run_source.hold(observer.run)
        observer.ask_everybody()
        states = []
        for index, layout in held.layouts.items():
            say(f"fragment {index + 1} of {len(held.layouts)}")
            num_buffers = len(held.states[index].buffers)
            states.append(observer.fetch(index, numel=layout.numel, num_buffers=num_buffers))
        for note in observer.notes:
            say(note)
        return observer.run, held, states


def write(config: RunConfig, held: Held, states: list[GlobalState], out: Path) -> dict[str, Any]:
    """Write the model with these global weights to `out`; returns what it is. Raises ConfigError or HomeError."""
    from swarm.data.tokenizer import load_tokenizer
    from swarm.model.export import export
    from swarm.train import run_source

    run_source.load_states(held, states)
    export(held.model, load_tokenizer(config), out)
    return {
        "run_id": config.run_id,
        "tokens": min(state.tokens for state in states),
        "versions": [state.version for state in states],
        "digests": [state.digest for state in states],
        "folder": str(out.expanduser().resolve()),
    }


def reload(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As anybody would load it, without any code of ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(folder.expanduser())
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def held_out_loss(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Nats a token on text that no peer of the run trains on."""
    from swarm.model import evaluate

    return evaluate.held_out_loss(model, held_out_sequences(config, tokenizer))


def held_out_sequences(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Rows of the run's sequence_length, the same ones on each machine that has the same text."""
    from swarm.data.sources import documents
    from swarm.data.stream import held_out_batches, tokenise

    tokens = tokenise(documents(config.data)[1], tokenizer)
    return held_out_batches(
        tokens, sequence_length=config.train.sequence_length, num_sequences_max=HELD_OUT_SEQUENCES
    )


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    from swarm.model.evaluate import sample_text

    return sample_text(model, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS)


def quoted(text: str) -> list[str]:
    """Lines for a terminal: strangers trained the model, so what it writes could be anything."""
    from swarm.units import printable

    return [f"  | {printable(line.expandtabs(), max_chars=110)}".rstrip() for line in text.rstrip().splitlines()]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write: a new one, an empty one, or an earlier export")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--home", type=Path, metavar="DIR", help="home folder of a peer, running or stopped")
    source.add_argument("--initial-peers", nargs="+", metavar="MADDR", help="peers of a live swarm: from a join line")
    parser.add_argument("--run-id", metavar="ID", help="which run, where there are several")
    parser.add_argument(
        "--join-timeout-s", type=float, default=20.0, metavar="S", help="give up joining after this long (20)"
    )
    parser.add_argument("--evaluate", action="store_true", help="reload it and show held-out loss and a text sample")
    parser.add_argument("--prompt", default="The ", metavar="TEXT", help="what the sample goes on from")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


if __name__ == "__main__":
    start(main)
