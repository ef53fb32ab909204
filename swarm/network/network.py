"""All of a peer's networking on one asyncio thread beside the training: daemon, endpoint, DHT, directory.

Other threads use `Network.run(coroutine)`. Nothing forks: hivemind's DHT and averager processes share pipes with their
parent, outlive it and hide partial failures (DESIGN 9).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from swarm.errors import NetworkError, NobodyAnswers
from swarm.network import join, reachability
from swarm.network.daemon import Daemon
from swarm.network.dht import Dht
from swarm.network.directory import Directory
from swarm.network.endpoint import Endpoint
from swarm.network.introductions import Introductions
from swarm.network.keys import Keypair
from swarm.network.maddr import host_and_port
from swarm.network.records import Status

T = TypeVar("T")

WATCH_S = 0.5
STEP_S = 5.0
"""for each part to stop"""

log = logging.getLogger(__name__)


class Network:
    def __init__(self, keypair: Keypair, *, clock: Callable[[], float] = time.time) -> None:
        self.keypair, self.peer_id, self.clock = keypair, keypair.peer_id, clock
        self.endpoint: Endpoint
        self.dht: Dht
        self.directory: Directory
        self.introductions: Introductions
        self.maddrs: list[str] = []
        self.on_daemon_lost: Callable[[], None] = lambda: log.error("libp2p's daemon is gone")
        """called once, on the network's thread, when p2pd ends without being told to"""
        self._daemon: Daemon | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_log_quietly)
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
        observe: bool = False, join_timeout_s: float = 4.0, ask_initial_peers: bool = True, introduce: bool = True,
    ) -> list[str]:
        """Start the daemon and join the DHT; returns the peer ids that answered.

        Raises NetworkError (cannot listen) or JoinError (nobody answers, clock off, identity in use).
        `ask_initial_peers` False: try them once and go on alone (a swarm that comes back from its checkpoints).
        `introduce`: help peers behind routers to find each other.
        """
        self._daemon = await Daemon.start(
            self.keypair, folder=folder, listen=listen, announce=announce, accept_incoming=not observe
        )
        self._watcher = asyncio.create_task(self._watch(self._daemon))
        self.endpoint = Endpoint(self._daemon, self.peer_id, clock=self.clock)
        reachability.serve(self.endpoint)
        try:
            await asyncio.wait_for(self.endpoint.start(), STEP_S)
            visible = [] if observe else await asyncio.wait_for(self._daemon.addresses(), STEP_S)
        except Exception as error:  # it has just answered; it can only have died since
            why = str(error) or type(error).__name__
            raise NetworkError("libp2p's daemon stopped answering", why=why, do="try again") from error
        places = [place for place in map(host_and_port, visible) if place is not None]
        self.introductions = Introductions(self.endpoint, inside=places[0] if places else None, willing=introduce)
        answered: list[str] = []
        if initial_peers:
            try:
                answered = await join.connect(
                    self.endpoint, initial_peers, deadline_s=join_timeout_s if ask_initial_peers else 0.0
                )
            except NobodyAnswers:
                if ask_initial_peers:
                    raise
        known = [maddr for maddr in initial_peers if maddr.rsplit("/", 1)[-1] in answered]
        self.dht = await Dht.start(
            self._daemon, self.keypair, initial_peers=known, observe=observe, clock=self.clock
        )
        self.maddrs = visible
        return answered

    async def _watch(self, daemon: Daemon) -> None:
        while daemon.is_alive():
            await asyncio.sleep(WATCH_S)
        self.on_daemon_lost()

    def start_directory(self, *, run_id: str, my_status: Callable[[], Status]) -> None:
        """On the network's thread, once the run is known: begin to meet its peers."""
        self.directory = Directory(self.endpoint, self.dht, run_id=run_id, my_status=my_status, rng=random.Random())
        self.endpoint.address_of = self._address_of
        self.directory.start()

    async def _address_of(self, peer_id: str) -> str | None:
        punched = self.directory.reach_of(peer_id) == reachability.PUNCHED
        return await self.introductions.address_of(peer_id) if punched else None

    def daemon_alive(self) -> bool:
        return self._daemon is not None and self._daemon.is_alive()

    def stop(self) -> None:
        """Ends everything that `start` began, also where it failed or has not finished. Safe to call twice, and from
        any thread but the network's own."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("the network cannot stop itself from its own thread")
        with self._stopping:
            if not self._thread.is_alive():
                return
            try:
                with contextlib.suppress(TimeoutError, concurrent.futures.TimeoutError):
                    self.run(self._stop(), timeout_s=6 * STEP_S)
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(timeout=10)
                if self._daemon is not None:  # also where the loop hangs
                    self._daemon.end()
                if not self._thread.is_alive():
                    self._loop.close()

    async def _stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        await self._cancel_all()  # a start() that is under way ends its daemon itself
        for name in ("directory", "introductions", "endpoint", "dht"):
            if hasattr(self, name):
                await _bounded(getattr(self, name).stop())
        if self._daemon is not None:
            await _bounded(self._daemon.stop(), 3 * STEP_S)
        await self._cancel_all()
        await asyncio.get_running_loop().shutdown_default_executor()

    async def _cancel_all(self) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=STEP_S)


async def _bounded(step: Coroutine[Any, Any, None], limit_s: float = STEP_S) -> None:
    try:
        await asyncio.wait_for(step, limit_s)
    except Exception:  # the next part is to stop all the same
        log.debug("while stopping", exc_info=True)


def _log_quietly(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a task leaves behind that nobody waits for: mostly hivemind's, about strangers' bytes. Seen with -v."""
    log.debug("%s", context.get("message"), exc_info=context.get("exception"))
