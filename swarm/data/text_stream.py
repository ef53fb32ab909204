"""What a trainer draws its text from: one packed stream (stream.py), or a mixture of sources (mixture.py)."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from swarm.data.batch import Batch


class TextStream(Protocol):
    may_wait: bool
    """for text, in `next_batch`"""

    def next_batch(self, num_sequences: int) -> Batch:
        """The next sequences. May wait for text; raises TextClosed where `close` was called."""

    def state(self) -> dict[str, Any]:
        """JSON-able: the place after the last batch."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state()` was taken. Raises StateError, and changes nothing, where it does not fit."""

    def close(self) -> None:
        """No more is wanted: whoever waits is woken. Any thread, any number of times."""


async def drawn(stream: TextStream, num_sequences: int) -> Batch:
    """The next batch, for an event loop: a mixture may wait for a source, and must not make others wait."""
    if stream.may_wait:
        return await asyncio.to_thread(stream.next_batch, num_sequences)
    return stream.next_batch(num_sequences)


class TextClosed(Exception):
    """There is no more text, because the stream was closed: the one who waited for it is to end."""
