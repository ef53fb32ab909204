"""A rendezvous peer: others join through it, it trains nothing, and trainers come and go."""

from __future__ import annotations

from pathlib import Path

from tests.swarm.support import InProcessPeer, peers_in_process, wait_until, write_run

ROUND_S = 60.0


def rounds(peer: InProcessPeer) -> list[int]:
    """The number of contributors of each round that this peer applied."""
    return [event.contributors for event in peer.events if event.kind == "round"]  # type: ignore[attr-defined]


def alive(peer: InProcessPeer) -> set[str]:
    return set(peer.participant.network.directory.alive())


def test_trainers_meet_at_a_rendezvous_peer_that_never_contributes(tmp_path: Path) -> None:
    with peers_in_process() as make:

        def start(name: str, **config: object) -> InProcessPeer:
            peer = make(tmp_path / name, **config)
            peer.participant.join()
            peer.participant.start()
            return peer

        rendezvous = start("rendezvous", role="rendezvous", new_swarm=True, run=str(write_run(tmp_path)))
        run = rendezvous.participant.run
        second = start("second", role="rendezvous", initial_peers=rendezvous.maddrs)
        one = start("one", initial_peers=rendezvous.maddrs)
        two = start("two", initial_peers=rendezvous.maddrs)
        assert {peer.participant.run.run_id for peer in (second, one, two)} == {run.run_id}
        wait_until(lambda: 2 in rounds(one) and 2 in rounds(two), timeout_s=ROUND_S, what="a round of both trainers")
        wait_until(lambda: alive(rendezvous) >= alive(one) - {rendezvous.participant.network.peer_id},
                   timeout_s=ROUND_S, what="all to know all")  # fmt: skip
        wait_until(lambda: rendezvous.participant.swarm_tokens() > 0, timeout_s=ROUND_S, what="it to hear of rounds")
        assert rendezvous.participant.finished() is None

        one.close()  # without a word
        seen = len(rounds(two))
        wait_until(lambda: len(rounds(two)) >= seen + 2, timeout_s=ROUND_S, what="the other to go on")
        newcomer = start("newcomer", initial_peers=rendezvous.maddrs)
        seen = len(rounds(two))
        wait_until(lambda: 2 in rounds(two)[seen:] and 2 in rounds(newcomer), timeout_s=ROUND_S, what="the newcomer")

        for peer in (rendezvous, second):
            status = peer.participant.status()
            assert (status.role, status.heads, status.pending, status.tokens) == ("rendezvous", [], [], 0)
            assert not rounds(peer) and peer.participant.finished() is None
            peer.participant.leave()
        assert max(rounds(one) + rounds(two) + rounds(newcomer)) == 2, "it is never a contributor"
        assert not list((tmp_path / "rendezvous" / "runs").glob("*/checkpoints/*"))
