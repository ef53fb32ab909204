"""What happened, as frozen dataclasses, and the smallest possible bus.

Training and networking emit events and know no screen. `swarm.monitor` turns them into lines, JSON and files.
The JSON names of `Ready`, `Progress`, `Round`, `Warning` and `Left` are a contract with users' scripts:
fields may be added, never renamed (`tests/unit/test_events.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    kind: ClassVar[str] = "event"

    def as_json(self) -> dict[str, Any]:
        return {"event": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Check(Event):
    """One line of the start-up checklist. `name`: device, memory, network, reachable, state, training."""

    kind: ClassVar[str] = "check"
    name: str
    text: str
    """the choice and its reason"""
    seconds: float


@dataclass(frozen=True)
class Ready(Event):
    kind: ClassVar[str] = "ready"
    run_id: str
    peer_id: str
    maddrs: list[str]
    join: str
    """the whole command to send to a friend"""


@dataclass(frozen=True)
class Progress(Event):
    kind: ClassVar[str] = "progress"
    tokens: int
    """trained by this peer since it started"""
    swarm_tokens: int
    """in committed rounds, of the fragment that has fewest"""
    loss: float
    """nats a token, mean over the recent inner steps of this peer"""
    tokens_per_s: float
    peers: int
    versions: list[int] = field(default_factory=list)
    """of each fragment that this peer holds"""
    bytes_sent: int = 0
    bytes_received: int = 0
    fragments: list[int] = field(default_factory=list)
    """which ones those are"""


@dataclass(frozen=True)
class Round(Event):
    """A committed round that this peer has applied."""

    kind: ClassVar[str] = "round"
    fragment: int
    version: int
    digest: str
    contributors: int
    tokens: int
    bytes_sent: int
    bytes_received: int
    seconds: float


@dataclass(frozen=True)
class Warning(Event):  # the name is the contract's
    kind: ClassVar[str] = "warning"
    text: str


@dataclass(frozen=True)
class Contributors(Event):
    """Others who train in this run and gave a name, or this peer itself; each name once a start. For the model card."""

    kind: ClassVar[str] = "contributors"
    names: list[str]


@dataclass(frozen=True)
class Left(Event):
    kind: ClassVar[str] = "left"
    reason: str


Listener = Callable[[Event], None]


class Bus:
    """Hands each event to every listener, in the order of emission. Safe from any thread; listeners must not block."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()

    def listen(self, listener: Listener) -> None:
        with self._lock:
            self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        with self._lock:
            for listener in self._listeners:
                listener(event)
