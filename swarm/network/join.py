"""Ways into a swarm: connect to the initial peers, find the run, fetch its config and check it.

Joining is never starting: where no run is found by the deadline, that is an error which lists each address with its
own reason, because they usually differ.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from swarm.config import RunConfig, canonical_json, run_from_json
from swarm.errors import ConfigError, JoinError
from swarm.network.dht import Dht
from swarm.network.endpoint import SAME_IDENTITY, Endpoint
from swarm.network.maddr import peer_id_of

MAX_SKEW_S = 3.0
RETRY_S = 1.0
RUNS_KEY = "swarm/runs"
CONFIG_TTL_S = 120.0
CONFIG_COPIES = 5
"""peers that keep a run's config in the DHT, the lowest peer ids; the others only watch"""

log = logging.getLogger(__name__)


async def connect(endpoint: Endpoint, maddrs: list[str], *, deadline_s: float) -> list[str]:
    """Link to every address that answers; returns their peer ids. Tries until one does or the deadline passes.

    Raises JoinError: nobody answered (with a reason for each address), a clock off by more than `MAX_SKEW_S`, or a
    second process with the same identity.
    """
    targets = {maddr: peer_id_of(maddr) for maddr in maddrs}
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    reasons: dict[str, str] = {}
    while True:
        results = await asyncio.gather(
            *(endpoint.link_to(peer_id, maddrs=[maddr]) for maddr, peer_id in targets.items()), return_exceptions=True
        )
        answered = list(dict.fromkeys(link.peer_id for link in results if not isinstance(link, BaseException)))
        for maddr, error in zip(targets, results, strict=True):
            if isinstance(error, BaseException) and "dial backoff" not in str(error):  # that only hides the reason
                reasons[maddr] = str(error).splitlines()[-1].removeprefix("  why:").strip()
        if any(SAME_IDENTITY in reason for reason in reasons.values()):
            raise JoinError(
                "another peer with this identity is in the swarm",
                why="the home folder was copied, and its key with it; libp2p would mix the two up",
                do="stop the other one, or start this one with its own --home",
            )
        if answered:
            check_clock([endpoint.skews_s[peer_id] for peer_id in answered])
            return answered
        if loop.time() + RETRY_S > deadline:
            lines = [f"{maddr}: {reasons.get(maddr, 'no answer')}" for maddr in targets]
            raise JoinError(
                f"none of the {len(targets)} initial peers answered within {deadline_s:.0f} s",
                why="\n        ".join(lines),
                do="ask for a fresh join line: the peer may have moved. To start your own swarm, use --new-swarm",
            )
        await asyncio.sleep(RETRY_S)


def check_clock(skews_s: list[float]) -> None:
    """Raises JoinError where most others agree that this machine's clock is off."""
    skew = sorted(skews_s)[len(skews_s) // 2]
    if abs(skew) > MAX_SKEW_S:
        raise JoinError(
            f"this machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the swarm's",
            why=f"records expire by the clock, so at most {MAX_SKEW_S:.0f} s are allowed",
            do="set the clock by the network: `timedatectl set-ntp true` on Linux, date settings elsewhere",
        )


async def publish_run(dht: Dht, run: RunConfig, peers: list[str], my_peer_id: str) -> None:
    """Keep the run findable. Only a few peers store copies, or the record would grow with the swarm."""
    if my_peer_id in sorted([my_peer_id, *peers])[:CONFIG_COPIES]:
        await dht.publish(f"{run.run_id}/config", canonical_json(run).decode(), ttl_s=CONFIG_TTL_S)
        await dht.publish(RUNS_KEY, run.run_id, ttl_s=CONFIG_TTL_S)


async def find_run(dht: Dht, *, run_id: str | None, deadline_s: float) -> RunConfig:
    """The config of the run that is trained here, checked against the hash in its id. Raises JoinError."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    problem: Exception | None = None
    while True:
        runs = [run_id] if run_id else list(Counter((await dht.entries(RUNS_KEY)).values()))
        if len(runs) > 1:
            raise JoinError(
                f"there are {len(runs)} runs on this network", why=", ".join(sorted(runs)),
                do="say which one with --run-id",
            )
        if runs:
            for text in (await dht.entries(f"{runs[0]}/config")).values():
                try:
                    return run_from_json(text.encode(), run_id=runs[0])
                except ConfigError as error:
                    problem = error
        if loop.time() + RETRY_S > deadline:
            break
        await asyncio.sleep(RETRY_S)
    if problem is not None:
        raise JoinError("the run config of this swarm cannot be used", why=str(problem), do="join through another peer")
    raise JoinError(
        f"found no run {run_id + ' ' if run_id else ''}within {deadline_s:.0f} s",
        why="the initial peers answered, but nobody there has told the DHT of a run",
        do="check --run-id, or ask whether the run has ended. To start one, use --new-swarm",
    )


