"""Peers that change what they hold while they run, for real: newcomers grow, gaps are healed by placement alone."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from scripts.local_swarm import LocalPeer
from swarm.config import PeerConfig, load_run
from swarm.errors import SwarmError
from swarm.host.memory import PROGRAM_BYTES
from swarm.model.build import resolve
from swarm.train.place import choose
from tests.swarm.support import Swarm
from tests.swarm.test_faults import Watch, assert_gone, kill
from tests.swarm.test_stages import four_fragments


def memory_for(run_file: Path, num_fragments: int) -> str:
    """--max-memory with which a peer can hold so many fragments of a run, and no more."""
    run = resolve(load_run(run_file))

    def longest(room_bytes: int) -> int:
        config = PeerConfig(max_memory=PROGRAM_BYTES + room_bytes)
        try:
            first, end = choose(run, config, device=torch.device("cpu"), statuses={}, peer_id="me").part
        except SwarmError:
            return 0
        return end - first

    rooms = [room for room in range(200_000, 50_000_000, 200_000) if longest(room) == num_fragments]
    assert rooms
    return str(PROGRAM_BYTES + rooms[-1])


def fragments(peer: LocalPeer) -> list[int]:
    return list(peer.last("progress", "fragments") or [])


def newest_of(peers: list[LocalPeer]) -> list[int]:
    """Version of each of the four fragments among these; 0 where none has applied a round of it."""
    return [max(peer.heads.get(index, (0, ""))[0] for peer in peers) for index in range(4)]


@pytest.mark.timeout(400)
def test_a_fragment_whose_holders_all_die_is_back_by_placement_alone(tmp_path: Path) -> None:
    """Four peers with room for two of four fragments each: newcomers serve one fragment after the other, and whoever
    dies, the others move."""
    watch, moves, loads = Watch(), [], defaultdict(list)

    def listen(peer: LocalPeer, event: dict[str, object]) -> None:
        watch(peer, event)
        if event["event"] == "check" and event["name"] == "moving":
            moves.append(str(event["text"]))
        if event["event"] == "check" and event["name"] in ("training", "fragment"):
            loads[peer.number].append(event["name"])

    with Swarm(tmp_path, on_event=listen) as swarm:
        run = four_fragments(tmp_path, tokens_per_round=2_000)
        memory = memory_for(run, 2)
        first = swarm.start_peer("--new-swarm", "--run", str(run), "--max-memory", memory)
        swarm.wait_for(lambda: "ready" in first.newest, timeout_s=60, what="the first peer")
        for _ in range(3):  # one by one: each sees where the others are going
            newcomer = swarm.start_peer("--initial-peers", *first.last("ready", "maddrs"), "--max-memory", memory)
            swarm.wait_for(lambda peer=newcomer: "ready" in peer.newest, timeout_s=60, what="a newcomer")
        swarm.wait_for(
            lambda: all(len(fragments(peer)) == 2 for peer in swarm.peers), timeout_s=120, what="two each"
        )
        assert loads[3][:2] == ["training", "fragment"], "it works after the first one"
        swarm.wait_for(lambda: set(watch.newest) == {0, 1, 2, 3}, timeout_s=90, what="a round of every fragment")
        holders = [[peer for peer in swarm.peers if index in fragments(peer)] for index in range(4)]
        rarest = min(range(4), key=lambda index: len(holders[index]))
        assert 1 <= len(holders[rarest]) <= 2, "four peers' places are spread"
        moves.clear()
        killed_at = time.monotonic()
        children = [child for peer in holders[rarest] for child in kill(peer)]
        alive = swarm.running()
        swarm.wait_for(
            lambda: {index for peer in alive for index in fragments(peer)} == {0, 1, 2, 3}, timeout_s=120,
            what=f"fragment {rarest} to be back",
        )
        print(f"fragment {rarest} was served again {time.monotonic() - killed_at:.0f} s after its holders were killed")
        assert moves and all("nobody else holds some of them" in text for text in moves)
        before = newest_of(alive)  # not of the dead: a spare copy may be some rounds older
        swarm.wait_for(
            lambda: all(newest_of(alive)[index] >= before[index] + 2 for index in range(4)), timeout_s=90,
            what=f"two rounds of each after {before}",
        )
        assert_gone(children)
        swarm.finish()
        assert [peer.process.returncode for peer in alive] == [0] * len(alive), [peer.stderr for peer in alive]
        for index in range(4):  # what was let go of stays as it was
            assert len({peer.heads[index] for peer in alive if index in fragments(peer)}) <= 1, f"fragment {index}"
