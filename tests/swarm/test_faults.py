"""Nobody waits for the dead, no centre (I3, I5): kill peers of a real swarm and look at what the others do."""

from __future__ import annotations

import random
import signal
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from scripts.local_swarm import LocalPeer, LocalSwarm
from tests.swarm.support import Swarm, write_run

ROUND_DEADLINE_S = 60.0
"""a round after a death: the deadlines that peers derive, on a machine that is busy with other tests as well"""


class Watch:
    """All rounds that all peers of a swarm ever reported, and whether they agree."""

    def __init__(self) -> None:
        self.digests: defaultdict[tuple[int, int], dict[int, str]] = defaultdict(dict)
        self.newest: defaultdict[int, int] = defaultdict(int)

    def __call__(self, peer: LocalPeer, event: dict[str, object]) -> None:
        if event["event"] == "round":
            key = (int(event["fragment"]), int(event["version"]))  # type: ignore[call-overload]
            self.digests[key][id(peer)] = str(event["digest"])
            self.newest[key[0]] = max(self.newest[key[0]], key[1])

    def disagreements(self, alive: list[LocalPeer]) -> dict[tuple[int, int], set[str]]:
        """Versions of which these peers last reported different digests. What a peer committed in the moment of its
        death, and nobody else has seen, never happened: the others still have their drift."""
        among = {id(peer) for peer in alive}
        found = {key: {d for peer, d in digests.items() if peer in among} for key, digests in self.digests.items()}
        return {key: digests for key, digests in found.items() if len(digests) > 1}


def start(swarm: LocalSwarm, run: Path, number: int) -> None:
    first = swarm.start_peer("--new-swarm", "--run", str(run))
    swarm.wait_for(lambda: "ready" in first.newest, timeout_s=60, what="the first peer")
    watch = swarm.on_event

    def count(peer: LocalPeer, event: dict[str, object]) -> None:
        full_rounds[peer.number] += event["event"] == "round" and event["contributors"] == number
        watch(peer, event)

    full_rounds: defaultdict[int, int] = defaultdict(int)
    swarm.on_event = count
    for _ in range(number - 1):
        swarm.start_peer("--initial-peers", *first.last("ready", "maddrs"))
    swarm.wait_for(lambda: all("ready" in p.newest for p in swarm.peers), timeout_s=60, what="the others")
    swarm.wait_for(
        lambda: all(full_rounds[p.number] >= 2 for p in swarm.peers), timeout_s=60, what="rounds of all"
    )


def kill(peer: LocalPeer) -> list[psutil.Process]:
    """SIGKILL; returns what it had started, which must end with it."""
    children = psutil.Process(peer.process.pid).children(recursive=True)
    peer.process.send_signal(signal.SIGKILL)
    peer.process.wait()
    return children


def assert_gone(children: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, f"left behind: {alive}"


def rounds_go_on(swarm: LocalSwarm, watch: Watch, *, by: int = 2) -> None:
    before = dict(watch.newest)
    swarm.wait_for(
        lambda: all(watch.newest[f] >= version + by for f, version in before.items()), timeout_s=ROUND_DEADLINE_S,
        what=f"rounds after {before}",
    )


def test_the_first_peer_dies_in_mid_round_and_a_newcomer_joins_through_another(tmp_path: Path) -> None:
    watch = Watch()
    with Swarm(tmp_path, on_event=watch) as swarm:
        start(swarm, write_run(tmp_path), 3)
        first, second, third = swarm.peers
        assert_gone(kill(first))
        assert not [path for path in first.home.iterdir() if path.name.startswith("p2p-")], "its sockets are gone"
        rounds_go_on(swarm, watch)
        newcomer = swarm.start_peer("--initial-peers", *second.last("ready", "maddrs"))
        swarm.wait_for(
            lambda: newcomer.last("round", "contributors") >= 3, timeout_s=60, what="a round with the newcomer"
        )
        swarm.finish()
        assert [p.process.returncode for p in (second, third, newcomer)] == [0, 0, 0], newcomer.stderr
        assert second.heads == third.heads == newcomer.heads
        assert not watch.disagreements([second, third, newcomer])


@pytest.mark.timeout(600)
def test_twenty_kills_in_a_row(tmp_path: Path) -> None:
    """One peer after another, while their successors are still starting; two at least are there at any time."""
    watch, rng = Watch(), random.Random(0)
    with Swarm(tmp_path, on_event=watch) as swarm:
        start(swarm, write_run(tmp_path, averaging={"tokens_per_round": 8_000}), 4)
        children = []
        for _ in range(20):
            swarm.wait_for(lambda: len(ready(swarm)) >= 3, timeout_s=60, what="three peers to be there")
            victim = rng.choice(ready(swarm))
            children += kill(victim)
            addresses = [maddr for peer in ready(swarm) for maddr in peer.last("ready", "maddrs")]
            swarm.start_peer("--initial-peers", *addresses, number=victim.number)
            rounds_go_on(swarm, watch, by=1)
        swarm.wait_for(lambda: len(ready(swarm)) == 4, timeout_s=60, what="all to be there again")
        rounds_go_on(swarm, watch, by=2)
        assert_gone(children)
        last = swarm.running()
        swarm.finish()
        assert [peer.process.returncode for peer in last] == [0] * 4
        assert len({tuple(sorted(peer.heads.items())) for peer in last}) == 1, "one truth"
        assert not watch.disagreements(last), "no version was lost to a fork"
        for fragment, newest in watch.newest.items():
            seen = {version for f, version in watch.digests if f == fragment}
            assert seen == set(range(1, newest + 1)), "every version was applied by somebody"


def ready(swarm: LocalSwarm) -> list[LocalPeer]:
    return [peer for peer in swarm.running() if "ready" in peer.newest]
