"""Ways into a swarm: connect to the initial peers, find the run, fetch its config and check it.

Joining is never starting: where no run is found by the deadline, that is an error which lists each address with its
own reason, because they usually differ.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, defaultdict

from swarm.config import RunConfig, canonical_json, run_from_json
from swarm.errors import ConfigError, JoinError, NobodyAnswers
from swarm.network.dht import Dht
from swarm.network.endpoint import SAME_IDENTITY, Endpoint
from swarm.network.link import Link
from swarm.network.maddr import peer_id_of

MAX_SKEW_S = 3.0
RETRY_S = 1.0
FIRST_TRY_S = 5.0
"""an address gets this long even where the deadline is shorter"""
SOONEST_S, OTHERS_S = 1.0, 2.0
"""after the first has answered, the other addresses get as long again as that took, and so long at least and at most:
some of an address book are always gone, and whoever comes back would wait for them. Not less: those who have answered
vote on whether this machine's clock is right, and one neighbour's alone may be the one that is off"""
MAX_RUNS = 8
RUN_ID = re.compile("[a-z0-9][a-z0-9-]{0,39}-[0-9a-f]{12}")
RUNS_KEY = "swarm/runs"
CONFIG_TTL_S = 360.0
CONFIG_COPIES = 5
"""peers that keep a run's config in the DHT, the lowest peer ids; the others only watch"""


async def connect(endpoint: Endpoint, maddrs: list[str], *, deadline_s: float) -> list[str]:
    """Link to every address that answers; returns their peer ids. Tries until one does or the deadline passes.

    Raises JoinError: nobody answered (with a reason for each address), a clock off by more than `MAX_SKEW_S`, or a
    second process with the same identity.
    """
    targets: defaultdict[str, list[str]] = defaultdict(list)
    for maddr in maddrs:
        targets[peer_id_of(maddr)].append(maddr)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    reasons: dict[str, str] = {}
    while True:
        results = await _try_each(endpoint, targets, limit_s=max(deadline - loop.time(), FIRST_TRY_S))
        answered = [peer_id for peer_id, result in results.items() if isinstance(result, Link)]
        for peer_id, result in results.items():
            if not isinstance(result, Link) and "dial backoff" not in result:  # that only hides the reason
                reasons |= {maddr: _reason_for(maddr, result) for maddr in targets[peer_id]}
        if any(SAME_IDENTITY in reason for reason in reasons.values()):
            raise JoinError(
                "another peer with this identity is in the swarm",
                why="the home folder was copied, and its key with it; libp2p would mix the two up",
                do="stop the other one, or start this one with its own --home",
            )
        if answered:
            check_clock([endpoint.skews_s[peer_id] for peer_id in answered if peer_id in endpoint.skews_s])
            return answered
        if loop.time() + RETRY_S > deadline:
            lines = [f"{maddr}: {reasons.get(maddr, 'no answer')}" for maddr in dict.fromkeys(maddrs)]
            raise NobodyAnswers(
                f"none of the {len(targets)} initial peers answered within {deadline_s:.0f} s",
                why="\n        ".join(lines),
                do="ask for a fresh join line: the peer may have moved. To start your own swarm, use --new-swarm",
            )
        await asyncio.sleep(RETRY_S)


async def _try_each(
    endpoint: Endpoint, targets: dict[str, list[str]], *, limit_s: float
) -> dict[str, Link | str]:
    """Dial all at the same time: peer id -> link, or what went wrong."""
    loop = asyncio.get_running_loop()
    tasks = {
        asyncio.create_task(endpoint.link_to(peer_id, maddrs=maddrs)): peer_id for peer_id, maddrs in targets.items()
    }
    results: dict[str, Link | str] = {peer_id: f"no answer within {limit_s:.0f} s" for peer_id in targets}
    began = loop.time()
    waiting, end = set(tasks), began + limit_s
    while waiting and loop.time() < end:
        done, waiting = await asyncio.wait(
            waiting, timeout=max(end - loop.time(), 0), return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            error = task.exception()
            results[tasks[task]] = task.result() if error is None else str(error) or type(error).__name__
            if error is None:
                took_s = loop.time() - began
                end = min(end, loop.time() + min(max(took_s, SOONEST_S), OTHERS_S))
    for task in waiting:
        task.cancel()
    return results


def _reason_for(maddr: str, text: str) -> str:
    """The line about this address where the error lists several, else its last."""
    lines = [line.strip().removeprefix("why:").strip() for line in text.splitlines() if line.strip()] or ["no answer"]
    place = maddr.partition("/p2p/")[0]
    about = [line for line in lines if f"[{place}]" in line]
    return (about or lines)[-1][:300]


def check_clock(skews_s: list[float]) -> None:
    """Raises JoinError where most others agree that this machine's clock is off."""
    off = sorted(skew for skew in skews_s if abs(skew) > MAX_SKEW_S)
    if len(off) * 2 > len(skews_s):
        skew = off[len(off) // 2]
        raise JoinError(
            f"this machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the swarm's",
            why=f"records expire by the clock, so at most {MAX_SKEW_S:.0f} s are allowed",
            do="set the clock by the network: `timedatectl set-ntp true` on Linux, date settings elsewhere",
        )


async def publish_run(dht: Dht, run: RunConfig, peers: list[str], my_peer_id: str) -> None:
    """Keep the run findable. Only a few peers store copies, or the record would grow with the swarm - but all do where
    there is none: strangers with low peer ids could keep quiet. `peers`: those that this one knows. In a large swarm
    each knows others, and each some that are the lowest it knows; so they do without where there are enough."""
    key, text = f"{run.run_id}/config", canonical_json(run).decode()
    copies = [(key, text, await dht.entries(key)), (RUNS_KEY, run.run_id, await dht.entries(RUNS_KEY))]
    keepers = [{peer_id for peer_id, kept in stored.items() if kept == payload} for _, payload, stored in copies]
    chosen = my_peer_id in sorted([my_peer_id, *peers])[:CONFIG_COPIES]
    enough = all(sum(peer_id < my_peer_id for peer_id in kept) >= 2 * CONFIG_COPIES for kept in keepers)
    if (chosen and not enough) or not all(keepers):
        for name, payload, _ in copies:
            await dht.publish(name, payload, ttl_s=CONFIG_TTL_S)


async def find_run(dht: Dht, *, run_id: str | None, deadline_s: float) -> RunConfig:
    """The config of the run that is trained here, checked against the hash in its id. Raises JoinError."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    problem: Exception | None = None
    while True:
        named = [run_id] if run_id else await _runs(dht)
        found: list[RunConfig] = []
        for name in named:
            for text in (await dht.entries(f"{name}/config")).values():
                try:
                    found.append(run_from_json(text.encode(), run_id=name))
                    break
                except ConfigError as error:
                    problem = error
        if len(found) > 1:
            raise JoinError(
                f"there are {len(found)} runs on this network", why=", ".join(sorted(run.run_id for run in found)),
                do="say which one with --run-id",
            )
        if found:
            return found[0]
        if loop.time() + RETRY_S > deadline:
            break
        await asyncio.sleep(RETRY_S)
        await dht.meet_again()
    if problem is not None:
        why = str(problem)
        raise JoinError("the run config of this swarm cannot be used", why=why, do="join through another peer")
    raise JoinError(
        f"found no run {run_id + ' ' if run_id else ''}within {deadline_s:.0f} s",
        why="the initial peers answered, but nobody there has told the DHT of a run",
        do="check --run-id, or ask whether the run has ended. To start one, use --new-swarm",
    )


async def _runs(dht: Dht) -> list[str]:
    """What others call runs, most often named first: a stranger may name some that have no config, or no sane name."""
    names = Counter(name for name in (await dht.entries(RUNS_KEY)).values() if RUN_ID.fullmatch(name))
    return [name for name, _ in names.most_common(MAX_RUNS)]
