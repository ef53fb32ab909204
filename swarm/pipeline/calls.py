"""The chain's calls over this peer's links, and who could be called: the directory's living holders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from swarm.network import records
from swarm.network.directory import Directory
from swarm.network.endpoint import Endpoint
from swarm.network.link import Answer, Link
from swarm.network.records import Status
from swarm.pipeline.chain import Chain
from swarm.pipeline.messages import Verdicts, Working
from swarm.pipeline.onward import Onward
from swarm.pipeline.routing import Holder

MAX_BODY_BYTES = 2**28


class LinkCalls:
    """Calls by way of the endpoint, which dials where there is no link yet."""

    def __init__(self, endpoint: Endpoint, directory: Directory) -> None:
        self._endpoint, self._directory = endpoint, directory

    async def call(
        self, peer_id: str, method: str, header: dict[str, Any], body: bytes = b"", *, deadline_s: float,
        max_answer: int = 0, on_head: Callable[[], None] = lambda: None,
    ) -> Answer:
        maddrs = self._directory.maddrs(peer_id)
        return await self._endpoint.call(
            peer_id, method, header, body, deadline_s=deadline_s, max_answer=max_answer, maddrs=maddrs, steady=True,
            on_head=on_head,
        )

    def waiting_bytes(self, peer_id: str) -> int:
        return self._endpoint.waiting_bytes(peer_id)

    def last_heard(self, peer_id: str) -> float:
        return self._endpoint.last_heard(peer_id)

    async def notify(self, peer_id: str, method: str, header: dict[str, Any], *, deadline_s: float) -> None:
        maddrs = self._directory.maddrs(peer_id)
        await self._endpoint.notify(peer_id, method, header, deadline_s=deadline_s, maddrs=maddrs)


def listen(onward: Onward, endpoint: Endpoint) -> None:
    """For who asks and serves nothing: from now on the peers that are asked can say that they are at it."""

    async def on_working(link: Link, header: dict[str, Any], body: bytes) -> Answer:
        onward.on_working(link.peer_id, records.parse(Working, header))
        return {}, b""

    endpoint.on("working", on_working)


def serve(chain: Chain, endpoint: Endpoint) -> None:
    """From now on others may send microbatches here."""

    async def on_microbatch(link: Link, header: dict[str, Any], body: bytes) -> Answer:
        return await chain.on_microbatch(link, header, body)

    async def on_withdrawn(link: Link, header: dict[str, Any], body: bytes) -> Answer:
        await chain.on_withdrawn(link.peer_id, records.parse(Working, header))
        return {}, b""

    async def on_verdicts(link: Link, header: dict[str, Any], body: bytes) -> Answer:
        verdicts = records.parse(Verdicts, header).verdicts
        return {"missing": await chain.judge(link.peer_id, verdicts)}, b""

    endpoint.on("microbatch", on_microbatch, max_body=MAX_BODY_BYTES, steady=True)
    listen(chain.onward, endpoint)
    endpoint.on("withdrawn", on_withdrawn)
    endpoint.on("verdicts", on_verdicts)


def holders(alive: Mapping[str, Status]) -> list[Holder]:
    """The stages of these peers, as their statuses tell."""
    stages = {peer_id: status.serving for peer_id, status in alive.items()}
    return [
        Holder(peer_id, stage[0], stage[1], alive[peer_id].leaving)
        for peer_id, stage in stages.items() if stage is not None and stage[0] < stage[1]
    ]
