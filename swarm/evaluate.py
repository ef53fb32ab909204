"""python -m swarm.evaluate: how good a model is, be it an export, a checkpoint, or a live swarm's as it is now.

    python -m swarm.evaluate my-model                              loss on text that no peer trained on
    python -m swarm.evaluate ~/.swarm --tasks                      and answers to held-out examples of the run's tasks
    python -m swarm.evaluate my-model --raft raft/ --card          RAFT, and the table into the model's card
    python -m swarm.evaluate --initial-peers /ip4/203.0.113.7/...  asked through the peers themselves

Of a live swarm nothing is downloaded, and nobody needs to hold all of it: the text goes from peer to peer as in
training. Peers answer with the weights that they are training, and training comes first: at a busy swarm this takes a
while. The run's held-out text must be on this machine, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from swarm.asking.options import add_options, check_options, positive
from swarm.program import guarded, start

SEQUENCES = 256
EXAMPLES = 100

if TYPE_CHECKING:
    from swarm.asking.target import Target
    from swarm.config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    check_options(parser, options)
    if options.card and options.target is None:
        parser.error("--card writes into an export: give it as TARGET")
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    from swarm.asking import report, target
    from swarm.model import card

    with target.opened(
        options.target, initial_peers=options.initial_peers, run_id=options.run_id, base=options.base,
        device=options.device, join_timeout_s=options.join_timeout_s, say=say,
    ) as asked:
        found = evaluate(asked, options)
    if options.card:
        card.add_evaluation(options.target, report.markdown(found))
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join([f"{asked.what}, {found['seconds']} s", "", *report.lines(found)]))
    return 0


def evaluate(asked: Target, options: argparse.Namespace) -> dict[str, Any]:
    """What --json prints. Raises SwarmError."""
    from swarm.asking import exam, harness, held_out
    from swarm.data import raft, raft_files
    from swarm.errors import ConfigError

    began, tell = time.monotonic(), progress(options.interval)
    warnings: list[str] = []
    found: dict[str, Any] = dict(asked.facts)
    if asked.run is None and options.tasks:
        raise ConfigError(
            "--tasks asks for examples of a run's own tasks", why=f"{asked.what} does not say which run it is from",
            do="give an export of scripts/export.py, or a home folder",
        )
    if options.lm_eval and asked.folder is None:
        raise ConfigError(
            "lm-evaluation-harness needs an export", why="it loads a folder with its own code",
            do="export the model first (scripts/export.py), and give that folder",
        )
    if asked.run is not None and not options.no_held_out:
        batches = held_out.held_out(
            asked.run, asked.tokenizer, vocabulary=asked.vocabulary, objectives=options.objectives,
            sequences=options.sequences,
        )
        losses = held_out.losses(asked.answerer, asked.tokenizer, batches, on_progress=tell)
        found |= held_out.overall(losses)
        found["held_out"] = [dataclasses.asdict(loss) for loss in losses]
    if asked.run is not None and options.tasks:
        examples = held_out_examples(asked.run, most=options.examples)
        found["tasks"] = [dataclasses.asdict(score) for score in exam.ask_tasks(asked, examples, on_progress=tell)]
    if options.raft is not None:
        tasks = raft_files.read_tasks(options.raft, names=options.raft_tasks, say=warnings.append)
        scores = exam.ask_raft(asked, tasks, questions_max=options.questions, on_progress=tell)
        found["raft"] = [dataclasses.asdict(score) for score in scores]
        found["raft_average"] = exam.average(scores)
        warnings += raft_notes(scores, options.questions)
        warnings.append(raft.OVERLAP)
    if options.lm_eval and asked.folder is not None:
        found["lm_eval"] = harness.ask_harness(
            asked.folder, options.lm_eval, limit=options.questions, num_fewshot=options.shots, device=options.device
        )
        if asked.manner.prefix:
            warnings.append("lm-evaluation-harness asks causally; this model was trained to read prompts both ways")
    return found | {"warnings": warnings, "seconds": round(time.monotonic() - began, 2)}


def held_out_examples(run: RunConfig, *, most: int) -> dict[str, list[tuple[str, str]]]:
    """Source of tasks -> (prompt, right answer) of examples that no peer trained on. Raises ConfigError."""
    from swarm.data.held_out import held_out_questions
    from swarm.errors import ConfigError

    found = held_out_questions(run, most=most)
    if not found:
        raise ConfigError(
            f"{run.run_id} has no held-out examples of tasks", why="its sources are plain text, or hold nothing out",
            do="leave out --tasks",
        )
    return {name: [(one.prompt, one.answer) for one in questions] for name, questions in found.items()}


def raft_notes(scores: Sequence[Any], questions: int | None) -> list[str]:
    notes = []
    if questions is not None:
        notes.append(f"only {questions} questions of each trial were asked, HELM asks 40")
    if len(scores) < 11:
        notes.append(f"the average is over {len(scores)} of RAFT's 11 tasks")
    short = sum(score.shortened for score in scores)
    if short:
        notes.append(f"{short} prompts were too long for the model: examples were left out")
    return notes


def progress(interval_s: float) -> Callable[[str, int, int], None]:
    """Says how far it is, at most so often."""
    shown = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > interval_s:
            shown = time.monotonic()
            say(f"{what}: {done} of {total}")

    return tell


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m swarm.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--sequences", type=positive, default=SEQUENCES, metavar="N",
        help=f"of the held-out text of each source, at most ({SEQUENCES})",
    )
    parser.add_argument(
        "--objectives", nargs="+", default=[], metavar="NAME", help="measure these: causal, prefix, ul2 (the run's own)"
    )
    parser.add_argument("--no-held-out", action="store_true", help="leave out the loss on held-out text")
    parser.add_argument("--tasks", action="store_true", help="ask held-out examples of the run's own tasks")
    parser.add_argument(
        "--examples", type=positive, default=EXAMPLES, metavar="N", help=f"of each source of tasks ({EXAMPLES})"
    )
    parser.add_argument(
        "--raft", metavar="FOLDER", help="ask RAFT as HELM does: a folder with its files, or ought/raft for the hub"
    )
    parser.add_argument("--raft-tasks", nargs="+", default=[], metavar="TASK", help="only these of the eleven")
    parser.add_argument("--lm-eval", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness, on an export")
    parser.add_argument("--shots", type=int, metavar="N", help="examples that lm-evaluation-harness shows")
    parser.add_argument(
        "--questions", type=positive, metavar="N", help="only N of each trial of RAFT, or of lm-eval's task, to try it"
    )
    parser.add_argument("--card", action="store_true", help="write the table into the model card of TARGET, an export")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--interval", type=float, default=3.0, metavar="S", help="seconds between two words (3)")
    return parser


if __name__ == "__main__":
    start(main)
