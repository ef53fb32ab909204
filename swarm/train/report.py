"""What a peer says of itself and the swarm while it lives: progress, and fragments that nobody holds. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from swarm.averaging.averager import Averager
from swarm.events import Progress, Warning
from swarm.network.endpoint import Endpoint
from swarm.network.keys import friendly_name
from swarm.network.records import Status

MAX_NAMES = 1000


class Learner(Protocol):
    """A trainer, of the whole model or a part."""

    @property
    def tokens(self) -> int: ...

    @property
    def loss(self) -> float | None: ...

    @property
    def tokens_per_s(self) -> float: ...


def progress(
    trainer: Learner | None, averager: Averager | None, others: Collection[Status], endpoint: Endpoint, *,
    swarm_tokens: int,
) -> Progress | None:
    """None until somebody knows a loss. A peer that draws no text shows the mean of the others'."""
    known = [status.loss for status in others if status.loss is not None]
    loss = trainer.loss if trainer and trainer.loss is not None else (sum(known) / len(known) if known else None)
    if loss is None:
        return None
    return Progress(
        tokens=trainer.tokens if trainer else 0, swarm_tokens=swarm_tokens, loss=round(loss, 4),
        tokens_per_s=round((trainer.tokens_per_s if trainer else 0.0) + sum(s.tokens_per_s for s in others), 1),
        peers=len(others) + 1, versions=[s.version for s in averager.states()] if averager else [],
        fragments=averager.held() if averager else [],
        bytes_sent=endpoint.bytes_sent, bytes_received=endpoint.bytes_received,
    )


def new_names(statuses: Iterable[tuple[str, Status]], known: Collection[str]) -> list[str]:
    """Names that peers gave themselves (not made up from their ids), of those who have trained, but for those known.
    Strangers could go on for ever with new ones: at most MAX_NAMES in all."""
    found = {
        status.name for peer_id, status in statuses
        if status.role == "trainer" and status.tokens > 0 and status.name and status.name != friendly_name(peer_id)
    }
    return sorted(found - set(known))[:max(0, MAX_NAMES - len(known))]


def gaps(num_fragments: int, held: Collection[int], others: Mapping[str, Status]) -> list[int]:
    """Fragments that neither this peer nor anybody alive holds."""
    found = set(range(num_fragments)) - set(held)
    return sorted(found - {fragment for status in others.values() for fragment in status.held()})


def gap_warning(missing: list[int]) -> Warning:
    if not missing:
        return Warning("every fragment has somebody who holds it")
    names = ", ".join(map(str, missing))
    return Warning(f"nobody here holds fragment {names}: microbatches wait for a peer that does (--fragments A:B)")
