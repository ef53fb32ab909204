"""Who holds a fragment, in a swarm so large that nobody knows everybody: holders leave their addresses under keys of
the fragment, on a tree of their own (neighbourhood.py), and who needs some of them reads a handful there.

    RUN_ID/holders/F/01...     subkey = peer id -> Contact

Nobody does any of this before the peers of the run have more than one neighbourhood: until then all know all, and each
record would cost its 20 stores for nothing. Addresses change seldom, so they stay long, and a few of them are renewed
at a time.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from itertools import count

from swarm.errors import BadMessage
from swarm.network import frames, records
from swarm.network.dht import Dht
from swarm.network.neighbourhood import Neighbourhood
from swarm.network.records import Contact

TTL_S = 500.0
RENEWALS = 4
"""within so many calls of `publish` (one a minute) every fragment has had its turn"""


class Holders:
    """Of one run, as one peer knows them."""

    def __init__(self, dht: Dht, run_id: str, *, me: str) -> None:
        self._dht, self._run_id, self._me = dht, run_id, me
        self._trees: dict[int, Neighbourhood] = {}
        self._published, self._looked = count(), count()

    async def publish(self, fragments: Sequence[int], *, maddrs: list[str], reach: str) -> None:
        """A few of the fragments that this peer holds, others each time."""
        turn = next(self._published) % RENEWALS
        payload = json.dumps(Contact(peer_id=self._me, maddrs=maddrs, reach=reach).model_dump(exclude_defaults=True))
        for fragment in list(fragments)[turn::RENEWALS]:
            await self._tree(fragment).look()
            await self._tree(fragment).publish(payload, ttl_s=TTL_S)

    async def look(self, fragments: Sequence[int]) -> list[Contact]:
        """Some holders of one of these fragments, another one each time; not this peer."""
        if not fragments:
            return []
        found = await self._tree(fragments[next(self._looked) % len(fragments)]).look()
        contacts = []
        for peer_id, payload in found.items():
            try:
                contact = records.parse(Contact, frames.parse_head(payload.encode()))
            except BadMessage:
                continue
            if contact.peer_id == peer_id != self._me:
                contacts.append(contact)
        return contacts

    def _tree(self, fragment: int) -> Neighbourhood:
        if fragment not in self._trees:
            self._trees[fragment] = self._dht.neighbourhood(f"{self._run_id}/holders/{fragment}")
        return self._trees[fragment]


def wanted(held: Collection[int], fragments: int) -> list[int]:
    """Of which fragments of a run a peer needs to know other holders: its own, for their rounds; and those before and
    after, to send microbatches on."""
    around = {index + step for index in held for step in (-1, 0, 1)}
    return sorted(index for index in around if 0 <= index < fragments)
