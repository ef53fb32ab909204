"""Peers, and whole swarms, that were switched off come back from their checkpoints and go on."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts.local_swarm import LocalPeer
from swarm.averaging.synchronise import Synchroniser
from tests.swarm.support import InProcessPeer, Swarm, peers_in_process, wait_until, write_run

ROUND_S = 60.0
Make = Callable[..., InProcessPeer]


def live(peer: InProcessPeer) -> None:
    peer.participant.join()
    peer.participant.start()


def start(make: Make, home: Path, **config: object) -> InProcessPeer:
    """On the port of its last start, as without --listen: that is what others remember."""
    peer = make(home, listen=[], **config)
    live(peer)
    return peer


def start_swarm(make: Make, folder: Path, number: int, **changes: object) -> list[InProcessPeer]:
    peers = [start(make, folder / "0", new_swarm=True, run=str(write_run(folder, **changes)))]
    for n in range(1, number):
        peers.append(start(make, folder / f"{n}", initial_peers=peers[0].maddrs))
    wait_for_rounds(peers, contributors=number)
    return peers


def wait_for_rounds(peers: list[InProcessPeer], *, contributors: int = 1) -> None:
    """Every peer applies a round of every fragment that begins from now on, with that many contributors."""
    before = [len(peer.events) for peer in peers]

    def seen() -> bool:
        return all(
            {e.fragment for e in peer.events[at:] if e.kind == "round" and e.contributors >= contributors} == {0, 1}  # type: ignore[attr-defined]
            for peer, at in zip(peers, before, strict=True)
        )

    try:
        wait_until(seen, timeout_s=ROUND_S, what=f"rounds of {contributors}")
    except AssertionError as error:
        last = [[e for e in peer.events if e.kind in ("round", "warning")][-6:] for peer in peers]
        raise AssertionError(f"{error}; {[peer.heads() for peer in peers]}, {last}") from None


def versions(peer: InProcessPeer) -> list[int]:
    return [version for version, _ in peer.heads()]


def leave(*peers: InProcessPeer) -> None:
    """All at the same moment."""
    with ThreadPoolExecutor(len(peers)) as pool:
        for done in [pool.submit(peer.participant.leave) for peer in peers]:
            done.result(ROUND_S)


def texts(peer: InProcessPeer, kind: str, word: str = "") -> list[str]:
    return [e.text for e in peer.events if e.kind == kind and word in (e.text, getattr(e, "name", ""), "")]  # type: ignore[attr-defined]


def test_a_peer_comes_back_alone_and_to_the_others(tmp_path: Path) -> None:
    with peers_in_process() as make:
        first, second = start_swarm(make, tmp_path, 2)
        peer_id = second.participant.network.peer_id
        leave(second)
        left_at = versions(second)
        second.close()
        wait_for_rounds([first])
        second = start(make, tmp_path / "1")  # no arguments: the run and the way back are in its home folder
        assert second.participant.network.peer_id == peer_id
        assert all(now >= then > 0 for now, then in zip(versions(second), left_at, strict=True))
        wait_for_rounds([first, second], contributors=2)
        leave(first, second)
        assert first.heads() == second.heads()
        left_at = versions(first)
        first.close()
        second.close()

        first = start(make, tmp_path / "0")
        assert all(now >= then for now, then in zip(versions(first), left_at, strict=True))
        assert "from this peer's checkpoint" in texts(first, "check", "state")[0]
        wait_for_rounds([first])


@pytest.mark.parametrize("together", [False, True], ids=["one-after-the-other", "at-the-same-moment"])
def test_a_whole_swarm_that_was_switched_off_comes_back(tmp_path: Path, together: bool) -> None:
    with peers_in_process() as make:
        peers = start_swarm(make, tmp_path, 3)
        peers[2].participant.write_checkpoint()
        older = versions(peers[2])
        peers[2].close()  # the power went: what it knew after its checkpoint is gone
        wait_for_rounds(peers[:2])
        leave(*peers[:2])
        assert peers[0].heads() == peers[1].heads(), "who leaves together ends with the same weights"
        newest = versions(peers[0])
        assert all(new > old for new, old in zip(newest, older, strict=True))
        for peer in peers:
            peer.close()

        again = [make(tmp_path / f"{n}", listen=[]) for n in (2, 0, 1)]  # the one with the oldest state first
        if together:
            with ThreadPoolExecutor(3) as pool:
                for done in [pool.submit(live, peer) for peer in again]:
                    done.result(ROUND_S)
        else:
            for peer in again:
                live(peer)
        wait_for_rounds(again, contributors=3)
        leave(*again)
        assert again[0].heads() == again[1].heads() == again[2].heads()
        assert all(now > then for now, then in zip(versions(again[0]), newest, strict=True)), "from the newest head on"


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_costs_its_rounds_and_no_more(tmp_path: Path, damage: str) -> None:
    with peers_in_process() as make:
        [peer] = start_swarm(make, tmp_path, 1)
        peer.participant.write_checkpoint()
        older = versions(peer)
        wait_for_rounds([peer])
        leave(peer)
        newest = versions(peer)
        peer.close()
        folders = sorted((tmp_path / "0" / "runs").glob("*/checkpoints/*"))
        file = folders[-1] / "fragment-001.safetensors"
        data = bytearray(file.read_bytes())
        if damage == "truncated":
            del data[len(data) // 2 :]
        else:
            data[len(data) // 2] ^= 1
        file.write_bytes(data)

        peer = make(tmp_path / "0", listen=[])
        peer.participant.join()
        assert peer.participant.averager is not None
        found = [state.version for state in peer.participant.averager.states()]
        assert all(old <= now for old, now in zip(older, found, strict=True)) and found[1] < newest[1]
        [warning] = [text for text in texts(peer, "warning") if "is damaged and was left out" in text]
        assert folders[-1].name in warning
        peer.participant.start()
        wait_for_rounds([peer])


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    with peers_in_process() as make:
        [peer] = start_swarm(make, tmp_path, 1)
        [run] = (tmp_path / "0" / "runs").iterdir()
        folder = run / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        folder.write_text("in the way")
        peer.participant.write_checkpoint()
        [warning] = texts(peer, "warning")[-1:]
        assert warning.startswith("a checkpoint was not written, training goes on: ") and str(folder) in warning
        wait_for_rounds([peer])
        folder.unlink()
        leave(peer)
        assert len(list(folder.iterdir())) == 1, "the next one is written"


def test_a_full_disk_is_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    home = tmp_path / "0"
    home.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=3m tmpfs {home} 2>/dev/null") != 0:
        pytest.skip("needs root and mount, for a small disk")
    try:
        with peers_in_process() as make:
            [peer] = start_swarm(make, tmp_path, 1)
            before = set(home.glob("runs/*/checkpoints/*/manifest.json"))  # of the run's start
            filler = home / "films"
            with pytest.raises(OSError), open(filler, "wb") as file:
                while True:
                    file.write(b"0" * 65536)
                    file.flush()
            peer.participant.write_checkpoint()
            assert [text for text in texts(peer, "warning") if "checkpoint was not written" in text and "full" in text]
            wait_for_rounds([peer])
            filler.unlink()
            leave(peer)
            assert len(set(home.glob("runs/*/checkpoints/*/manifest.json")) - before) == 1
    finally:
        assert os.system(f"umount {home}") == 0


def test_a_donor_is_killed_in_the_middle_of_a_download(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(folder)
    run.write_text(run.read_text().replace("n_embd: 48", "n_embd: 256"))  # 54 chunks instead of 4
    caplog.set_level(logging.INFO, logger="swarm.averaging.download")
    with Swarm(folder) as swarm, peers_in_process() as make:
        victim = swarm.start_peer("--new-swarm", "--run", str(run))
        swarm.wait_for(lambda: "ready" in victim.newest, timeout_s=60, what="the first donor")
        survivor = swarm.start_peer("--initial-peers", *victim.last("ready", "maddrs"))
        swarm.wait_for(
            lambda: all(peer.last("round", "contributors") == len(peer.heads) == 2 for peer in swarm.peers),
            timeout_s=60, what="a round of each fragment",
        )
        kill_when_chunks_arrive(victim, monkeypatch)
        maddrs = [maddr for peer in swarm.peers for maddr in peer.last("ready", "maddrs")]
        joiner = make(tmp_path / "joiner", initial_peers=maddrs)
        joiner.participant.join()
        assert victim.process.wait(10) == -signal.SIGKILL
        assert "downloaded 2 fragments from others" in texts(joiner, "check", "state")[0]
        name = victim.last("ready", "peer_id")[-6:]
        assert [text for text in caplog.messages if f"from {name}: " in text], "it was giving chunks when it died"
        joiner.participant.take_part()

        def level() -> bool:
            while swarm.pump(timeout_s=0.01):
                pass
            return dict(enumerate(joiner.heads())) == survivor.heads

        wait_until(level, timeout_s=ROUND_S, what="the survivor's digests")


def kill_when_chunks_arrive(victim: LocalPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download is under way at all donors when `victim` gets SIGKILL."""
    join = Synchroniser.join

    async def join_and_kill(self: Synchroniser) -> int:
        def on_progress(done: int, total: int) -> None:
            if 0 < done < total:
                victim.process.kill()

        self.on_progress = on_progress
        return await join(self)

    monkeypatch.setattr(Synchroniser, "join", join_and_kill)
