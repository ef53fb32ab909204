"""Peers that start at the same moment with the same --initial-peers are one swarm, every time."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarm.host.home import Home
from swarm.network.keys import Keypair
from tests.swarm.support import InProcessPeer, peers_in_process, wait_until, write_run

TIMES = 20
JOINERS = 3


def at_once(steps: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(steps)) as pool:
        for future in [pool.submit(step) for step in steps]:
            future.result(60)


def holders_known_to(peer: InProcessPeer) -> set[str]:
    alive = peer.participant.network.directory.alive()
    return {peer_id for peer_id, status in alive.items() if status.heads}


def all_know_all(peers: list[InProcessPeer]) -> bool:
    ids = {peer.participant.network.peer_id for peer in peers}
    return all(holders_known_to(peer) == ids - {peer.participant.network.peer_id} for peer in peers)


def one_truth(peers: list[InProcessPeer]) -> bool:
    """All at one head of every fragment, at the same moment."""
    return all(len(set(heads)) == 1 for heads in zip(*(peer.heads() for peer in peers), strict=True))


def trains_along(peer: InProcessPeer) -> bool:
    return any(event.kind == "round" and event.contributors > JOINERS for event in peer.events)  # type: ignore[attr-defined]


def test_three_peers_join_a_swarm_at_the_same_moment(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with peers_in_process() as make:
        first = make(tmp_path / "first", new_swarm=True, run=str(run))
        first.participant.join()
        first.participant.start()
        for time in range(TIMES):
            joiners = [make(tmp_path / f"{time}-{n}", initial_peers=first.maddrs) for n in range(JOINERS)]
            at_once([peer.participant.join for peer in joiners])
            assert {peer.participant.run.run_id for peer in joiners} == {first.participant.run.run_id}
            everybody = [first, *joiners]
            for peer in joiners:
                peer.participant.take_part()
            wait_until(lambda everybody=everybody: all_know_all(everybody), timeout_s=30, what="one swarm")
            wait_until(lambda everybody=everybody: one_truth(everybody), timeout_s=30, what="one head")
            if time == TIMES - 1:
                for peer in joiners:
                    peer.participant.train()
                wait_until(
                    lambda joiners=joiners: all(map(trains_along, joiners)), timeout_s=60, what="a round of all four"
                )
            for peer in joiners:
                peer.close()


@pytest.mark.parametrize("time", range(2))
def test_the_first_peer_may_start_at_that_moment_too(tmp_path: Path, time: int) -> None:
    run = write_run(tmp_path)
    with Home.open(tmp_path / "first") as home:
        peer_id = Keypair(home.key_bytes()).peer_id
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}"
    with peers_in_process() as make:
        first = make(tmp_path / "first", new_swarm=True, run=str(run), listen=[place])
        joiners = [make(tmp_path / f"{n}", initial_peers=[f"{place}/p2p/{peer_id}"]) for n in range(JOINERS)]

        def live(peer: InProcessPeer) -> None:
            peer.participant.join()
            peer.participant.start()

        everybody = [*joiners, first]
        at_once([lambda peer=peer: live(peer) for peer in everybody])  # type: ignore[misc]
        wait_until(lambda: all_know_all(everybody), timeout_s=30, what="one swarm")
        wait_until(lambda: all(map(trains_along, everybody)), timeout_s=60, what="a round of all four")
        assert len({peer.participant.run.run_id for peer in everybody}) == 1


def test_a_new_swarm_in_an_old_home_starts_alone(tmp_path: Path) -> None:
    """Or its joiners would find two runs on its network."""
    run = write_run(tmp_path)
    with peers_in_process() as make:
        old = make(tmp_path / "old", new_swarm=True, run=str(run))
        old.participant.join()
        new = make(tmp_path / "new", new_swarm=True, run=str(write_run(tmp_path, name="other")))
        new.home.remember(old.maddrs)
        new.participant.join()
        new.participant.take_part()
        assert not new.participant.network.endpoint.linked_peers()
        joiner = make(tmp_path / "joiner", initial_peers=new.maddrs)
        joiner.participant.join()
        assert joiner.participant.run.run_id == new.participant.run.run_id != old.participant.run.run_id
