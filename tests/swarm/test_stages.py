"""Peers that hold a part of the model, for real: processes, sockets, kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.local_swarm import LocalPeer, LocalSwarm
from tests.swarm.support import GPTJ, Swarm, write_run
from tests.swarm.test_faults import Watch, assert_gone, kill, ready, rounds_go_on


def start(swarm: LocalSwarm, run: Path, stages: list[str]) -> None:
    first = swarm.start_peer("--new-swarm", "--run", str(run), "--fragments", stages[0])
    swarm.wait_for(lambda: "ready" in first.newest, timeout_s=60, what="the first peer")
    for stage in stages[1:]:
        swarm.start_peer("--initial-peers", *first.last("ready", "maddrs"), "--fragments", stage)
    swarm.wait_for(lambda: all("ready" in peer.newest for peer in swarm.peers), timeout_s=60, what="the others")


def four_fragments(folder: Path, **averaging: object) -> Path:
    return write_run(
        folder, fragments=4, model={"config": {**GPTJ, "n_layer": 4}},
        averaging={"tokens_per_round": 4_000, **averaging},
    )


def held_everywhere_alike(peers: list[LocalPeer]) -> set[int]:
    """Fragments held by several of these, with one digest each."""
    shared = set()
    for fragment in range(4):
        heads = {peer.heads[fragment] for peer in peers if fragment in peer.heads}
        assert len(heads) == 1, f"fragment {fragment}: {heads}"
        shared |= {fragment} if sum(fragment in peer.heads for peer in peers) > 1 else set()
    return shared


@pytest.mark.timeout(300)
def test_three_stages_with_two_holders_each_learn_and_outlive_their_peers(tmp_path: Path) -> None:
    """A middle holder, a last one and the first peer of all are killed, one by one; others take their place."""
    watch = Watch()
    stages = ["0:1", "1:3", "3:4", "0:1", "1:3", "3:4"]
    with Swarm(tmp_path, on_event=watch) as swarm:
        start(swarm, four_fragments(tmp_path), stages)
        swarm.wait_for(
            lambda: set(watch.newest) == {0, 1, 2, 3}, timeout_s=90, what="a round of every fragment"
        )
        origins = [swarm.peers[0], swarm.peers[3]]
        swarm.wait_for(lambda: all("progress" in p.newest for p in origins), timeout_s=60, what="their loss")
        loss = origins[1].last("progress", "loss")
        children = []
        for number in (4, 2, 0):
            victim = next(peer for peer in ready(swarm) if peer.number == number)
            children += kill(victim)
            rounds_go_on(swarm, watch, by=1)
            addresses = [maddr for peer in ready(swarm) for maddr in peer.last("ready", "maddrs")]
            swarm.start_peer("--initial-peers", *addresses, "--fragments", stages[number], number=number)
        swarm.wait_for(lambda: len(ready(swarm)) == 6, timeout_s=90, what="all to be there again")
        rounds_go_on(swarm, watch, by=3)
        assert origins[1].last("progress", "loss") < loss - 0.1, "it learns"
        assert_gone(children)
        last = swarm.running()
        swarm.finish()
        assert [peer.process.returncode for peer in last] == [0] * 6, [peer.stderr for peer in last]
        assert held_everywhere_alike(last) == {0, 1, 2, 3}
        assert not watch.disagreements(last)


@pytest.mark.timeout(300)
def test_a_peer_that_fits_the_first_fragment_trains_through_whole_peers(tmp_path: Path) -> None:
    watch = Watch()
    with Swarm(tmp_path, on_event=watch) as swarm:
        start(swarm, four_fragments(tmp_path), ["auto", "0:1", "2:4"])
        _, small, tail = swarm.peers
        swarm.wait_for(lambda: set(watch.newest) == {0, 1, 2, 3}, timeout_s=90, what="a round of every fragment")
        swarm.wait_for(lambda: small.last("progress", "tokens") > 2_000, timeout_s=60, what="the small peer's tokens")
        assert set(small.heads) == {0} and set(tail.heads) == {2, 3}
        swarm.finish()
        assert [peer.process.returncode for peer in swarm.peers] == [0] * 3, [peer.stderr for peer in swarm.peers]
        assert held_everywhere_alike(swarm.peers) == {0, 2, 3}
        assert not watch.disagreements(swarm.peers)


def test_a_peer_says_what_nobody_holds_and_that_it_is_over(tmp_path: Path) -> None:
    said: list[str] = []

    def listen(peer: LocalPeer, event: dict[str, object]) -> None:
        if event["event"] == "warning" and peer.number == 0:
            said.append(str(event["text"]))

    with Swarm(tmp_path, on_event=listen) as swarm:
        start(swarm, four_fragments(tmp_path), ["0:2"])
        swarm.wait_for(lambda: bool(said), timeout_s=30, what="a word")
        assert said == ["nobody here holds fragment 2, 3: microbatches wait for a peer that does (--fragments A:B)"]
        swarm.start_peer("--initial-peers", *swarm.peers[0].last("ready", "maddrs"), "--fragments", "2:4")
        over = "every fragment has somebody who holds it"
        swarm.wait_for(lambda: over in said, timeout_s=60, what="the other one")
        assert said[-1] == over and said[1:-1] in ([], [
            "nobody here holds fragment 3: microbatches wait for a peer that does (--fragments A:B)"
        ]), "it serves its first fragment while it loads the others"
        swarm.wait_for(lambda: swarm.peers[0].last("progress", "tokens") > 500, timeout_s=60, what="tokens")
        swarm.finish()
        assert [peer.process.returncode for peer in swarm.peers] == [0, 0]
