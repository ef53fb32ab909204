#!/usr/bin/env python3
"""A swarm of N real peers on this machine: one command to watch it, test it, or measure it.

Every peer is a process of its own (`python -m swarm.peer --ui json`) with its own home folder; the first starts the
run and the others join it, as friends would. Ends when the run is complete, at --until-tokens, or with Ctrl+C.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_S = 120.0
LEAVE_S = 120.0
TELL_S = 5.0
"""for a peer to write down where its threads are"""
PR_SET_PDEATHSIG = 1


@dataclass
class LocalPeer:
    """One peer process and the newest of its events."""

    number: int
    home: Path
    process: subprocess.Popen[str]
    newest: dict[str, dict[str, Any]] = field(default_factory=dict)
    heads: dict[int, tuple[int, str]] = field(default_factory=dict)
    """fragment -> (version, digest)"""
    digests: dict[tuple[int, int], str] = field(default_factory=dict)
    """(fragment, version) -> digest, of all rounds it applied"""
    warnings: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)

    def hear(self, event: dict[str, Any]) -> None:
        self.newest[event["event"]] = event
        if event["event"] == "round":
            self.heads[event["fragment"]] = (event["version"], event["digest"])
            self.digests[event["fragment"], event["version"]] = event["digest"]
        elif event["event"] == "warning":
            self.warnings.append(event["text"])

    def last(self, kind: str, key: str, default: Any = 0) -> Any:
        return self.newest.get(kind, {}).get(key, default)


class LocalSwarm:
    """Starts peers, collects their events. A context manager: none of them survives it."""

    def __init__(self, home: Path, *, threads: int = 1, folder: Path | None = None,
                 on_event: Callable[[LocalPeer, dict[str, Any]], None] = lambda peer, event: None) -> None:
        """`folder`: where the peers are started, from which the paths in a run file count (default: here)."""
        self.home, self.threads, self.folder, self.on_event = home, threads, folder, on_event
        self.peers: list[LocalPeer] = []
        self._events: queue.Queue[tuple[LocalPeer, dict[str, Any]]] = queue.Queue()

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.peers:
            if peer.process.poll() is None:
                peer.process.kill()
        for peer in self.peers:
            peer.process.wait()

    def start_peer(self, *arguments: str, number: int | None = None) -> LocalPeer:
        """Start a peer; `number` of an earlier one gives it that one's home folder."""
        number = len(self.peers) if number is None else number
        home = self.home / f"peer-{number}"
        process = self._launch([
            "--ui", "json", "--home", str(home), "--listen", "/ip4/127.0.0.1/tcp/0", "--threads", str(self.threads),
            *arguments,
        ])
        peer = LocalPeer(number, home, process)
        self.peers.append(peer)
        threading.Thread(target=self._read, args=(peer,), daemon=True).start()
        threading.Thread(target=self._read_errors, args=(peer,), daemon=True).start()
        return peer

    def _launch(self, arguments: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "swarm.peer", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, preexec_fn=finish_with_parent, cwd=self.folder, env=environment(),
        )

    def pump(self, *, timeout_s: float = 0.2) -> bool:
        """Handle events for at most `timeout_s`; False when none came."""
        try:
            peer, event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return False
        while True:
            peer.hear(event)
            self.on_event(peer, event)
            try:
                peer, event = self._events.get_nowait()
            except queue.Empty:
                return True

    def wait_for(self, condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.pump()
            for peer in self.peers:
                if peer.process.poll() not in (None, 0, -signal.SIGKILL):
                    raise SystemExit(f"peer {peer.number} ended with an error:\n" + "".join(peer.stderr[-30:]))
            if time.monotonic() > deadline:
                raise SystemExit(f"waited {timeout_s:.0f} s in vain for {what}\n{self._where_they_are()}")

    def _where_they_are(self) -> str:
        """What each peer last said, and in which line every thread of those that are left is."""
        asked = [peer for peer in self.running() if "ready" in peer.newest]  # before, the signal would end the peer
        for peer in asked:
            peer.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + TELL_S
        while time.monotonic() < deadline and not all("swarm/peer.py" in "".join(peer.stderr) for peer in asked):
            time.sleep(0.1)
        time.sleep(1.0 if asked else 0.0)  # the main thread comes last, and a thread of ours has to read it
        return "\n".join(
            f"peer {peer.number}, exit code {peer.process.poll()}, last heard of: {', '.join(peer.newest)}\n"
            + "".join(peer.stderr) for peer in self.peers
        )

    def running(self) -> list[LocalPeer]:
        return [peer for peer in self.peers if peer.process.poll() is None]

    def finish(self) -> None:
        """Ask all to finish and wait until they have."""
        for peer in self.running():
            peer.process.send_signal(signal.SIGTERM)
        self.wait_for(lambda: not self.running(), timeout_s=LEAVE_S, what="the peers to leave")
        while self.pump():
            pass

    def _read(self, peer: LocalPeer) -> None:
        assert peer.process.stdout is not None
        for line in peer.process.stdout:
            with contextlib.suppress(ValueError):
                self._events.put((peer, json.loads(line)))

    def _read_errors(self, peer: LocalPeer) -> None:
        assert peer.process.stderr is not None
        for line in peer.process.stderr:
            peer.stderr.append(line)
            del peer.stderr[:-200]


def environment() -> dict[str, str]:
    """In which `python -m swarm...` is the one beside this script, in whatever folder it is started."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def finish_with_parent() -> None:
    """In a peer, before it starts: should this script be killed, the peer finishes as after Ctrl+C (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def summary(swarm: LocalSwarm, seconds: float) -> dict[str, Any]:
    """What a script wants to know of a swarm that has ended."""
    fragments = sorted({fragment for peer in swarm.peers for fragment in peer.heads})
    newest = [max((p.heads[f] for p in swarm.peers if f in p.heads), default=(0, "")) for f in fragments]
    return {
        "run_id": swarm.peers[0].last("ready", "run_id", ""),
        "peers": len(swarm.peers),
        "tokens": max(peer.last("progress", "swarm_tokens") for peer in swarm.peers),
        "trained": sum(peer.last("progress", "tokens") for peer in swarm.peers),
        "seconds": round(seconds, 1),
        "loss": swarm.peers[0].last("progress", "loss", None),
        "versions": [version for version, _ in newest],
        "digests": [digest for _, digest in newest],
        "digests_agree": agree(swarm.peers),
        "bytes_sent": [peer.last("progress", "bytes_sent") for peer in swarm.peers],
        "left": [peer.last("left", "reason", None) for peer in swarm.peers],
        "warnings": [warning for peer in swarm.peers for warning in peer.warnings],
        "homes": [str(peer.home) for peer in swarm.peers],
    }


def agree(peers: list[LocalPeer]) -> bool:
    """Whenever two of them applied the same version of a fragment, they came to the same digest."""
    keys = {key for peer in peers for key in peer.digests}
    return all(len({peer.digests[key] for peer in peers if key in peer.digests}) == 1 for key in keys)


def line(swarm: LocalSwarm, began: float) -> str:
    losses = [peer.last("progress", "loss", None) for peer in swarm.running()]
    known = [loss for loss in losses if loss is not None]
    first = max(swarm.peers, key=lambda peer: int(peer.last("progress", "swarm_tokens")))
    return (
        f"{time.monotonic() - began:5.0f} s  {len(swarm.running())} peers"
        f"  loss {sum(known) / len(known) if known else float('nan'):.3f}"
        f"  tokens {first.last('progress', 'swarm_tokens'):>9,}"
        f"  {first.last('progress', 'tokens_per_s'):>7,.0f} tok/s"
        f"  round {max(first.last('progress', 'versions', [0]) or [0]):>3}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.peers < 1:
        parser.error("--peers must be at least 1")
    with contextlib.ExitStack() as stack:
        home = options.home or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-")))
        swarm = stack.enter_context(LocalSwarm(home, threads=options.threads))
        try:
            run(swarm, options)
        except KeyboardInterrupt:
            swarm.finish()
        result = summary(swarm, time.monotonic() - options.began)
    if options.json:
        print(json.dumps(result))
    else:
        verdict = "all peers agree" if result["digests_agree"] else "the peers DISAGREE"
        print(f"{result['tokens']:,} tokens in {result['seconds']:.0f} s; versions {result['versions']}: {verdict}")
    return 0 if result["digests_agree"] else 1


def run(swarm: LocalSwarm, options: argparse.Namespace) -> None:
    until = ["--until-tokens", str(options.until_tokens)] if options.until_tokens else []
    first = swarm.start_peer("--new-swarm", *(["--run", options.run] if options.run else []), *until)
    swarm.wait_for(lambda: "ready" in first.newest, timeout_s=START_S, what="the first peer")
    maddrs = first.last("ready", "maddrs")
    for _ in range(options.peers - 1):
        swarm.start_peer("--initial-peers", *maddrs, *until)
    if not options.json:
        print(f"join with: {first.last('ready', 'join')}", flush=True)
    deadline = time.monotonic() + options.max_seconds if options.max_seconds else float("inf")
    shown = 0.0
    while swarm.running() and time.monotonic() < deadline:
        swarm.wait_for(lambda: swarm.pump() or not swarm.running(), timeout_s=60.0, what="any event")
        if time.monotonic() - shown >= options.interval and not options.json and "progress" in first.newest:
            shown = time.monotonic()
            print(line(swarm, options.began), flush=True)
    swarm.finish()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=3, metavar="N", help="how many (3)")
    parser.add_argument("--run", metavar="FILE", help="run config (the demo run)")
    parser.add_argument("--until-tokens", type=int, metavar="N", help="end once the swarm has trained N tokens")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="end after this long at the latest")
    parser.add_argument("--home", type=Path, metavar="DIR", help="keep the peers' home folders here (a temporary one)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="training threads of each peer (1)")
    parser.add_argument("--interval", type=float, default=3.0, metavar="S", help="seconds between two lines (3)")
    parser.add_argument("--json", action="store_true", help="print nothing but a summary as one JSON object")
    parser.set_defaults(began=time.monotonic())
    return parser


if __name__ == "__main__":
    sys.exit(main())
