"""Several peers in one process: each with its own libp2p daemon, sockets, DHT node, directory and averager, as ever;
what they learn is made up, on a fragment so small that nothing but the protocol takes time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from swarm.averaging.averager import Averager
from swarm.averaging.context import Context
from swarm.averaging.global_state import initial_state
from swarm.averaging.layout import layout_of
from swarm.config import AveragingConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from swarm.errors import SwarmError
from swarm.events import Event, Round
from swarm.model.fragments import FragmentSpec, TensorSpec
from swarm.network.keys import Keypair
from swarm.network.network import Network
from swarm.network.records import Status
from swarm.train.boundary import Boundary

LAYOUT = layout_of(FragmentSpec(0, (0, 1), (
    TensorSpec("norm", (64,), fine=True), TensorSpec("matrix", (128, 256), fine=False),
)))
"""129 blocks: every one of 64 peers owns a part"""
TOKENS = 100
"""of a step"""
START_S, TELL_S = 120.0, 1.0
TRIES = 3


def run_of(seed: int, tokens_per_round: int, bits: int) -> RunConfig:
    return RunConfig(
        name="many", model=ModelConfig(config={"model_type": "gptj"}), data=DataConfig(stdlib=True), seed=seed,
        fragments=1, train=TrainConfig(total_tokens=10**12),
        averaging=AveragingConfig(tokens_per_round=tokens_per_round, max_round_s=600.0, bits=bits),
    )


class ManyPeer:
    """One of them. All but `start` and `stop` runs on its network's thread."""

    def __init__(self, number: int, run: RunConfig, folder: Path, *, every_s: float) -> None:
        self.number, self._run, self._folder, self._every_s = number, run, folder, every_s
        self.network = Network(Keypair(hashlib.sha256(f"many {run.seed} {number}".encode()).digest()))
        self.trained = 0
        self.rounds: list[dict[str, Any]] = []
        self._learning: asyncio.Task[None] | None = None

    def start(self, initial_peers: Sequence[str]) -> None:
        """Raises NetworkError."""
        self.network.run(self.network.start(
            folder=self._folder, listen=["/ip4/127.0.0.1/tcp/0"], announce=[], initial_peers=list(initial_peers),
            join_timeout_s=START_S,
        ), timeout_s=2 * START_S)
        self.network.run(self._begin(initial_peers))

    async def _begin(self, initial_peers: Sequence[str]) -> None:
        network, start = self.network, torch.zeros(LAYOUT.numel)
        network.start_directory(run_id=self._run.run_id, my_status=self._status)
        for maddr in initial_peers:
            network.directory.meet(maddr.rsplit("/", 1)[-1], [maddr])
        self._parameters = {name: torch.nn.Parameter(view.clone()) for name, view in LAYOUT.views(start)}
        context = Context(
            self._run, network.keypair, network.endpoint, network.directory, Boundary(), self._hear
        )
        self.averager = Averager(context, {0: LAYOUT}, {0: initial_state(0, start, 1)}, self._parameters)
        self.averager.trust({0: True})
        self.averager.start()

    async def learn(self) -> None:
        self._learning = asyncio.create_task(self._learn())

    async def _learn(self) -> None:
        dice = random.Random(self.number)
        generator = torch.Generator().manual_seed(self.number)
        while True:
            await asyncio.sleep(self._every_s * dice.uniform(0.5, 1.5))
            with torch.no_grad():
                for parameter in self._parameters.values():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
            self.trained += TOKENS
            self.averager.trained(TOKENS)

    async def settle(self) -> None:
        """No more learning: what is left goes into a last round."""
        if self._learning is not None:
            self._learning.cancel()
            self._learning = None
        self.averager.leaving = True

    def _hear(self, event: Event) -> None:
        if isinstance(event, Round):
            self.rounds.append(asdict(event) | {"at": time.monotonic()})

    def _status(self) -> Status:
        averager = getattr(self, "averager", None)
        return Status(
            run_id=self._run.run_id, name=f"peer {self.number}", role="trainer", maddrs=self.network.maddrs[:2],
            heads=averager.heads() if averager else [], pending=averager.pending() if averager else [],
            tokens=self.trained, tokens_per_s=TOKENS / self._every_s if self._learning else 0.0,
            leaving=bool(averager and averager.leaving),
        )

    async def tell(self) -> dict[str, Any]:
        [state] = self.averager.states()
        rounds, self.rounds = self.rounds, []
        return {
            "number": self.number, "known": len(self.network.directory.alive()), "version": state.version,
            "digest": state.digest, "tokens": state.tokens, "pending": self.averager.pending()[0],
            "trained": self.trained, "rounds": rounds, "at": time.monotonic(),
            "bytes_sent": self.network.endpoint.bytes_sent,
        }

    async def stop_averaging(self) -> None:
        await self.settle()
        await self.averager.stop()

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            self.network.run(self.stop_averaging(), timeout_s=10)
        self.network.stop()


@dataclass(frozen=True)
class Task:
    """What one process is to do."""

    first: int
    count: int
    seed: int
    every_s: float
    tokens_per_round: int
    bits: int


def started(number: int, run: RunConfig, folder: Path, every_s: float, initial_peers: Sequence[str]) -> ManyPeer:
    """Tries as often as a person would. Raises SwarmError."""
    for attempt in range(TRIES):
        peer = ManyPeer(number, run, folder, every_s=every_s)
        try:
            peer.start(initial_peers)
            break
        except SwarmError:
            peer.stop()
            if attempt + 1 == TRIES:
                raise
    return peer


def serve(task: Task, end: Connection) -> None:
    """The life of a process. `end`: gives addresses to join through (none: this process has the first peer), is told
    those of its own first peer and, once a second, of all its peers; gives "learn", "settle" and "stop"."""
    torch.set_num_threads(1)
    run, peers = run_of(task.seed, task.tokens_per_round, task.bits), []
    with tempfile.TemporaryDirectory(prefix="many-") as folder, contextlib.suppress(EOFError, OSError):
        try:
            initial = end.recv()
            if initial == "stop":
                return
            for number in range(task.first, task.first + task.count):
                peers.append(started(number, run, Path(folder), task.every_s, initial))
                initial = initial or peers[0].network.maddrs[:1]
            end.send({"maddrs": peers[0].network.maddrs[:1]})
            while True:
                if not end.poll(TELL_S):
                    end.send({"peers": [peer.network.run(peer.tell()) for peer in peers]})
                    continue
                word = end.recv()
                if word == "stop":
                    break
                for peer in peers:
                    peer.network.run(peer.learn() if word == "learn" else peer.settle())
        finally:
            stopping = [threading.Thread(target=peer.stop) for peer in peers]
            for thread in stopping:
                thread.start()
            for thread in stopping:
                thread.join()
