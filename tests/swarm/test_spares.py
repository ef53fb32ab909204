"""A fragment outlives its only holder: real peers, sockets, disks and kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.local_swarm import LocalPeer, LocalSwarm
from swarm.network.records import Head
from swarm.train import state_file
from tests.swarm.support import GPTJ, write_run
from tests.swarm.test_faults import Watch, assert_gone, kill, rounds_go_on

STAGES = ("0:1", "1:2", "2:3")


class Words(Watch):
    """What was said besides the rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[tuple[LocalPeer, str]] = []

    def __call__(self, peer: LocalPeer, event: dict[str, object]) -> None:
        super().__call__(peer, event)
        if event["event"] == "warning":
            self.warnings.append((peer, str(event["text"])))

    def of(self, peer: LocalPeer) -> str:
        return "\n".join(text for other, text in self.warnings if other is peer)


def start(swarm: LocalSwarm, run: Path, *more: str) -> list[LocalPeer]:
    first = swarm.start_peer("--new-swarm", "--run", str(run), "--fragments", STAGES[0], *more)
    swarm.wait_for(lambda: "ready" in first.newest, timeout_s=60, what="the first peer")
    for stage in STAGES[1:]:
        swarm.start_peer("--initial-peers", *first.last("ready", "maddrs"), "--fragments", stage, *more)
    swarm.wait_for(lambda: all("ready" in peer.newest for peer in swarm.peers), timeout_s=60, what="the others")
    return list(swarm.peers)


def three_fragments(folder: Path) -> Path:
    return write_run(
        folder, fragments=3, model={"config": {**GPTJ, "n_layer": 3}}, averaging={"tokens_per_round": 2_000}
    )


def spare_files(peer: LocalPeer) -> list[Path]:
    return sorted(peer.home.glob("runs/*/spares/*.safetensors"))


def spares(peer: LocalPeer) -> dict[int, Head]:
    """What is on its disk."""
    return dict(state_file.head_in(path) for path in spare_files(peer))


@pytest.mark.timeout(300)
def test_the_only_holder_of_the_middle_is_killed_and_a_newcomer_with_an_empty_home_goes_on(tmp_path: Path) -> None:
    watch = Words()
    with LocalSwarm(tmp_path, on_event=watch) as swarm:
        first, victim, last = start(swarm, three_fragments(tmp_path))
        swarm.wait_for(
            lambda: all(1 in spares(peer) and spares(peer)[1].version >= 2 for peer in (first, last)), timeout_s=120,
            what="spare copies of the middle, at a version of their own",
        )
        assert set(spares(first)) == {1, 2} and set(spares(last)) == {0, 1}, "what they do not hold"
        children = kill(victim)
        at_death = watch.newest[1]
        newcomer = swarm.start_peer(
            "--initial-peers", *last.last("ready", "maddrs"), "--fragments", STAGES[1], number=7
        )
        assert newcomer.home != victim.home
        swarm.wait_for(lambda: "went on from a spare copy" in watch.of(newcomer), timeout_s=90, what="its word")
        version = int(watch.of(newcomer).split("spare copy of version ")[1].split(",")[0])
        assert 2 <= version <= at_death
        swarm.wait_for(lambda: newcomer.heads.get(1, (0, ""))[0] >= version + 2, timeout_s=90, what="rounds of it")
        rounds_go_on(swarm, watch, by=1)
        versions = sorted(v for (fragment, v), said in watch.digests.items() if fragment == 1 and id(newcomer) in said)
        assert versions[0] == version + 1, "its first round builds on the copy, not on the run's start"
        assert_gone(children)
        swarm.finish()
        assert [peer.process.returncode for peer in (first, last, newcomer)] == [0] * 3, newcomer.stderr
        assert not watch.disagreements([first, last, newcomer])


@pytest.mark.timeout(300)
def test_who_gives_no_disk_keeps_no_copy_and_a_lost_fragment_is_named_in_capitals(tmp_path: Path) -> None:
    watch = Words()
    with LocalSwarm(tmp_path, on_event=watch) as swarm:
        first, victim, last = start(swarm, three_fragments(tmp_path), "--spare-disk", "0")
        swarm.wait_for(lambda: set(watch.newest) == {0, 1, 2}, timeout_s=90, what="a round of every fragment")
        rounds_go_on(swarm, watch, by=3)
        assert_gone(kill(victim))
        newcomer = swarm.start_peer(
            "--initial-peers", *first.last("ready", "maddrs"), "--fragments", STAGES[1], "--spare-disk", "0", number=7
        )
        swarm.wait_for(
            lambda: "FRAGMENT 1 WAS LOST AND IS REBUILT" in watch.of(newcomer), timeout_s=120, what="a word of it"
        )
        swarm.wait_for(lambda: newcomer.heads.get(1, (0, ""))[0] >= 1, timeout_s=90, what="a round of it")
        assert not any(spare_files(peer) for peer in (first, victim, last, newcomer))
        assert newcomer.last("check", "text") and not watch.disagreements([first, last, newcomer])
        swarm.finish()
        assert [peer.process.returncode for peer in (first, last, newcomer)] == [0] * 3, newcomer.stderr
