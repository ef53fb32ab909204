"""A swarm behind real routers: three public peers, two behind cone NAT, one behind symmetric NAT. All train and
average; the two behind cone NAT are linked directly, by hole punching."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.lab import lab_support as support
from tests.lab.lab_support import Lab, load
from tests.swarm.support import write_run

from benches.labrun import LabSwarm  # isort: skip # on the path since lab_support
from benches.systems import SYSTEMS, Setup  # isort: skip

pytestmark = [*support.needs_a_lab, pytest.mark.timeout(400)]
PUBLIC, CONE, SYMMETRIC = ("p1", "p2", "p3"), ("c1", "c2"), ("s1",)


def established(lab: Lab, host: str) -> list[str]:
    """Addresses at the other ends of a host's TCP connections."""
    argv = lab.command(host, ["ss", "-Htn", "state", "established"])
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[3].rsplit(":", 1)[0] for line in lines]


def test_all_six_train_and_average(tmp_path: Path, folder: Path) -> None:
    run = write_run(tmp_path, averaging={"tokens_per_round": 30_000, "max_round_s": 30.0})
    setup = Setup(run, 6, None, folder, 0)
    with Lab(support.NAME, load("nat")) as lab, LabSwarm(lab, SYSTEMS["swarm"], setup) as swarm:
        assert lab.hosts == [*PUBLIC, *CONE, *SYMMETRIC]
        swarm.start_all()
        peers = {peer.host: peer for peer in swarm.peers.values()}

        def full_rounds() -> bool:
            return all(sum(e["contributors"] == 6 for _, e in p.of("round")) >= 3 for p in peers.values())

        swarm.wait(full_rounds, timeout_s=120, what="three rounds of all six at each of them")
        situations = {
            host: [event["text"] for _, event in peer.of("check") if event["name"] == "reachable"][-1]
            for host, peer in peers.items()
        }
        for host in CONE:
            assert "introduced" in situations[host] and lab.public_ip(host) in situations[host]
        for host in SYMMETRIC:
            assert "changes ports" in situations[host] and lab.public_ip(host) in situations[host]
        for host in PUBLIC[1:]:  # the first had nobody to ask yet
            assert f"others reach it at {lab.ip(host)}" in situations[host]
        swarm.wait(
            lambda: lab.public_ip("c2") in established(lab, "c1"), timeout_s=60, what="a hole through both routers"
        )
        assert lab.public_ip("c1") in established(lab, "c2")
        for host in CONE:  # nobody can, and nobody tries for long
            assert lab.public_ip("s1") not in established(lab, host)
        for host in (*CONE, *SYMMETRIC):
            join = peers[host].last("ready", "join", "")
            assert any(lab.ip(public) in join for public in PUBLIC), "a friend is sent to somebody who can be dialled"
        digests: dict[tuple[int, int], set[str]] = {}
        for peer in peers.values():
            for _, event in peer.of("round"):
                digests.setdefault((event["fragment"], event["version"]), set()).add(event["digest"])
        assert len(digests) >= 6 and all(len(values) == 1 for values in digests.values())
        assert swarm.finish() == [], "all six leave by themselves"
        assert [peer.process.returncode for peer in peers.values()] == [0] * 6
