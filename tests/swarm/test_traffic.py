"""I1 and the bytes: four peers, int4. Equal digests at every version, and no more on the sockets than the codec says.

Bytes are those that libp2p's daemons write to their TCP sockets, as the kernel counts them: encryption, multiplexing,
heartbeats, the DHT, commits, everything but TCP's own headers.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from swarm.events import Round
from swarm.network import codec
from tests.swarm.support import InProcessPeer, peers_in_process, wait_until, write_run

PEERS = 4
FRAGMENTS = 2
ROUNDS = 8
ALLOWED_FACTOR, ALLOWED_BYTES = 1.15, 20_000


def tcp_bytes(peers: list[InProcessPeer]) -> int:
    """Written by all p2pd to TCP: what they wrote in all, less what they handed to us over their local sockets.

    The latter is taken as our own count of link bytes alone, so local DHT messages count as if they had been sent."""
    daemons = [
        process for process in psutil.Process(os.getpid()).children(recursive=True) if process.name().startswith("p2pd")
    ]
    assert len(daemons) == len(peers)
    written = sum(process.io_counters().write_chars for process in daemons)
    return written - sum(peer.participant.network.endpoint.bytes_received for peer in peers)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of written bytes is read from /proc")
def test_four_peers_agree_and_send_no_more_than_the_codec_says(tmp_path: Path) -> None:
    run = write_run(
        tmp_path, fragments=FRAGMENTS, averaging={"tokens_per_round": 12_000, "bits": 4},
        model={"config": {
            "model_type": "gptj", "n_layer": 2, "n_embd": 160, "n_head": 4, "rotary_dim": 8, "n_positions": 64,
            "vocab_size": 257, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "bos_token_id": 256, "eos_token_id": 256,
        }},
    )
    with peers_in_process() as make:
        peers = [make(tmp_path / "peer-0", new_swarm=True, run=str(run))]
        peers[0].participant.join()
        for number in range(1, PEERS):
            peers.append(make(tmp_path / f"peer-{number}", initial_peers=peers[0].maddrs))
            peers[-1].participant.join()
        for peer in peers:
            peer.participant.start()

        def full_rounds(peer: InProcessPeer) -> list[Round]:
            return [e for e in list(peer.events) if isinstance(e, Round) and e.contributors == PEERS]

        wait_until(
            lambda: all(len(full_rounds(peer)) >= FRAGMENTS for peer in peers), timeout_s=90, what="rounds of all four"
        )
        before, versions_before = tcp_bytes(peers), sum(version for version, _ in peers[0].heads())
        wait_until(
            lambda: min(sum(v for v, _ in peer.heads()) for peer in peers) >= versions_before + ROUNDS,
            timeout_s=120, what=f"{ROUNDS} more rounds",
        )
        sent = tcp_bytes(peers) - before
        rounds = sum(version for version, _ in peers[0].heads()) - versions_before
        layouts = peers[0].participant.held.layouts.values()  # type: ignore[union-attr]
        encoded = sum(
            codec.encoded_bytes(layout.num_fine_blocks, layout.num_blocks - layout.num_fine_blocks, 4)
            for layout in layouts
        ) / len(layouts)
        for peer in peers:
            peer.participant.leave()
    # each of K peers sends its K - 1 foreign parts, and its own part's result K - 1 times
    arithmetic = 2 * (PEERS - 1) / PEERS * encoded
    each = sent / rounds / PEERS
    print(f"{each:,.0f} bytes a peer and round over {rounds} rounds; the codec's arithmetic is {arithmetic:,.0f}")
    assert arithmetic < each <= ALLOWED_FACTOR * arithmetic + ALLOWED_BYTES

    digests: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
    for peer in peers:
        for event in peer.events:
            if isinstance(event, Round):
                digests[event.fragment, event.version].add(event.digest)
    assert len(digests) >= ROUNDS and all(len(values) == 1 for values in digests.values()), "one truth at every version"
    # nothing lost, nothing counted twice: what they trained is what is in committed rounds
    trained = sum(peer.participant.trainer.tokens for peer in peers if peer.participant.trainer)
    for fragment in range(FRAGMENTS):
        committed = {
            event.version: event.tokens
            for peer in peers for event in peer.events if isinstance(event, Round) and event.fragment == fragment
        }
        assert sum(committed.values()) == trained
