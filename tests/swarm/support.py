"""Small runs and real peers for the tests in this folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from scripts.forked import Forked, peer
from scripts.local_swarm import LocalPeer, LocalSwarm
from swarm.config import PeerConfig
from swarm.events import Bus, Event
from swarm.host.home import Home
from swarm.train.participant import Participant

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "

GPTJ: dict[str, object] = {
    "model_type": "gptj", "n_layer": 2, "n_embd": 48, "n_head": 2, "rotary_dim": 8, "n_positions": 64,
    "vocab_size": 257, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 256,
    "eos_token_id": 256,
}


def write_run(folder: Path, **changes: object) -> Path:
    """A run of about 60,000 parameters on a small text; `changes` are top-level keys, merged one level deep."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"{number}. {TEXT}\n" for number in range(3000)))
    document: dict[str, object] = {
        "name": "tiny",
        "model": {"config": GPTJ},
        "fragments": 2,
        "data": {"files": [str(text)]},
        "train": {"sequence_length": 32, "batch_sequences": 4, "total_tokens": 100_000_000, "learning_rate": 0.002},
        "averaging": {"tokens_per_round": 4_000, "max_round_s": 20.0},
    }
    for key, value in changes.items():
        old = document.get(key)
        document[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain for {what}"
        time.sleep(0.05)


def own_ports() -> int:
    """The first of ten ports that no other worker of the tests has: peers of the lab listen on fixed ones, each on a
    machine of its own, and here two of these swarms may be on one machine at the same time."""
    return 20_000 + os.getpid() % 1_000 * 10


class Swarm(LocalSwarm):
    """Peers that are ready give way to those that start, which took several times as long while the others trained as
    fast as they can. `autogroup`: Linux shares the processor between sessions first, and each peer is one, so
    priorities of its threads mean nothing to other peers."""

    NICENESS = 5

    def __init__(
        self, home: Path, *, on_event: Callable[[LocalPeer, dict[str, Any]], None] = lambda *_: None,
        forked: bool = True,
    ) -> None:
        """`forked`: peers need not import anything (scripts/forked.py); else they are started as people start them."""
        def hear(peer: LocalPeer, event: dict[str, Any]) -> None:
            if event["event"] == "ready":
                self._give_way(peer)
            heard(peer, event)

        heard, self._forked = on_event, forked
        super().__init__(home, on_event=hear)

    def _launch(self, arguments: list[str]) -> subprocess.Popen[str]:
        if not self._forked:
            return super()._launch(arguments)
        forked: Any = Forked(peer, arguments)
        return forked

    def _give_way(self, peer: LocalPeer) -> None:
        with contextlib.suppress(OSError):  # it has ended, or this is no Linux, or one without this
            Path(f"/proc/{peer.process.pid}/autogroup").write_text(str(self.NICENESS))


class InProcessPeer:
    """A whole peer (real p2pd, real sockets, real training) inside the test's process."""

    def __init__(self, home: Path, **config: object) -> None:
        self.events: list[Event] = []
        bus = Bus()
        bus.listen(self.events.append)
        mine = {"home": str(home), "listen": ["/ip4/127.0.0.1/tcp/0"], "device": "cpu", "threads": 1}
        self.config = PeerConfig(**{**mine, **config})  # type: ignore[arg-type]
        self.home = Home.open(home)
        self.participant = Participant(self.config, self.home, bus)

    @property
    def maddrs(self) -> list[str]:
        return self.participant.network.maddrs

    def heads(self) -> list[tuple[int, str]]:
        assert self.participant.averager is not None
        return [(state.version, state.digest) for state in self.participant.averager.states()]

    def close(self) -> None:
        self.participant.close()
        self.home.close()


@contextlib.contextmanager
def peers_in_process() -> Iterator[Callable[..., InProcessPeer]]:
    """Makes peers and closes them all at the end."""
    made: list[InProcessPeer] = []

    def make(home: Path, **config: object) -> InProcessPeer:
        made.append(InProcessPeer(home, **config))
        return made[-1]

    try:
        yield make
    finally:
        for peer in made:
            peer.close()
