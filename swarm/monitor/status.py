"""What a watcher needs to know now, reduced from the events so far.

`update` is pure: the same events give the same status, so that a journal can be replayed into any view (an idea of exo
and Psyche). `status_line` is the one line everybody sees, its fields always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from swarm.events import Check, Event, Left, Progress, Ready, Round, Warning
from swarm.units import format_bytes, format_count

KEPT_ROUNDS = 8
KEPT_WARNINGS = 4


@dataclass(frozen=True)
class Status:
    checks: tuple[Check, ...] = ()
    """the start-up checklist, each name once, in the order of appearance"""
    ready: Ready | None = None
    progress: Progress | None = None
    rounds: tuple[Round, ...] = ()
    """the last few, oldest first"""
    version: int = 0
    """the highest version seen of any fragment"""
    warnings: tuple[str, ...] = ()
    """the last few different ones, oldest first"""
    left: str | None = None
    """why this peer left"""


def update(status: Status, event: Event) -> Status:
    """The status after `event`. Events it does not know change nothing."""
    if isinstance(event, Check):
        known = {check.name: check for check in status.checks}
        return replace(status, checks=tuple({**known, event.name: event}.values()))
    if isinstance(event, Ready):
        return replace(status, ready=event)
    if isinstance(event, Progress):
        return replace(status, progress=event, version=max([status.version, *event.versions]))
    if isinstance(event, Round):
        rounds = (*status.rounds, event)[-KEPT_ROUNDS:]
        return replace(status, rounds=rounds, version=max(status.version, event.version))
    if isinstance(event, Warning):
        others = tuple(text for text in status.warnings if text != event.text)
        return replace(status, warnings=(*others, event.text)[-KEPT_WARNINGS:])
    if isinstance(event, Left):
        return replace(status, left=event.reason)
    return status


def status_line(status: Status) -> str:
    """ "round 118  loss 3.412  tokens 1.2M (mine 300k)  8.1k tok/s  peers 14  up 1.2 MB  down 1.1 MB"; "" at first."""
    now = status.progress
    if now is None:
        return ""
    return "  ".join(
        [
            f"round {status.version}",
            f"loss {now.loss:.3f}",
            f"tokens {format_count(now.swarm_tokens)} (mine {format_count(now.tokens)})",
            f"{format_count(now.tokens_per_s)} tok/s",
            f"peers {now.peers}",
            f"up {format_bytes(now.bytes_sent)}",
            f"down {format_bytes(now.bytes_received)}",
        ]
    )


def round_line(event: Round) -> str:
    return (
        f"round {event.version} of fragment {event.fragment}  {event.contributors} contributed "
        f"{format_count(event.tokens)} tokens  {event.seconds:.1f} s  up {format_bytes(event.bytes_sent)}  "
        f"down {format_bytes(event.bytes_received)}  {event.digest[:12]}"
    )
