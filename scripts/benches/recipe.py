"""GPT-JT's recipe in small, and whether it is worth it: a swarm of four, two of whom hold half of the model each.

gpt-jt-small (peers/runs) from cold to its end, on data of scripts/make_small_data.py: UL2, then prefix-LM on tasks.
Then the same with causal phases only: same tokens, mixture, seeds and peers. Both, and the start, are asked examples of
the tasks that no peer trained on, each in the manner that its last phase taught it. Losses under an objective say more
of a model that learnt under it. Bytes are what the peers say they sent, all included; against them stands data
parallelism in bf16, as in benches/traffic.py. All is done by the programs that people use, in a temporary folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from local_swarm import LocalPeer, LocalSwarm, agree, environment
from make_small_data import FOLDER, TEXT_BYTES, write

from benches import table as tables
from benches.traffic import ddp_bytes_per_token, parameters_of
from swarm.config import RunConfig, canonical_json, load_run
from swarm.errors import SwarmError
from swarm.host.presets import preset_path
from swarm.train import checkpoint, run_source
from swarm.units import format_bytes

NAME = "recipe"
HELP = "GPT-JT's recipe in small, in a swarm with partial holders, against causal training only"

PARTS = ("0:4", "0:4", "0:2", "2:4")
"""fragments of each peer"""
START, RECIPE, CAUSAL = "start", "recipe", "causal only"
RUN_FILE = "gpt-jt-small.yaml"
QUICK_TOKENS, QUICK_TEXT_BYTES = 40_000, 400_000
READY_S, ASK_S = 600.0, 1800.0
SAID_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, metavar="N", help="swarm tokens of each run (the run config's)")
    parser.add_argument("--examples", type=int, default=200, help="questions of each source of tasks (200)")
    parser.add_argument("--sequences", type=int, default=64, help="held-out rows of each source (64)")
    parser.add_argument("--limit", type=float, default=2400.0, metavar="S", help="of one run, seconds (2400)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.tokens = options.tokens or QUICK_TOKENS
        options.examples, options.sequences = min(options.examples, 6), min(options.sequences, 8)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="swarm-recipe-") as name:
        folder = Path(name)
        write(folder / FOLDER, text_bytes=QUICK_TEXT_BYTES if options.quick else TEXT_BYTES)
        document = yaml.safe_load(preset_path(f"runs/{RUN_FILE}").read_text(encoding="utf-8"))
        document = with_tokens(document, options.tokens or document["train"]["total_tokens"])
        documents = {RECIPE: document, CAUSAL: causal_only(document)}
        for number, (label, made) in enumerate(documents.items()):
            home = folder / f"run-{number}"
            found[label] = _train(home, folder, made, label, options)
            found[label]["evaluation"] = _ask(home / "peer-0", folder, options, objectives(documents.values()))
            say(f"{label}: {accuracies(found[label]['evaluation'])}")
        run = load_run(folder / "run-0" / RUN_FILE)
        write_start(run, folder / START)
        starts = _ask(folder / START, folder, options, objectives(documents.values()))
        parameters = parameters_of(run)
    return {
        "tokens": run.train.total_tokens, "parameters": parameters, "parts": list(PARTS), "start": starts,
        "ddp_bytes_per_token": ddp_bytes_per_token(run, parameters, len(PARTS)), "runs": found,
    }


def with_tokens(document: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The run made shorter or longer: phases and warm-up keep their shares of it."""
    scale = tokens / document["train"]["total_tokens"]
    train = document["train"] | {
        "total_tokens": tokens, "warmup_tokens": round(document["train"]["warmup_tokens"] * scale),
    }
    phases = [phase | ({"tokens": round(phase["tokens"] * scale)} if "tokens" in phase else {})
              for phase in document["phases"]]
    return {**document, "train": train, "phases": phases}


def causal_only(document: Mapping[str, Any]) -> dict[str, Any]:
    """The ablation: every phase causal, everything else as it was."""
    return {**document, "phases": [phase | {"objective": "causal"} for phase in document["phases"]]}


def objectives(documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """All that their last phases have: what the tasks are learnt under. In order, each once."""
    return list(dict.fromkeys(document["phases"][-1]["objective"] for document in documents))


def write_start(run: RunConfig, folder: Path) -> None:
    """The run at version 0 as a folder with a checkpoint, which `swarm.evaluate` reads."""
    states = list(run_source.hold(run).states.values())
    checkpoint.write(folder / "checkpoints", checkpoint.Checkpoint(states), num_fragments=run.fragments)
    digests = [state.digest for state in states]
    (folder / "run.json").write_bytes(canonical_json(dataclasses.replace(run, initial_digests=digests)))


def _train(
    home: Path, folder: Path, document: Mapping[str, Any], label: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One run by a swarm of its own, whose peers are started in `folder`, until all of them have left."""
    home.mkdir()
    file = home / RUN_FILE
    file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    until = document["train"]["total_tokens"]
    with LocalSwarm(home, folder=folder) as swarm:
        began = shown = time.monotonic()
        ways = ["--new-swarm", "--run", str(file)]
        for number, part in enumerate(PARTS):
            peer = swarm.start_peer(*ways, "--fragments", part, "--device", "cpu", "--until-tokens", str(until))
            if number == 0:
                swarm.wait_for(lambda: "ready" in swarm.peers[0].newest, timeout_s=READY_S, what="the first peer")
                ways = ["--initial-peers", *peer.last("ready", "maddrs")]
        while swarm.running():
            swarm.wait_for(lambda: swarm.pump() or not swarm.running(), timeout_s=60.0, what="a word from the peers")
            now = time.monotonic()
            if now - shown > SAID_S:
                shown = now
                say(f"{label}: {now - began:.0f} s, {said(swarm.peers)}")
            if now - began > options.limit:
                raise SwarmError(
                    f"{label}: the swarm did not train {until:,} tokens in {options.limit:.0f} s",
                    why=said(swarm.peers), do="give a longer --limit, or less --tokens",
                )
        while swarm.pump():
            pass
        return outcome(swarm.peers, seconds=time.monotonic() - began)


def said(peers: Sequence[LocalPeer]) -> str:
    """How far they are, in a line."""
    losses = ", ".join(f"{peer.last('progress', 'loss', None) or float('nan'):.2f}" for peer in peers)
    tokens = max(peer.last("progress", "swarm_tokens") for peer in peers)
    return f"{tokens:,} tokens, losses {losses}"


def outcome(peers: Sequence[LocalPeer], *, seconds: float) -> dict[str, Any]:
    """What a swarm says of itself once all have left."""
    tokens = max(peer.last("progress", "swarm_tokens") for peer in peers)
    return {
        "tokens": tokens, "seconds": round(seconds, 1), "tokens_per_s": round(tokens / seconds),
        "trained": [peer.last("progress", "tokens") for peer in peers],
        "bytes_sent": [peer.last("progress", "bytes_sent") for peer in peers],
        "rounds": max((version for peer in peers for version, _ in peer.heads.values()), default=0),
        "digests_agree": agree(list(peers)),
        "left": [peer.last("left", "reason", None) for peer in peers],
        "warnings": [f"peer {peer.number}: {text}" for peer in peers for text in peer.warnings],
    }


def _ask(target: Path, folder: Path, options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What `swarm.evaluate --json` says of a home or a checkpoint."""
    text = output_of([
        sys.executable, "-m", "swarm.evaluate", str(target), "--tasks", "--json", "--device", "cpu", "--objectives",
        *names, "--examples", str(options.examples), "--sequences", str(options.sequences),
    ], folder, timeout_s=ASK_S)
    answers: dict[str, Any] = json.loads(text)
    return answers


def output_of(command: list[str], folder: Path, *, timeout_s: float) -> str:
    """Of a program that is started in `folder`. Raises SwarmError where it fails or takes longer."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        why, do = f"it took more than {timeout_s:.0f} s", "ask less: --examples, --sequences"
        raise SwarmError("the model was not evaluated", why=why, do=do) from None
    if done.returncode:
        raise SwarmError("the model was not evaluated", why=done.stderr.strip()[-2000:], do="see what it says")
    return done.stdout


def accuracies(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Source of tasks -> percent of the answers that are right; "all": each question counting the same."""
    scores = evaluation["tasks"]
    found = {score["name"]: 100 * score["quasi_exact_match"] for score in scores}
    right = sum(score["quasi_exact_match"] * score["questions"] for score in scores)
    found["all"] = 100 * right / sum(score["questions"] for score in scores)
    return {name: round(percent, 1) for name, percent in found.items()}


def table(result: Mapping[str, Any]) -> str:
    runs = result["runs"]
    evaluations = {START: result["start"]} | {label: run["evaluation"] for label, run in runs.items()}
    rows = [
        [f"{name}: right answers, %", *(f"{accuracies(found)[name]:.1f}" for found in evaluations.values())]
        for name in accuracies(result["start"])
    ]
    for loss in result["start"]["held_out"]:
        which = (loss["source"], loss["objective"])
        rows.append([f"{which[0]}: loss under {which[1]}, nats a token",
                     *(f"{nats_per_token(found, which):.3f}" for found in evaluations.values())])
    questions = ", ".join(f"{score['name']} {score['questions']}" for score in result["start"]["tasks"])
    ddp = result["ddp_bytes_per_token"]
    sent = [[part, *(f"{format_bytes(run['bytes_sent'][number])}, {run['trained'][number]:,}" for run in runs.values())]
            for number, part in enumerate(result["parts"])]
    lines = [tables.markdown(["held out", *evaluations], rows), "", f"questions: {questions}", ""]
    lines += [tables.markdown(["fragments of the peer", *(f"{label}: sent, tokens trained" for label in runs)], sent)]
    for label, run in runs.items():
        per_token = sum(run["bytes_sent"]) / len(run["bytes_sent"]) / max(1, run["tokens"])
        times = f"{ddp / per_token:.1f} times less than" if per_token else "nothing against"
        agreed = "all digests agree" if run["digests_agree"] else "digests DISAGREE"
        lines += ["", f"{label}: {run['tokens']:,} tokens in {run['seconds']:.0f} s ({run['tokens_per_s']:,} a second),"
                      f" {run['rounds']} rounds, {agreed}; a peer sent {per_token:.1f} bytes a token, {times} the"
                      f" {ddp:,.0f} of bf16 DDP"]
        lines += [f"  warning: {text}" for text in run["warnings"]]
    return "\n".join(lines)


def nats_per_token(evaluation: Mapping[str, Any], which: tuple[str, str]) -> float:
    """Of a source under an objective; nan where it was not measured."""
    return next((float(loss["nats_per_token"]) for loss in evaluation["held_out"]
                 if (loss["source"], loss["objective"]) == which), float("nan"))


def say(text: str) -> None:
    print(f"  {text}", flush=True)
