"""The spare copies that are here: what others see of them, and are given.

A copy is opened when somebody asks for it and closed when nobody does any more; it is read through the page cache, so
an open one takes no memory of its own. It attests its own version, as a holder does its head, and the commits that it
has followed are passed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from swarm.averaging.download import Donor
from swarm.averaging.global_state import GlobalState
from swarm.averaging.results import History
from swarm.errors import PeerRefused
from swarm.network.records import MAX_SPARES, Head, Spare

MAX_ROOM_BYTES = 2**50
"""that a status can name"""
CLOSED_S = 60.0
"""a copy that nobody has asked for in this time is closed"""


class Store(Protocol):
    """Where copies are (train/spare_disk.py). All but `heads` may take long."""

    room_bytes: int

    def heads(self) -> dict[int, Head]: ...

    def size_bytes(self, fragment: int) -> int: ...

    def has_room_for(self, fragment: int) -> bool: ...

    def read(self, fragment: int) -> GlobalState | None: ...

    def write(self, state: GlobalState) -> bool: ...

    def drop(self, fragment: int) -> None: ...


@dataclass
class _Open:
    state: GlobalState
    donor: Donor
    used_at: float


class SpareCopies:
    def __init__(self, store: Store, held: Callable[[], Collection[int]]) -> None:
        """`held`: fragments that this peer holds, or is about to."""
        self._store, self._held = store, held
        self._histories: dict[int, History] = {}
        self._open: dict[int, _Open] = {}
        self._opening = asyncio.Lock()

    @property
    def room_bytes(self) -> int:
        return min(self._store.room_bytes, MAX_ROOM_BYTES)

    def announced(self) -> list[Spare]:
        held = set(self._held())
        heads = sorted(self._store.heads().items())
        return [Spare(fragment=index, head=head) for index, head in heads if index not in held][:MAX_SPARES]

    def has(self, fragment: int) -> bool:
        return fragment in self._store.heads()

    def history(self, fragment: int) -> History:
        """Of a copy that is here: what it attests, and the commits that it can pass on."""
        head = self._store.heads().get(fragment)
        if head is None:
            raise PeerRefused(f"this peer has no spare copy of fragment {fragment}")
        history = self._histories.setdefault(fragment, History())
        history.saw(head.version, head.digest)
        return history

    async def donor(self, fragment: int) -> Donor:
        """Serves the copy, which stays open while somebody asks. Raises PeerRefused where there is none."""
        async with self._opening:
            head, opened = self._store.heads().get(fragment), self._open.get(fragment)
            if head is not None and (opened is None or opened.state.digest != head.digest):
                state = await self.read(fragment)
                if state is not None and opened is not None:
                    opened.state = state
                elif state is not None:
                    opened = self._open[fragment] = _opened(state)
            if opened is None:
                raise PeerRefused(f"this peer has no spare copy of fragment {fragment}")
            opened.used_at = asyncio.get_running_loop().time()
            return opened.donor

    async def load(self, fragment: int, more_than: int) -> GlobalState | None:
        """This peer's own copy, where it has more tokens than that."""
        head = self._store.heads().get(fragment)
        return await self.read(fragment) if head is not None and head.tokens > more_than else None

    async def read(self, fragment: int) -> GlobalState | None:
        """None: there is none, or it was damaged and is gone."""
        return await asyncio.to_thread(self._store.read, fragment)

    async def write(self, state: GlobalState, history: History) -> bool:
        """Keep this in the place of an older copy; `history` leads to it. False: it could not be written."""
        if not await asyncio.to_thread(self._store.write, state):
            return False
        self._histories[state.fragment] = history
        return True

    async def drop(self, fragment: int) -> None:
        self._histories.pop(fragment, None)
        self._open.pop(fragment, None)
        await asyncio.to_thread(self._store.drop, fragment)

    def close_idle(self) -> None:
        now = asyncio.get_running_loop().time()
        self._open = {index: opened for index, opened in self._open.items() if now - opened.used_at < CLOSED_S}


def _opened(state: GlobalState) -> _Open:
    clock = asyncio.get_running_loop().time
    opened = _Open(state, Donor(lambda: [opened.state], clock), clock())
    return opened
