"""Heartbeats, made short: the first one says all that a peer says of itself, the next ones what has changed.

Most of a status is the same as a second ago, and half of the rest are digests, which no compression makes smaller. So
each beat names the status of the other that its sender has (`have`, the head of a hash), and what is told is the
difference to that one. Who has none that the other remembers, after a restart on either side, is told everything; so
nothing needs to be agreed on or repaired. Addresses of third peers are passed on again after `AGAIN_S`, or when they
have changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from swarm.network.records import Contact, Status, Strict, parse

MAX_GOSSIP = 8
KEPT = 3
"""statuses of each peer, of either side: beats in both directions may cross"""
AGAIN_S = 30.0

Mark = Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")]


class Beat(Strict):
    status: Status | None = None
    """all of it; None: the status with the mark `base`, with these changes"""
    base: Mark = ""
    changed: dict[str, Any] = {}
    gone: Annotated[list[str], Field(max_length=len(Status.model_fields))] = []
    """what has its default value again"""
    have: Mark = ""
    """mark of the newest status of the receiver that the sender has; empty: none"""
    contacts: Annotated[list[Contact], Field(max_length=MAX_GOSSIP)] = []

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> Beat:
        if (self.status is None) != bool(self.base):
            raise ValueError("either a status or a base")
        return self


@dataclass(frozen=True)
class Told:
    """A status, whoever told it, and what becomes of it; the three say the same, and none is ever changed."""

    status: Status
    document: dict[str, Any]
    mark: str


class Beats:
    """What this peer and each other one have told each other."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._mine: Told | None = None
        """what was told last: in a crowd it is the same to all"""
        self._told: dict[str, dict[str, Told]] = {}
        """peer id -> mark -> what it was told, the newest last"""
        self._heard: dict[str, dict[str, Told]] = {}
        self._have: dict[str, str] = {}
        """peer id -> mark of what it says it has of us"""
        self._passed_on: dict[str, dict[str, tuple[list[str], float]]] = {}
        """peer id -> of whom it was told -> (addresses, when)"""

    def make(self, to: str, status: Status, contacts: list[Contact]) -> dict[str, Any]:
        """The beat for a peer, as plain data."""
        if self._mine is None or self._mine.status != status:
            self._mine = _marked(status)
        told, base = self._told.setdefault(to, {}), self._have.get(to, "")
        old = told.get(base)
        _keep(told, self._mine)
        have = next(reversed(self._heard.get(to, {})), "")
        if old is None:
            beat = Beat(status=status, have=have, contacts=contacts)
        else:
            new, before = self._mine.document, old.document
            changed = {key: value for key, value in new.items() if key not in before or before[key] != value}
            gone = [key for key in before if key not in new]
            beat = Beat(base=base, changed=changed, gone=gone, have=have, contacts=contacts)
        now = self._clock()
        recent = {who: told for who, told in self._passed_on.get(to, {}).items() if now - told[1] < AGAIN_S}
        self._passed_on[to] = recent | {contact.peer_id: (contact.maddrs, now) for contact in contacts}
        return beat.model_dump(exclude_defaults=True)

    def hear(self, peer_id: str, beat: Beat) -> Status | None:
        """The status that a peer tells; None where it builds on one that we do not have: the next one will be whole.
        Raises BadMessage where what comes of it is no status."""
        self._have[peer_id] = beat.have
        heard = self._heard.setdefault(peer_id, {})
        if beat.status is not None:
            now = _marked(beat.status)
        elif (old := heard.get(beat.base)) is None:
            heard.clear()
            return None
        elif not beat.changed and not beat.gone:
            now = old
        else:
            kept = {key: value for key, value in old.document.items() if key not in beat.gone}
            now = _marked(parse(Status, {**kept, **beat.changed}))
        _keep(heard, now)
        return now.status

    def news(self, to: str, of: Mapping[str, list[str]]) -> list[str]:
        """Of these peers with their addresses, those that are worth telling that peer about."""
        passed_on, now = self._passed_on.get(to, {}), self._clock()
        return [
            who for who, maddrs in of.items()
            if who not in passed_on or maddrs != passed_on[who][0] or now - passed_on[who][1] >= AGAIN_S
        ]

    def keep_only(self, peer_ids: Container[str]) -> None:
        """Forget all others: whoever links to us can say something. The next beat between us is just a whole one."""
        memories: list[dict[str, Any]] = [self._told, self._heard, self._have, self._passed_on]
        for memory in memories:
            for stranger in [peer_id for peer_id in memory if peer_id not in peer_ids]:
                del memory[stranger]


def _marked(status: Status) -> Told:
    """As it looks on the wire, so that both sides have the same."""
    document = json.loads(status.model_dump_json(exclude_defaults=True))
    mark = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]
    return Told(status, document, mark)


def _keep(those: dict[str, Told], told: Told) -> None:
    those.pop(told.mark, None)  # it becomes the newest
    those[told.mark] = told
    while len(those) > KEPT:
        del those[next(iter(those))]
