"""A peer with --restart, as people run it: killed like by a system short of memory, it is back in the swarm."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from scripts.local_swarm import LocalPeer
from tests.swarm.support import Swarm, write_run

STEP_S = 90.0


def child_of(peer: LocalPeer) -> int:
    """The peer itself, of the process that starts it again."""
    found = Path(f"/proc/{peer.process.pid}/task/{peer.process.pid}/children").read_text().split()
    assert len(found) == 1
    return int(found[0])


def test_the_killed_peer_is_back_as_itself(tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        first = swarm.start_peer("--new-swarm", "--run", str(write_run(tmp_path)), "--restart")
        swarm.wait_for(lambda: "ready" in first.newest, timeout_s=STEP_S, what="the first peer")
        ready = first.newest["ready"]
        other = swarm.start_peer("--initial-peers", *ready["maddrs"])
        swarm.wait_for(lambda: len(other.heads) == 2, timeout_s=STEP_S, what="rounds of both")
        killed = child_of(first)
        del first.newest["ready"]
        os.kill(killed, signal.SIGKILL)
        swarm.wait_for(lambda: "ready" in first.newest, timeout_s=STEP_S, what="its return")
        again = first.newest["ready"]
        assert (again["peer_id"], again["run_id"]) == (ready["peer_id"], ready["run_id"])
        assert child_of(first) != killed
        assert any("killed by SIGKILL" in line for line in first.stderr)
        versions = {fragment: version for fragment, (version, _) in first.heads.items()}
        swarm.wait_for(
            lambda: all(first.heads[fragment][0] > version for fragment, version in versions.items()),
            timeout_s=STEP_S, what="rounds after it",
        )
        agreed = first.digests.keys() & other.digests.keys()
        assert agreed and all(first.digests[key] == other.digests[key] for key in agreed)
        for peer in (other, first):
            peer.process.send_signal(signal.SIGTERM)
        assert [peer.process.wait(STEP_S) for peer in (other, first)] == [0, 0]
