"""What rounds need of the peer around them: identity, links, clock, the training thread's boundary, the event bus."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from swarm.averaging.results import Results
from swarm.config import RunConfig
from swarm.events import Event
from swarm.host.keep import AMPLE, Keep
from swarm.network.directory import Directory
from swarm.network.endpoint import Endpoint
from swarm.network.keys import Keypair

T = TypeVar("T")

INLINE_VALUES = 100_000
"""arithmetic on fewer values takes under a millisecond: less than handing it to another thread and back"""


def nobody_asks(task: asyncio.Task[Any]) -> None:
    """Done callback of a task whose error may never be asked for: whoever waited for it may have been cancelled."""
    if not task.cancelled():
        task.exception()


class AtBoundary(Protocol):
    """Runs a function between two microbatches of the training thread (at once where nothing trains)."""

    def __call__(self, function: Callable[[], T]) -> Awaitable[T]: ...


@dataclass
class Context:
    run: RunConfig
    keypair: Keypair
    endpoint: Endpoint
    directory: Directory
    at_boundary: AtBoundary
    emit: Callable[[Event], None]
    keep: Keep = AMPLE
    nonce: Callable[[], str] = lambda: secrets.token_hex(8)
    """16 hex digits that make an opening unlike any other"""
    results: Results = field(init=False)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    before_write: Callable[[int], None] = lambda fragment: None
    """the working weights of that fragment are about to change"""
    in_rounds: Callable[[], Collection[int]] = tuple
    """fragments of which this peer is in a round now"""
    applying: asyncio.Semaphore = field(init=False)
    """commits of different fragments that are applied at a time: each takes memory for a while"""
    _bytes_before: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.results = Results(self.keep.results_bytes)
        self.applying = asyncio.Semaphore(self.keep.rounds)

    def has_room_for(self, fragment: int) -> bool:
        """For a round of this fragment, beside those that there are."""
        return len(set(self.in_rounds()) - {fragment}) < self.keep.rounds

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start work that nobody waits for; it ends with the peer."""
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def ask(self, peer_id: str, method: str, header: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """The header of its answer. Raises PeerGone or PeerRefused."""
        maddrs = self.directory.maddrs(peer_id)
        answer, _ = await self.endpoint.call(peer_id, method, header, deadline_s=deadline_s, maddrs=maddrs)
        return answer

    async def tell(self, peer_id: str, method: str, header: dict[str, Any], body: bytes, deadline_s: float) -> None:
        """Without an answer; returns once the body is on its way. Raises PeerGone."""
        maddrs = self.directory.maddrs(peer_id)
        await self.endpoint.notify(peer_id, method, header, body, deadline_s=deadline_s, maddrs=maddrs)

    async def compute(self, function: Callable[[], T], *, num_values: int) -> T:
        """Arithmetic on `num_values` values, beside the event loop where it would hold it up."""
        return function() if num_values < INLINE_VALUES else await asyncio.to_thread(function)

    def bytes_since_last_round(self) -> tuple[int, int]:
        """(sent, received) on all links since this was last asked: rounds, heartbeats, downloads, everything. Summed
        over the events of a run this is the run's whole traffic with other peers, the DHT's own excepted."""
        now = (self.endpoint.bytes_sent, self.endpoint.bytes_received)
        before, self._bytes_before = self._bytes_before, now
        return now[0] - before[0], now[1] - before[1]
