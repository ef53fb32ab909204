"""All of a peer's networking on one asyncio thread beside the training: daemon, endpoint, DHT, directory.

Other threads use `Network.run(coroutine)`. Nothing forks: hivemind's DHT and averager processes share pipes with their
parent, outlive it and hide partial failures (DESIGN 9).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from swarm.network import join, reachability
from swarm.network.daemon import Daemon
from swarm.network.dht import Dht
from swarm.network.directory import Directory
from swarm.network.endpoint import Endpoint
from swarm.network.keys import Keypair
from swarm.network.records import Status

T = TypeVar("T")


class Network:
    def __init__(self, keypair: Keypair, *, clock: Callable[[], float] = time.time) -> None:
        self.keypair, self.peer_id, self.clock = keypair, keypair.peer_id, clock
        self.endpoint: Endpoint
        self.dht: Dht
        self.directory: Directory
        self.maddrs: list[str] = []
        self._daemon: Daemon | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float | None = None) -> T:
        """Run on the network's thread and wait for the result. Not from that thread itself."""
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    async def start(
        self, *, folder: Path, listen: list[str], announce: list[str], initial_peers: list[str],
        observe: bool = False, join_timeout_s: float = 4.0, ask_initial_peers: bool = True,
    ) -> list[str]:
        """Start the daemon and join the DHT; returns the peer ids that answered.

        Raises NetworkError (cannot listen) or JoinError (nobody answers, clock off, identity in use).
        `ask_initial_peers` False: try them once and go on alone (a swarm that comes back from its checkpoints).
        """
        self._daemon = await Daemon.start(
            self.keypair, folder=folder, listen=listen, announce=announce, accept_incoming=not observe
        )
        self.endpoint = Endpoint(self._daemon, self.peer_id, clock=self.clock)
        reachability.serve(self.endpoint)
        await self.endpoint.start()
        answered: list[str] = []
        if initial_peers:
            try:
                answered = await join.connect(
                    self.endpoint, initial_peers, deadline_s=join_timeout_s if ask_initial_peers else 0.0
                )
            except join.JoinError:
                if ask_initial_peers:
                    raise
        known = [maddr for maddr in initial_peers if maddr.rsplit("/", 1)[-1] in answered]
        self.dht = await Dht.start(
            self._daemon, self.keypair, initial_peers=known, observe=observe, clock=self.clock
        )
        if not observe:
            self.maddrs = [str(maddr) for maddr in await self._daemon.p2p.get_visible_maddrs(latest=True)]
        return answered

    def start_directory(self, *, run_id: str, my_status: Callable[[], Status]) -> None:
        """On the network's thread, once the run is known: begin to meet its peers."""
        self.directory = Directory(self.endpoint, self.dht, run_id=run_id, my_status=my_status, rng=random.Random())
        self.directory.start()

    def daemon_alive(self) -> bool:
        return self._daemon is not None and self._daemon.is_alive()

    def stop(self) -> None:
        """Ends everything that `start` began, whatever state it is in. Safe to call twice."""
        if self._thread.is_alive():
            try:
                self.run(self._stop(), timeout_s=30)
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(timeout=10)
                if not self._thread.is_alive():
                    self._loop.close()

    async def _stop(self) -> None:
        if hasattr(self, "directory"):
            await self.directory.stop()
        if hasattr(self, "dht"):
            await self.dht.stop()
        if hasattr(self, "endpoint"):
            await self.endpoint.stop()
        if self._daemon is not None:
            await self._daemon.stop()
        current = asyncio.current_task()
        rest = [task for task in asyncio.all_tasks() if task is not current]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_default_executor()
