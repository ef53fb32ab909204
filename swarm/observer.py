"""Watching a swarm without being in it: what scripts/monitor.py and scripts/export.py are made of.

An observer has a throw-away identity and no home folder. It finds the run in the DHT, then asks each peer directly for
its status: the DHT is a hint and may be a minute old. Peers neither count it nor pass it on, and it serves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swarm.averaging.attestation import ASK_S, ATTEST_S, ranked, who_knows
from swarm.averaging.download import Wanted, download
from swarm.averaging.global_state import GlobalState
from swarm.config import RunConfig
from swarm.errors import NetworkError, StateError
from swarm.network import join
from swarm.network.keys import Keypair
from swarm.network.maddr import peer_id_of
from swarm.network.network import Network
from swarm.network.records import Head, Status

FORGET_S = 60.0
"""a peer that is silent for longer is shown no more"""
TRIES = 8


@dataclass(frozen=True)
class Seen:
    """One peer, by its own word."""

    peer_id: str
    status: Status
    heard_s_ago: float
    alive: bool
    """False: it has been silent for some seconds, or its connection ended; not counted"""


class Observer:
    """In a swarm from construction to `close`; a context manager."""

    def __init__(self, initial_peers: list[str], *, run_id: str | None = None, join_timeout_s: float = 20.0) -> None:
        """Raises ConfigError (no address), JoinError (nobody answers, no run, several runs), NetworkError."""
        self._initial: defaultdict[str, list[str]] = defaultdict(list)
        for maddr in initial_peers:
            self._initial[peer_id_of(maddr)].append(maddr)
        self._heard: dict[str, tuple[Status, float]] = {}
        self.notes: list[str] = []
        """what a person should know about the states that were fetched"""
        self._network = Network(Keypair(secrets.token_bytes(32)))
        try:
            self.run: RunConfig = self._network.run(self._start(initial_peers, run_id, join_timeout_s))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._network.stop()

    @property
    def network(self) -> Network:
        """For who asks more than statuses and states; see swarm/evaluate.py."""
        return self._network

    # -- who is there -----------------------------------------------------------------------------------------------

    def ask_everybody(self, *, at_least: int = 1, wait_s: float = 8.0) -> None:
        """Ask all peers that anybody knows of; returns when they have answered and are `at_least` as many, or when
        `wait_s` is over. From then on statuses come by themselves, every second."""
        self._network.run(self._ask_everybody(at_least, wait_s))

    def ask_again(self, *, wait_s: float = 2.0) -> None:
        """Ask those who are there at the same moment, so that what they say of their versions can be compared."""
        self._network.run(self._ask(set(self._network.directory.alive()), wait_s))

    def seen(self) -> list[Seen]:
        """Peers that answered in the last minute, trainers first. Raises NetworkError: libp2p's daemon has ended."""
        if not self._network.daemon_alive():
            raise NetworkError("libp2p's daemon has ended", why="something killed p2pd", do="start again")
        alive = self._network.directory.alive()
        if not alive:
            self._network.call_soon(self._meet_initial)  # the directory forgets who is silent for minutes
        now = time.monotonic()
        self._heard = {key: heard for key, heard in list(self._heard.items()) if now - heard[1] < FORGET_S}
        seen = [
            Seen(peer_id, status, now - heard_at, peer_id in alive)
            for peer_id, (status, heard_at) in list(self._heard.items())
        ]
        return sorted(seen, key=lambda peer: (peer.status.role != "trainer", peer.status.name, peer.peer_id))

    async def _start(self, initial_peers: list[str], run_id: str | None, timeout_s: float) -> RunConfig:
        network = self._network
        await network.start(
            folder=Path(tempfile.gettempdir()), listen=[], announce=[], initial_peers=initial_peers, observe=True,
            join_timeout_s=timeout_s,
        )
        run = await join.find_run(network.dht, run_id=run_id, deadline_s=timeout_s)
        me = Status(run_id=run.run_id, name="observer", role="observer")
        network.start_directory(run_id=run.run_id, my_status=lambda: me)
        network.directory.on_status = self._on_status
        self._meet_initial()
        return run

    def _meet_initial(self) -> None:
        for peer_id, maddrs in self._initial.items():
            self._network.directory.meet(peer_id, maddrs)

    def _on_status(self, peer_id: str, status: Status) -> None:
        self._heard[peer_id] = (status, time.monotonic())

    async def _ask_everybody(self, at_least: int, wait_s: float) -> None:
        directory, loop = self._network.directory, asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        with contextlib.suppress(asyncio.TimeoutError):  # the initial peers are known even without the DHT
            await asyncio.wait_for(directory.refresh(), wait_s)
        asked: set[str] = set()
        while loop.time() < deadline:
            new = set(directory.known()) - asked  # answers bring the addresses of others
            if new:
                asked |= new
                await self._ask(new, deadline - loop.time())
            elif len(directory.alive()) >= at_least:
                return
            else:
                await asyncio.sleep(0.2)

    async def _ask(self, peers: set[str], wait_s: float) -> None:
        tasks = [asyncio.create_task(self._network.directory.tell(peer_id)) for peer_id in peers]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=max(0.0, wait_s))
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    # -- the swarm's state ------------------------------------------------------------------------------------------

    def fetch(
        self, fragment: int, *, numel: int, num_buffers: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> GlobalState:
        """Download a fragment's newest attested state and check it against its digest. Raises StateError.

        `numel`, `num_buffers`: the shape that the run config says it has.
        """
        return self._network.run(self._fetch(fragment, numel, num_buffers, on_progress))

    async def _fetch(
        self, fragment: int, numel: int, num_buffers: int, on_progress: Callable[[int, int], None]
    ) -> GlobalState:
        problem: StateError | None = None
        for _ in range(TRIES):
            head, donors = await self._choose(fragment)
            try:
                return await download(
                    self._network.endpoint, Wanted(fragment, head.digest, numel, num_buffers), donors,
                    maddrs=self._network.directory.maddrs, on_progress=on_progress,
                )
            except StateError as error:  # the swarm moved on before anybody gave the manifest: take the next version
                problem = error
                await self._ask(set(donors), ASK_S)
        assert problem is not None
        raise problem

    async def _choose(self, fragment: int) -> tuple[Head, list[str]]:
        """The head with most tokens that two peers attest (one, where there is no other), and who can give it.

        The rule is that of averaging/attestation.py; an observer has no weights of its own to compare with.
        """
        loop, directory = asyncio.get_running_loop(), self._network.directory
        deadline = loop.time() + ATTEST_S
        while True:
            await self._ask(set(directory.alive()), ASK_S)  # versions of the same moment are more likely to agree
            said = {peer_id: status.head(fragment) for peer_id, status in directory.alive().items()}
            heads = {peer_id: head for peer_id, head in said.items() if head is not None}  # of its holders
            late = loop.time() >= deadline
            for head in ranked(heads.values()):
                knowing = [peer_id for peer_id, other in heads.items() if other == head]
                others = [peer_id for peer_id in heads if peer_id not in knowing]
                knowing += await who_knows(self._network.endpoint, directory, others, fragment=fragment, head=head)
                if len(knowing) >= 2 or late or len(heads) == 1:
                    if len(knowing) == 1:
                        why = "there is no other to ask" if len(heads) == 1 else "no other knows it"
                        self.notes.append(f"fragment {fragment} is attested by one peer only: {why}")
                    return head, knowing
            if late:
                raise StateError(
                    f"nobody here holds fragment {fragment}", why="no peer that trains it has answered",
                    do="look at the swarm with scripts/monitor.py, or export from a home folder with --home",
                )
            await asyncio.sleep(0.3)
