"""Which head to believe: one that two peers attest (all there are, if fewer), of those with most tokens first.

A lone peer cannot make others take a state that nobody else has seen, be it by mistake or on purpose. Two that collude
can, as long as runs are open. After a restart of a whole swarm the newest head may be known to one peer only; it is
then taken after `ATTEST_S`, and said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from swarm.errors import NetworkError
from swarm.network.directory import Directory
from swarm.network.endpoint import Endpoint
from swarm.network.records import Head

ATTEST_S = 10.0
ASK_S = 5.0
MAX_ASKED = 8


def ranked(heads: Iterable[Head]) -> list[Head]:
    """Different heads of one fragment, the one that wins first: most tokens, then the lower digest, as everywhere."""
    return sorted(set(heads), key=lambda head: (-head.tokens, head.digest, head.version))


async def who_knows(
    endpoint: Endpoint, directory: Directory, peers: Iterable[str], *, fragment: int, head: Head
) -> list[str]:
    """Of these peers (the first `MAX_ASKED`), those in whose history the head is. Who does not answer does not know."""
    async def knows(peer_id: str) -> bool:
        header = {"fragment": fragment, "version": head.version, "digest": head.digest}
        try:
            answer, _ = await endpoint.call(
                peer_id, "knows", header, deadline_s=ASK_S, maddrs=directory.maddrs(peer_id)
            )
        except NetworkError:
            return False
        return answer.get("known") is True

    asked = list(peers)[:MAX_ASKED]
    answers = await asyncio.gather(*(knows(peer_id) for peer_id in asked))
    return [peer_id for peer_id, known in zip(asked, answers, strict=True) if known]
