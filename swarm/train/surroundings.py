"""The others as placement sees them: what their statuses say of where they are, where they go, and how fast they are.

Pure. Who is about to leave is not there any more; a peer that has not said how fast it is counts as the median one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from swarm.config import RunConfig
from swarm.network.records import Span, Status
from swarm.pipeline.snapshot import NO_STAGE, Claim, Fragments, Holder, Snapshot, Stage


def snapshot(
    run: RunConfig, statuses: Mapping[str, Status], fragments: Fragments, *, like: Snapshot | None = None
) -> Snapshot:
    """`statuses`: of all others alive, by peer id."""
    usual = usual_speed(run, statuses)
    return Snapshot(
        [_holder(peer_id, status, speed(run, status) or usual) for peer_id, status in statuses.items()
         if status.role == "trainer" and not status.leaving],
        fragments, like=like,
    )  # fmt: skip


def speed(run: RunConfig, status: Status) -> float:
    """Fragments times tokens a second; 0: it has not said. A peer with the whole model tells what it trains."""
    return status.speed or status.tokens_per_s * run.fragments


def usual_speed(run: RunConfig, statuses: Mapping[str, Status]) -> float:
    """The median of those that have said how fast they are; 1 where nobody has."""
    known = [found for status in statuses.values() if (found := speed(run, status)) > 0]
    return statistics.median(known) if known else 1.0


def _holder(peer_id: str, status: Status, its_speed: float) -> Holder:
    serving = _stage(status.serving)
    said = status.claim
    claim = None if said is None else Claim(_stage(said.stage), said.gain, said.heals)
    target = serving if status.target is None else _stage(status.target)
    return Holder(peer_id, serving, target, 0, its_speed, claim)


def _stage(span: Span | None) -> Stage:
    return NO_STAGE if span is None else (span[0], span[1])
