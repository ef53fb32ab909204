#!/usr/bin/env python3
"""See it work: three peers on this machine train a small GPT-J together, then the model is exported and tried.

The peers are real ones (`python -m swarm.peer`), and the first is open to others. The run ends by itself after about
two minutes on two idle cores, or earlier with Ctrl+C. Everything is in one folder, made afresh each time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import export
from entry import guarded, start
from local_swarm import LocalPeer, LocalSwarm, summary

START_S = 180.0
QUIET_S = 120.0
"""no peer has said anything for this long: something is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    return guarded(lambda: quickstart(options))


def quickstart(options: argparse.Namespace) -> int:
    from swarm.config import load_run
    from swarm.host.home import Home
    from swarm.host.presets import preset_path

    root: Path = options.home.expanduser().absolute()
    run = load_run(options.run or preset_path("runs/demo.yaml"))
    total = run.train.total_tokens
    print(f"{options.peers} peers on this machine are going to train the run {run.name!r} together, {total:,} tokens.")
    print("Each is a process with one thread. Ctrl+C ends it early. Everything it writes is in:", flush=True)
    print(f"  {root}\n", flush=True)
    with Home.open(root):  # its lock: a second quickstart in this folder would delete what this one writes
        for old in sorted(root.glob("peer-*")):
            Home.open(old).close()  # HomeError: a peer of an earlier quickstart is still running there
            shutil.rmtree(old)
        clock = Clock()
        with LocalSwarm(root, threads=1) as swarm:
            try:
                agree = train(swarm, options, clock, total)
            except KeyboardInterrupt:
                clock.say("stopping: the peers finish their round (Ctrl+C again: at once)")
                with contextlib.suppress(SystemExit):
                    swarm.finish()
                print("stopped before the end; the same command starts afresh")
                return 130
            except SystemExit as failure:  # of LocalSwarm: a peer ended with an error, or nothing happened for long
                print(f"\nthe quickstart failed: {failure}", file=sys.stderr)
                print("try again; if it fails again, please report the lines above", file=sys.stderr)
                return 1
        clock.say("exporting the model and trying it")
        result(root, max(swarm.peers, key=lambda peer: int(peer.last("progress", "swarm_tokens"))))
        print("\nA friend could have joined while it ran, with the line:\n")
        print(f"  {swarm.peers[0].last('ready', 'join')}\n")
        print("To start a run that stays: python -m swarm.peer --new-swarm    (README.md tells the rest)")
    return 0 if agree else 1


def train(swarm: LocalSwarm, options: argparse.Namespace, clock: Clock, total: int) -> bool:
    """From the first peer's start to the last one's end; returns whether all ended with the same weights."""
    until = min(total, options.until_tokens or total)
    run = ["--run", str(options.run)] if options.run else []
    ends = ["--until-tokens", str(until)]
    # the first also listens beyond this machine, so that the line to send to a friend is a real one
    clock.say("starting")
    first = swarm.start_peer("--new-swarm", *run, *ends, "--name", "peer-1", "--listen", "/ip4/0.0.0.0/tcp/0")
    importlib.import_module("swarm.model.export")  # takes seconds, and the peer needs them too

    swarm.wait_for(lambda: "ready" in first.newest, timeout_s=START_S, what="the first peer to start")
    clock.say(f"peer 1 has started the run {first.last('ready', 'run_id')}")
    for number in range(2, options.peers + 1):
        swarm.start_peer("--initial-peers", *first.last("ready", "maddrs"), *ends, "--name", f"peer-{number}")
    swarm.wait_for(
        lambda: all("ready" in peer.newest or peer.process.poll() == 0 for peer in swarm.peers),
        timeout_s=START_S, what="the other peers to join",
    )
    if options.peers > 1:
        clock.say(f"{options.peers - 1} more joined through it, and so can others while it runs")
    deadline, shown = time.monotonic() + options.max_seconds, 0.0
    while swarm.running() and time.monotonic() < deadline:
        swarm.wait_for(lambda: swarm.pump() or not swarm.running(), timeout_s=QUIET_S, what="any news of the peers")
        if time.monotonic() - shown >= options.interval and any("progress" in p.newest for p in swarm.running()):
            shown = time.monotonic()
            clock.say(progress(swarm, until))
    if swarm.running():
        clock.say(f"{options.max_seconds:.0f} s have passed: the peers finish their round")
    swarm.finish()
    ended = summary(swarm, 0.0)
    clock.say(f"done: {ended['tokens']:,} tokens in {sum(ended['versions'])} rounds")
    if not ended["digests_agree"]:
        print("warning: the peers ended with different weights; please report this", file=sys.stderr)
    return bool(ended["digests_agree"])


def progress(swarm: LocalSwarm, until: int) -> str:
    from swarm.units import format_count, format_seconds

    peers = [peer for peer in swarm.running() if "progress" in peer.newest]
    tokens = max(int(peer.last("progress", "swarm_tokens")) for peer in peers)
    speed = max(float(peer.last("progress", "tokens_per_s")) for peer in peers)
    loss = sum(float(peer.last("progress", "loss")) for peer in peers) / len(peers)
    left = format_seconds(max(0, until - tokens) / speed) if speed and tokens else "?"
    return (
        f"{len(swarm.running())} peers   {tokens:>9,} of {until:,} tokens   {format_count(speed):>5} tok/s"
        f"   loss {loss:.3f}   {left} left"
    )


def result(root: Path, peer: LocalPeer) -> None:
    """Export the peer's checkpoint, load it as anybody would, compare it with the untrained model, let it write."""
    from swarm.asking import states
    from swarm.data.tokenizer import load_tokenizer
    from swarm.train.trainer import limit_threads

    limit_threads(1)  # on a busy machine torch's threads mostly wait for each other: measured 20 s instead of 136 s
    found = states.from_home(peer.home, say=export.say)
    run = found.run
    before = export.held_out_loss(run, found.held.model, load_tokenizer(run))
    export.write(found, root / "model")
    model, tokenizer = export.reload(root / "model")
    after = export.held_out_loss(run, model, tokenizer)
    unit = "nats a byte" if run.tokenizer == "bytes" else "nats a token"
    print(f"\nThe model is in {root / 'model'}")
    print("Loaded from there with AutoModelForCausalLM and AutoTokenizer, its loss on text that no peer trained on:\n")
    print(f"  before training   {before:.3f} {unit}")
    print(f"  after training    {after:.3f} {unit}\n")
    prompt = "def "
    print(f"A sample of what it writes, after {prompt.strip()!r}:\n")
    print("\n".join(export.quoted(prompt + export.sample(model, tokenizer, prompt))))


class Clock:
    """Lines that begin with the time since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        seconds = int(time.monotonic() - self._began)
        print(f"{seconds // 60:>3}:{seconds % 60:02d}  {text}", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    home = Path(os.environ.get("SWARM_HOME", "").strip() or "~/.swarm") / "quickstart"
    parser.add_argument("--home", type=Path, default=home, metavar="DIR", help=f"where everything goes ({home})")
    parser.add_argument("--peers", type=int, choices=range(1, 17), default=3, metavar="N", help="how many (3)")
    parser.add_argument("--run", type=Path, metavar="FILE", help="run config (the demo run)")
    parser.add_argument("--until-tokens", type=int, metavar="N", help="end after N tokens (those of the run)")
    parser.add_argument("--max-seconds", type=float, default=300.0, metavar="S", help="train at most this long (300)")
    parser.add_argument("--interval", type=float, default=4.0, metavar="S", help="seconds between two lines (4)")
    return parser


if __name__ == "__main__":
    start(main)
