"""One swarm of any system in the lab: a process a host, what it says with the time of receipt, what it costs.

None of it survives its `with` block, however that ends. What goes wrong is a DidNotFinish that names the peer and
quotes the end of its stderr, because that, too, is a result.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from wanlab.lab import Lab

from benches.labpeer import END_S, DidNotFinish, Launch, Peer, popen
from benches.systems import Setup, System
from benches.table import Point, rises
from benches.usage import Snapshot, pids_on, take
from swarm.errors import SwarmError

POLL_S = 0.1
START_S = 180.0
FINISH_S = 60.0
QUOTED_CHARS = 600
START_WORDS = {"--new-swarm": 1, "--run": 2}
"""words of the product that start a run, and how many to leave out"""


class LabSwarm:
    """`with LabSwarm(lab, system, setup) as swarm: swarm.start_all()`

    `launch`: how peers are started, if not by popen."""

    def __init__(self, lab: Lab, system: System, setup: Setup, *, launch: Launch | None = None) -> None:
        self._launcher = launch
        self.lab, self.system, self.setup = lab, system, setup
        self.hosts = lab.hosts[:setup.num_peers]
        self.ips = [lab.ip(host) for host in self.hosts]
        self.peers: dict[int, Peer] = {}
        """the newest process of each number"""
        self.lives: list[Peer] = []
        """all processes that there ever were"""
        self._helpers: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        self._others: list[subprocess.Popen[str]] = []
        self._join: list[str] = []

    def __enter__(self) -> LabSwarm:
        try:
            self.setup.folder.mkdir(parents=True, exist_ok=True)
            for index, argv in self.system.helpers(self.setup, self.ips):
                errors = self.setup.folder / f"helper-{len(self._helpers)}.err"
                with errors.open("w") as stderr:
                    process = popen(self.lab, self.hosts[index], argv, stdout=subprocess.DEVNULL, stderr=stderr)
                self._helpers.append((self.hosts[index], process, errors))
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    # ---- start and end ----

    def start_all(self, *, together: bool = False) -> None:
        """Start all peers and wait until they train. The product's others join through the first one.

        `together`: no peer of the product begins long before the others, so that all tokens are the whole swarm's. They
        join through a rendezvous then, which leaves again.
        """
        meeting = None
        if self.system.name == "swarm" and together:
            meeting = self._meeting()
        self.start(0)
        if self.system.name == "swarm" and not together:
            self.wait(self.peers[0].is_ready, timeout_s=START_S, what="peer 0 to be ready")
        for number in range(1, self.setup.num_peers):
            self.start(number)
        self.wait(
            lambda: all(peer.is_ready() for peer in self.peers.values()), timeout_s=START_S,
            what="all peers to be ready",
        )
        if meeting is not None:
            meeting.process.send_signal(signal.SIGTERM)
            self.wait(lambda: not meeting.is_running(), timeout_s=FINISH_S, what="the rendezvous to leave")

    def _meeting(self) -> Peer:
        """A rendezvous of the run on the first host."""
        argv = self.system.command(replace(self.setup, folder=self.setup.folder / "meeting"), 0, self.ips, [])
        argv[argv.index("--listen") + 1] = f"/ip4/{self.ips[0]}/tcp/0"
        meeting = self._launch(0, [*argv, "--role", "rendezvous"], "meeting.err")
        self._others.append(meeting.process)
        self.wait(
            lambda: meeting.is_ready() or not meeting.is_running(), timeout_s=START_S,
            what="the rendezvous to be ready",
        )
        if not meeting.is_ready():
            raise DidNotFinish("the rendezvous ended by itself", why=meeting.how_it_ended())
        self._join = meeting.last("ready", "maddrs")
        return meeting

    def start(self, number: int, *, setup: Setup | None = None, resume: bool = False) -> Peer:
        """Start one peer, or the same one again. `setup`: another one's, with a home of its own."""
        argv = self.system.command(setup or self.setup, number, self.ips, self._ways_in())
        if self.system.name == "swarm" and resume:
            argv = without_run(argv)
        elif self.system.name == "swarm" and number == 0 and self._join:
            argv = [*without_run(argv), "--initial-peers", *self._join]
        peer = self._launch(number, argv, f"peer-{number}.{len(self.lives)}.err")
        self.peers[number] = peer
        self.lives.append(peer)
        return peer

    def _ways_in(self) -> list[str]:
        """For the product: the rendezvous, or else the first peer."""
        return self._join or (self.peers[0].last("ready", "maddrs", []) if self.peers else [])

    def _launch(self, number: int, argv: list[str], errors: str) -> Peer:
        return Peer.start(
            self.lab, number, self.hosts[number], argv, errors=self.setup.folder / errors, launch=self._launcher
        )

    def finish(self, *, timeout_s: float = FINISH_S) -> list[int]:
        """Ask all to end, wait until they have; returns the numbers of those that had to be killed."""
        for peer in self.peers.values():
            peer.may_end = True
            if peer.is_running():
                peer.process.send_signal(signal.SIGTERM)
        return self.wait_for_the_end(timeout_s=timeout_s)

    def to_the_end(self, tokens: int, *, timeout_s: float) -> float:
        """Wait until all have ended by themselves, because the run is complete; returns the seconds until it was."""
        began = min(peer.of("ready")[0][0] for peer in self.peers.values())
        for peer in self.peers.values():
            peer.may_end = True
        self.wait(
            lambda: not any(peer.is_running() for peer in self.peers.values()), timeout_s=timeout_s,
            what=f"{tokens:,} tokens",
        )
        self.wait_for_the_end(timeout_s=END_S)
        committed = self.committed()
        reached = committed[-1][1] if committed else 0
        if reached < tokens or any(peer.process.returncode for peer in self.peers.values()):
            why = "; ".join(f"peer {peer.number}: {peer.how_it_ended()}" for peer in self.peers.values())
            raise DidNotFinish(f"peers ended badly, after {reached:,} of {tokens:,} tokens", why=why)
        return committed[-1][0] - began

    def wait_for_the_end(self, *, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        while any(peer.is_running() for peer in self.peers.values()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        late = [peer.number for peer in self.peers.values() if peer.is_running()]
        for number in late:
            self.peers[number].process.kill()
            self.peers[number].ended = time.monotonic()
        for peer in self.peers.values():
            peer.wait()
        return late

    def end(self) -> None:
        """Kill whatever is left on the hosts, helpers and grandchildren too."""
        for peer in self.peers.values():
            peer.may_end = True
        for host in self.hosts:
            with contextlib.suppress(SwarmError):  # the lab removes it with the namespace, or says why not
                self.lab.crash(host)
        started = [peer.process for peer in self.lives] + self._others + [process for _, process, _ in self._helpers]
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait(END_S)

    def ended(self, number: int) -> Peer:
        """After lab.crash or lab.kill: that peer's process is gone, its last lines are read."""
        peer = self.peers[number]
        peer.may_end, peer.ended = True, time.monotonic()
        peer.wait()
        return peer

    def signal_host(self, host: str, number: int) -> None:
        """To all processes of a host, such as SIGSTOP."""
        for pid in pids_on(self.lab, host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # ---- wait ----

    def wait(self, condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        """Until it holds. Raises DidNotFinish when time is up, or when somebody ends who should not."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                why = "; ".join(f"peer {peer.number}: {peer.where()}" for peer in self.peers.values())
                if not self.lab.is_running():
                    why = "the lab's forwarder has died"
                raise DidNotFinish(f"waited {timeout_s:.0f} s in vain for {what}", why=why)
            time.sleep(POLL_S)

    def sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= until, timeout_s=seconds + 60, what="time to pass")

    def check(self) -> None:
        """Raises DidNotFinish when a process has ended that should not have."""
        for peer in self.peers.values():
            if not peer.may_end and not peer.is_running():
                raise DidNotFinish(
                    f"peer {peer.number} on {peer.host} ended by itself", why=peer.how_it_ended()
                )
        for host, process, errors in self._helpers:
            if process.poll() is not None:
                why = errors.read_text(errors="replace")[-QUOTED_CHARS:].strip()
                raise DidNotFinish(f"a helper on {host} ended with code {process.returncode}", why=why)

    # ---- look ----

    def committed(self) -> list[Point]:
        """Tokens in commits, as the most advanced peer knew them, where they grew."""
        return rises(peer.points("swarm_tokens") for peer in self.lives)

    def snapshot(self) -> Snapshot:
        return take(self.lab, self.hosts)


def without_run(argv: list[str]) -> list[str]:
    """A command of the product without what starts or joins a run. Where the home has one, that resumes it."""
    words, kept = list(argv), []
    while words:
        if words[0] in START_WORDS:
            del words[:START_WORDS[words[0]]]
        elif words[0] == "--initial-peers":
            del words[0]
            while words and not words[0].startswith("--"):
                del words[0]
        else:
            kept.append(words.pop(0))
    return kept
