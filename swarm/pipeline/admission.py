"""What a peer takes on: which microbatches it refuses before anything is computed or kept for them.

Those that train and those of guests, who only ask (for a loss, or for logits), are counted apart: strangers who ask a
lot find their few places full, and training has all of its own. What a guest's microbatch takes is small beside a
training one: no graph, no gradients, nothing that waits for a verdict.
"""

from __future__ import annotations

from collections.abc import Iterable

from swarm.errors import BadMessage, PeerRefused
from swarm.pipeline import wire
from swarm.pipeline.messages import Microbatch
from swarm.pipeline.onward import Shape

BUSY = "too many microbatches here"
GUESTS_ONE_IN = 4
"""places for guests: one for so many of training, and at least one"""


def check(asked: Microbatch, here: Iterable[Microbatch], *, shape: Shape, max_in_flight: int, is_own: bool) -> None:
    """`here`: the microbatches at this peer, its own included; `max_in_flight`: training ones there is memory for.

    Raises BadMessage (never possible) or PeerRefused (not now). What this peer itself begins (`is_own`) is not refused
    for want of room: its origin's credit is the limit."""
    if asked.tokens > shape.max_tokens:
        raise BadMessage(f"a microbatch of {asked.tokens} tokens", why=f"the limit is {shape.max_tokens}")
    if asked.logits:
        if asked.logits > asked.length:
            raise BadMessage(f"logits of {asked.logits} positions of {asked.length}")
        size = wire.logits_bytes(asked, vocabulary=shape.vocabulary)
        if size > wire.MAX_LOGITS_BYTES:
            raise BadMessage(f"{size} bytes of logits", why=f"the limit is {wire.MAX_LOGITS_BYTES}")
    if is_own:
        return
    # those that wait for the processor, for a version or for a verdict, too: each has bytes or gradients here
    alike = sum(other.train == asked.train for other in here)
    if alike >= (max_in_flight if asked.train else max(1, max_in_flight // GUESTS_ONE_IN)):
        raise PeerRefused(BUSY)
