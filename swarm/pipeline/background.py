"""What nobody waits for, and whose failing changes nothing: words to peers that may be gone, memory given back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any

from swarm.errors import NetworkError


class Background:
    """On an event loop. Keeps its tasks, which the loop alone would forget."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, awaitable: Awaitable[Any]) -> None:
        async def quietly() -> None:
            with contextlib.suppress(NetworkError, asyncio.CancelledError):
                await awaitable

        task = asyncio.ensure_future(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
