"""Who is in the swarm, as this peer sees it: the statuses that peers tell each other directly, every 1.5 s, or less
often where they are many.

The DHT fills it at the start and now and then; from then on news comes from the peers themselves, and each passes on
the addresses of a few others (gossip), so the swarm holds together when the DHT or the first peer is gone (I5).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

from swarm.errors import NetworkError, PeerRefused
from swarm.network import records
from swarm.network.beats import MAX_GOSSIP, Beat, Beats
from swarm.network.dht import Dht
from swarm.network.endpoint import Endpoint
from swarm.network.holders import Holders, wanted
from swarm.network.link import Answer, Link
from swarm.network.reachability import OUTBOUND, can_meet
from swarm.network.records import Contact, Status

HEARTBEAT_S = 1.5
FEW = 16
"""with more peers than this each is told less often, and the DHT too, so that it costs no more; the death of a process
is seen at once all the same, for its link ends"""
MAX_SLOWNESS = 4.0
UNSURE_S = 2.0
"""a peer whose link has ended gets this long to say that it is still there"""
ALIVE_S = 6.0
"""silent for longer than this: not counted on for a round"""
FORGET_S = 120.0
"""silent for longer than this: forgotten, but for the `REMEMBERED` last heard, so that a peer whose own connection was
cut finds back to the others"""
REMEMBERED = 32
RETRY_S = 30.0
"""the silent are tried ever less often, at least this often"""
DHT_TTL_S = 60.0
PUBLISHED_A_TTL = 2.2
"""times: one may fail. Whoever looks for where to leave a record is told all that is there already, by everybody asked,
which is nearly all that a quiet swarm sends"""
READ_EVERY = 2
"""times that this peer leaves its status in the DHT until it reads the others' again, while it hears some directly and
they are few"""
MAX_PEERS = 1000
MAX_HEARSAY = 200
"""peers that others have told of and that have not spoken to us: anybody can make up any number of those"""
MAX_HEARTBEATS = 32
"""peers told in one beat, drawn anew each time"""
HEARSAY_S = 60.0

log = logging.getLogger(__name__)


@dataclass
class Known:
    """What is known of one other peer; times on the loop's clock."""

    maddrs: list[str]
    since: float
    """when we were told of it or, later, last heard it"""
    reach: str = ""
    """as it says itself or, before that, as others say"""
    status: Status | None = None
    """its last word to us; None: it has not spoken yet"""
    heard_at: float = float("-inf")
    """of its last word, or never where the link has ended since"""
    hearsay_at: float = float("-inf")
    """when others last told of it"""
    tried_at: float = float("-inf")
    lost_at: float = float("-inf")
    """when its link ended, until it speaks again"""


class Directory:
    def __init__(
        self, endpoint: Endpoint, dht: Dht, *, run_id: str, my_status: Callable[[], Status], rng: random.Random
    ) -> None:
        self._endpoint, self._dht, self._run_id, self._my_status, self._rng = endpoint, dht, run_id, my_status, rng
        self.reach = ""
        """of this peer; see reachability.py"""
        self._known: dict[str, Known] = {}
        self._spoken: set[str] = set()
        """those of whom there is a status"""
        self._holders = Holders(dht, run_id, me=endpoint.peer_id)
        self._loop = asyncio.get_running_loop()
        self._beats = Beats(self._loop.time)
        self._tasks: list[asyncio.Task[None]] = []
        self._beating: set[asyncio.Task[None]] = set()
        self.on_status: Callable[[str, Status], None] = lambda peer_id, status: None
        self.on_new_address: Callable[[list[str]], None] = lambda maddrs: None
        """of a peer that has spoken to us"""
        endpoint.on("status", self._on_status)
        endpoint.on_link_closed = self._on_link_closed

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._beat_forever()), asyncio.create_task(self._dht_forever())]

    def alive(self) -> dict[str, Status]:
        """Peers of this run that spoke to us in the last `ALIVE_S` seconds (longer in a large swarm); not this one, no
        observers. Any thread."""
        since = self._alive_since()
        return {
            peer_id: known.status for peer_id, known in list(self._known.items())
            if known.status is not None and known.heard_at > since
        }

    def _alive_since(self) -> float:
        return self._loop.time() - ALIVE_S * self._slowness()

    def _is_alive(self, known: Known) -> bool:
        return known.status is not None and known.heard_at > self._alive_since()

    def _slowness(self) -> float:
        """How many times longer all this may take than among a few; 4 at most, as of 64, or nobody would be known to be
        alive."""
        return min(max(1.0, len(self._spoken) / FEW), MAX_SLOWNESS)

    def maddrs(self, peer_id: str) -> list[str]:
        return self._known[peer_id].maddrs if peer_id in self._known else []

    def reach_of(self, peer_id: str) -> str:
        return self._known[peer_id].reach if peer_id in self._known else ""

    def heard_of_outbound(self) -> bool:
        """Is there a peer that only dials, and that this one perhaps cannot talk to? Any news of the last minute."""
        now = self._loop.time()
        return any(
            known.reach == OUTBOUND and now - max(known.since, known.hearsay_at) < HEARSAY_S
            for known in self._known.values()
        )

    def meet(self, peer_id: str, maddrs: list[str], reach: str = "") -> None:
        """Learn of a peer from others; it is asked for its status at the next beat."""
        known = self._known.get(peer_id)
        if known is not None:
            if known.status is None:
                known.reach, known.hearsay_at = reach, self._loop.time()
            if maddrs and not self._is_alive(known):  # what it says of itself is better than what others say
                known.maddrs = maddrs
            return
        hearsay = sum(other.status is None for other in self._known.values())
        if peer_id != self._endpoint.peer_id and len(self._known) < MAX_PEERS and hearsay < MAX_HEARSAY:
            now = self._loop.time()
            self._known[peer_id] = Known(maddrs, since=now, reach=reach, hearsay_at=now)

    def known(self) -> list[str]:
        """Everybody this peer has an address or a word of, alive or not."""
        return list(self._known)

    async def tell(self, peer_id: str) -> None:
        """Exchange statuses with one peer now. A failure is no news: the next beat tries again."""
        known = self._known.get(peer_id)
        if known is None:
            return
        known.tried_at = asyncio.get_running_loop().time()
        try:
            answer, _ = await self._endpoint.call(
                peer_id, "status", self._my_beat(peer_id), deadline_s=ALIVE_S, maddrs=known.maddrs
            )
            self._hear(peer_id, records.parse(Beat, answer))
        except NetworkError as error:
            known.lost_at = float("-inf")  # asked: it is really gone
            log.debug("no status from %s: %s", peer_id, error)

    async def tell_all(self) -> None:
        """Exchange statuses with everybody now, and refresh the DHT's copy."""
        await asyncio.gather(*(self.tell(peer_id) for peer_id in self.alive()), self._publish())

    def contacts(self, peer_ids: Iterable[str], *, max_maddrs: int = 8) -> list[Contact]:
        """How to reach these peers, as far as it is known here: to pass on."""
        return [
            Contact(peer_id=p, maddrs=self._known[p].maddrs[:max_maddrs], reach=self._known[p].reach)
            for p in peer_ids if p in self._known
        ]

    async def introduce(self, peer_ids: Iterable[str]) -> None:
        """Peers that somebody named, perhaps without an address: get to know them, or a swarm whose first peer dies
        young falls apart into peers that had only met that one."""
        strangers = [p for p in peer_ids if p not in self._known and p != self._endpoint.peer_id]
        if strangers:
            for peer_id in strangers:
                self.meet(peer_id, [])
            await self.refresh()  # their addresses
            await asyncio.gather(*(
                self.tell(peer_id) for peer_id in strangers
                if peer_id in self._known and can_meet(self.reach, self._known[peer_id].reach)
            ))

    async def refresh(self) -> None:
        """Read the DHT and meet whoever is in it: everybody, or in a large swarm neighbours, and some of those who hold
        what this peer works with."""
        for peer_id, status in (await self._dht.statuses(self._run_id)).items():
            if status.role != "observer":
                self.meet(peer_id, status.maddrs, status.reach)
        if self.is_crowded():
            mine = self._my_status()
            for contact in await self._holders.look(wanted(mine.held(), len(mine.heads))):
                self.meet(contact.peer_id, contact.maddrs, contact.reach)

    def is_crowded(self) -> bool:
        """Are there more peers than one record of the DHT has room for?"""
        return self._dht.peers(self._run_id).depth > 0

    def _my_beat(self, to: str) -> dict[str, Any]:
        others = {p: self._known[p].maddrs for p in self.alive() if p != to}
        news = self._beats.news(to, {
            p: maddrs for p, maddrs in others.items() if maddrs or self._known[p].reach == OUTBOUND
        })
        newcomer = to not in self._known or self._known[to].status is None
        chosen = self._rng.sample(news, min(len(news), MAX_GOSSIP if newcomer else 2))
        return self._beats.make(to, self._my_status(), self.contacts(chosen))

    async def _on_status(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        beat = records.parse(Beat, header)
        if beat.status is not None and beat.status.run_id != self._run_id:
            raise PeerRefused(f"this peer trains {self._run_id}")
        self._hear(link.peer_id, beat)
        return self._my_beat(link.peer_id), b""

    def _hear(self, peer_id: str, beat: Beat) -> None:
        """Raises BadMessage where it makes no status of what that peer has told before."""
        status = self._beats.hear(peer_id, beat)
        if status is None:  # a life sign, and no news; what it builds on, this peer does not have
            status = self._known[peer_id].status if peer_id in self._known else None
        if status is None or status.run_id != self._run_id:
            return
        now = asyncio.get_running_loop().time()
        if status.role == "observer":
            self._drop(peer_id)
        elif peer_id != self._endpoint.peer_id and self._has_room_for(peer_id):
            known = self._known.setdefault(peer_id, Known([], since=now))
            new_address = bool(status.maddrs) and (known.status is None or known.maddrs != status.maddrs)
            known.status, known.since, known.heard_at, known.lost_at = status, now, now, float("-inf")
            known.reach = status.reach
            self._spoken.add(peer_id)
            if new_address:
                known.maddrs = status.maddrs
                self.on_new_address(known.maddrs)
            self.on_status(peer_id, status)
        for contact in beat.contacts:
            self.meet(contact.peer_id, contact.maddrs, contact.reach)

    def _has_room_for(self, peer_id: str) -> bool:
        """Who speaks takes the place of one that we have only heard of, or of the one that is silent for longest."""
        if peer_id in self._known or len(self._known) < MAX_PEERS:
            return True
        oldest = min(self._known, key=lambda other: (self._known[other].status is not None, self._known[other].since))
        if self._is_alive(self._known[oldest]):
            return False
        self._drop(oldest)
        return True

    def _drop(self, peer_id: str) -> None:
        self._known.pop(peer_id, None)
        self._spoken.discard(peer_id)

    def unsure(self) -> bool:
        """A link has ended a moment ago, and whether its peer did as well is still being asked."""
        return any(self._loop.time() - known.lost_at < UNSURE_S for known in self._known.values())

    def _on_link_closed(self, peer_id: str) -> None:
        """The connection ended: most likely the process did. Do not count on it until it speaks again, and ask."""
        if peer_id in self._known:
            known = self._known[peer_id]
            known.heard_at, known.lost_at = float("-inf"), self._loop.time()
            self._spawn(self.tell(peer_id))

    def _spawn(self, beat: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(beat)
        self._beating.add(task)
        task.add_done_callback(self._beating.discard)

    async def _beat_forever(self) -> None:
        while True:
            self._forget()
            due = self._due()
            for peer_id in self._rng.sample(due, min(len(due), MAX_HEARTBEATS)):
                self._known[peer_id].tried_at = asyncio.get_running_loop().time()
                self._spawn(self.tell(peer_id))
            await asyncio.sleep(HEARTBEAT_S * self._rng.uniform(0.4, 0.6))

    def _due(self) -> list[str]:
        """Who is to be told in this beat."""
        now, alive = asyncio.get_running_loop().time(), self.alive()
        heartbeat_s = HEARTBEAT_S * self._slowness()

        def pause_s(peer_id: str, known: Known) -> float:
            return heartbeat_s if peer_id in alive else min(max(3 * HEARTBEAT_S, (now - known.since) / 4), RETRY_S)

        return [
            peer_id for peer_id, known in self._known.items()
            if (can_meet(self.reach, known.reach) or self._endpoint.is_linked(peer_id))
            and now - max(known.tried_at, known.heard_at) >= pause_s(peer_id, known)
        ]

    def _forget(self) -> None:
        now = asyncio.get_running_loop().time()
        spoken = [peer_id for peer_id, known in self._known.items() if known.status is not None]
        kept = set(sorted(spoken, key=lambda peer_id: -self._known[peer_id].since)[:REMEMBERED])
        for peer_id, known in list(self._known.items()):
            if now - known.since > FORGET_S and peer_id not in kept:
                self._drop(peer_id)
        self._beats.keep_only(self._known)

    async def _dht_forever(self) -> None:
        for number in count():
            with contextlib.suppress(Exception):  # a hint: whatever goes wrong here goes right next time
                await self._publish()
                if number % READ_EVERY == 0 or not self.alive() or self.is_crowded():
                    await self.refresh()
            pause_s = DHT_TTL_S / PUBLISHED_A_TTL * self._slowness()
            await asyncio.sleep(pause_s * self._rng.uniform(0.85, 1.05))

    async def _publish(self) -> None:
        status = self._my_status()
        if status.role == "observer":
            return
        text = json.dumps(status.model_dump(exclude_defaults=True), separators=(",", ":"))
        if len(text) > records.MAX_RECORD_BYTES * 3 // 4:  # heads of very many fragments: they are told directly
            text = json.dumps(status.model_copy(update={"heads": [], "pending": [], "spares": []}).model_dump())
        ttl_s = DHT_TTL_S * self._slowness()
        await self._dht.peers(self._run_id).publish(text, ttl_s=ttl_s)
        if self.is_crowded():
            await self._holders.publish(list(status.held()), maddrs=status.maddrs, reach=status.reach)

    async def stop(self) -> None:
        tasks = [*self._tasks, *self._beating]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
