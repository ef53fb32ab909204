"""A network in which messages get lost, come late, twice and in another order; lines are cut, and peers vanish.

Between two peers there is one link, as in the product (swarm/network/link.py): what was sent on it arrives on it or
not at all. The death of a process ends its links within a moment; a cut is noticed only when nothing has moved for
`STALL_S`, and what was under way when it heals may still arrive.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Protocol

from swarm.errors import PeerGone
from tests.unit.averaging.faults.loop import OUTSIDE, Process, StepLoop

STALL_S = 20.0
DIAL_S = 10.0
NOTICE_S = 0.2
"""the end of a process is noticed within so long"""


class Party(Protocol):
    id: str
    process: Process

    def on_link_closed(self, link: Link) -> None: ...


class Link:
    def __init__(self, one: Party, other: Party) -> None:
        self.ends, self.closed = (one, other), False

    def other(self, party: Party) -> Party:
        return self.ends[1] if party is self.ends[0] else self.ends[0]


class Network:
    def __init__(self, loop: StepLoop, dice: random.Random, *, loss: float, twice: float, delay_s: float) -> None:
        self._loop, self._dice = loop, dice
        self.loss, self.twice, self.delay_s = loss, twice, delay_s
        self.parties: dict[str, Party] = {}
        """by peer id: the process that has that identity now"""
        self._links: dict[frozenset[str], Link] = {}
        self._sides: list[set[str]] = []
        self._under_way: list[tuple[Link, Party, Callable[[], None]]] = []
        """sent over a line that is cut"""

    def arrives(self, party: Party) -> None:
        """A process begins to listen under its peer's identity."""
        self.parties[party.id] = party

    def dies(self, party: Party) -> None:
        """Its links end, one by one."""
        for link in list(self._links.values()):
            if party in link.ends:
                self._later(self._dice.uniform(0.0, NOTICE_S), self.close, link)

    def cut(self, side: set[str]) -> None:
        """These peers hear nothing of the others, and they nothing of them."""
        self._sides.append(side)
        self._later(STALL_S, self._stall)

    def heal(self, side: set[str]) -> None:
        self._sides.remove(side)
        under_way, self._under_way = self._under_way, []
        for link, sender, deliver in under_way:
            self._travel(link, sender, deliver)

    def can_talk(self, one: str, other: str) -> bool:
        return not any((one in side) != (other in side) for side in self._sides)

    def link(self, one: Party, other_id: str) -> Link | None:
        """The link that there is, or None."""
        link = self._links.get(frozenset((one.id, other_id)))
        return link if link is not None and not link.closed and one in link.ends else None

    def is_linked(self, one: Party, other_id: str) -> bool:
        return self.link(one, other_id) is not None

    def try_link(self, one: Party, other_id: str) -> Link | None:
        """A link, made if it can be."""
        link, other = self.link(one, other_id), self.parties.get(other_id)
        if link is None and other is not None and other is not one and self.can_talk(one.id, other_id):
            if other.process.dead or one.process.dead:
                return None
            old = self._links.get(frozenset((one.id, other_id)))
            if old is not None and not old.closed:
                self.close(old)  # of a process that had this identity before
            link = self._links[frozenset((one.id, other_id))] = Link(one, other)
        return link

    async def dial(self, one: Party, other_id: str) -> Link:
        """Raises PeerGone: at once where nobody listens, late where the line is cut."""
        link = self.try_link(one, other_id)
        if link is None:
            await asyncio.sleep(self._delay_s() if self.can_talk(one.id, other_id) else DIAL_S)
            link = self.try_link(one, other_id)
        if link is None:
            raise PeerGone("cannot reach it")
        return link

    def send(self, link: Link, sender: Party, deliver: Callable[[], None]) -> None:
        """`deliver` is called when the message is there, in no process's context."""
        if sender.process.dead or link.closed:
            return
        if self._dice.random() >= self.loss:
            self._travel(link, sender, deliver)
        if self._dice.random() < self.twice:
            self._travel(link, sender, deliver)

    def _travel(self, link: Link, sender: Party, deliver: Callable[[], None]) -> None:
        self._later(self._delay_s(), self._arrive, link, sender, deliver)

    def _arrive(self, link: Link, sender: Party, deliver: Callable[[], None]) -> None:
        if link.closed or link.other(sender).process.dead:
            return
        if self.can_talk(link.ends[0].id, link.ends[1].id):
            deliver()
        else:
            self._under_way.append((link, sender, deliver))

    def close(self, link: Link) -> None:
        if link.closed:
            return
        link.closed = True
        for party in link.ends:
            party.process.post(party.on_link_closed, link)

    def _stall(self) -> None:
        for link in list(self._links.values()):
            if not link.closed and not self.can_talk(link.ends[0].id, link.ends[1].id):
                self.close(link)
        self._under_way = [item for item in self._under_way if not item[0].closed]

    def _delay_s(self) -> float:
        return self.delay_s * self._dice.uniform(0.5, 1.5) * (6 if self._dice.random() < 0.05 else 1)

    def _later(self, delay_s: float, function: Callable[..., None], *arguments: object) -> None:
        self._loop.call_later(delay_s, function, *arguments, context=OUTSIDE.copy())
