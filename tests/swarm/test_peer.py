"""What people and their scripts see of a peer process: events, signals, exit codes, and nothing left behind (I7)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.local_swarm import LocalPeer, LocalSwarm, finish_with_parent
from swarm import cli
from swarm.host.home import Home
from swarm.network.keys import Keypair
from tests.swarm.support import Swarm, write_run

START_S = 60.0
GONE_S = 10.0
STOP_S = 60.0
"""for the second signal to end a peer, on a machine that is busy with other tests as well"""
CONTRACT: dict[str, dict[str, type | tuple[type, ...]]] = {
    "ready": {"run_id": str, "peer_id": str, "maddrs": list, "join": str},
    "progress": {"tokens": int, "swarm_tokens": int, "loss": float, "tokens_per_s": (int, float), "peers": int},
    "round": {
        "fragment": int, "version": int, "digest": str, "contributors": int, "tokens": int,
        "bytes_sent": int, "bytes_received": int, "seconds": (int, float),
    },
    "warning": {"text": str},
    "left": {"reason": str},
    "check": {"name": str, "text": str, "seconds": (int, float)},
}  # fmt: skip


class Ears:
    """Every event of every peer, in order."""

    def __init__(self) -> None:
        self._events: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)

    def __call__(self, peer: LocalPeer, event: dict[str, Any]) -> None:
        self._events[id(peer)].append(event)

    def of(self, peer: LocalPeer, kind: str = "") -> list[dict[str, Any]]:
        return [event for event in self._events[id(peer)] if kind in ("", event["event"])]


class Traces:
    """Of a running peer process: what must not be there any more once it has ended, however it did."""

    def __init__(self, peer: LocalPeer) -> None:
        process = psutil.Process(peer.process.pid)
        self.children = process.children(recursive=True)
        words = [word for child in self.children for word in child.cmdline()]
        self.files = [Path(word.removeprefix("-listen=/unix")) for word in words if word.startswith("-listen=/unix")]
        assert self.files and all(file.is_socket() for file in self.files), "the daemon's socket"
        self.files += [file.parent for file in self.files]
        self.files += [path for path in peer.home.iterdir() if path.name.startswith("p2p-")]
        for pid in [process.pid, *(child.pid for child in self.children)]:
            maps = Path(f"/proc/{pid}/maps")
            text = maps.read_text() if maps.exists() else ""
            self.files += [Path(name) for name in re.findall("/dev/shm/[^ \n]*", text)]
        names = sorted(os.path.basename(word) for word in words)
        assert "watchdog.py" in names and "p2pd" in names

    def assert_gone(self) -> None:
        _, alive = psutil.wait_procs(self.children, timeout=GONE_S)
        assert not alive, f"left behind: {alive}"
        deadline = time.monotonic() + GONE_S
        while left := [file for file in self.files if file.exists()]:
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.02)


def checkpoint_of(peer: LocalPeer) -> list[dict[str, Any]]:
    """The fragments of the newest checkpoint."""
    newest = max((peer.home / "runs").glob("*/checkpoints/*/manifest.json"))
    fragments: list[dict[str, Any]] = json.loads(newest.read_text())["fragments"]
    return fragments


def heads_in(checkpoint: list[dict[str, Any]]) -> dict[int, tuple[int, str]]:
    return {entry["fragment"]: (entry["version"], entry["digest"]) for entry in checkpoint}


def ready(swarm: LocalSwarm, *peers: LocalPeer) -> None:
    swarm.wait_for(lambda: all("ready" in peer.newest for peer in peers), timeout_s=START_S, what="peers to be ready")


def leave(swarm: LocalSwarm, peer: LocalPeer) -> None:
    """The first signal: it finishes."""
    traces = Traces(peer)
    peer.process.send_signal(signal.SIGTERM)
    swarm.wait_for(lambda: peer.process.poll() is not None, timeout_s=START_S, what="a peer to leave")
    while swarm.pump():
        pass
    assert peer.process.returncode == 0
    assert peer.last("left", "reason") == "told to stop"
    assert heads_in(checkpoint_of(peer)) == peer.heads, "the checkpoint holds its last rounds"
    traces.assert_gone()


def start_twin(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """In a session of its own like all peers, or it would share the processor with the tests."""
    command = [sys.executable, "-m", "swarm.peer", "--home", str(home), "--listen", "/ip4/127.0.0.1/tcp/0", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=finish_with_parent,
    )


def test_a_life_from_the_first_start_to_sigkill(folder: Path) -> None:
    ears = Ears()
    with Swarm(folder, on_event=ears, forked=False) as swarm:
        first = swarm.start_peer("--new-swarm", "--run", str(write_run(folder)))
        ready(swarm, first)
        words = shlex.split(first.last("ready", "join"))
        assert words[:3] == ["python", "-m", "swarm.peer"]
        assert set(cli.parse(words[3:], {}).initial_peers) <= set(first.last("ready", "maddrs"))
        second = swarm.start_peer(*words[3:])
        swarm.wait_for(
            lambda: all(p.last("round", "contributors") == 2 and "progress" in p.newest for p in swarm.peers),
            timeout_s=START_S, what="a round of both",
        )  # fmt: skip

        shutil.copytree(first.home, folder / "twin", ignore=shutil.ignore_patterns("lock", "p2p-*", ".*.tmp"))
        twin = start_twin(folder / "twin", "--initial-peers", *second.last("ready", "maddrs"))
        swarm.wait_for(lambda: twin.poll() is not None, timeout_s=START_S, what="the twin to be refused")
        said = twin.communicate()[1]
        assert twin.returncode == 1 and "identity" in said and "--home" in said and "Traceback" not in said, said

        leave(swarm, second)
        assert not [text for text in second.warnings if "did not get into a round" in text], second.warnings
        settled = checkpoint_of(second)
        swarm.wait_for(
            lambda: all(first.heads[entry["fragment"]][0] > entry["version"] for entry in settled),
            timeout_s=START_S, what="the other to go on",
        )
        leave(swarm, first)
        trained = first.last("progress", "tokens") + second.last("progress", "tokens")
        assert [entry["tokens"] for entry in checkpoint_of(first)] == [trained] * 2, "every token in one commit, once"

        for peer in (first, second):
            events = ears.of(peer)
            for event in events:
                fields = CONTRACT[event["event"]]
                assert all(isinstance(event[name], kind) for name, kind in fields.items()), event
                assert not any(isinstance(value, bool) for value in event.values()), event
            kinds = [event["event"] for event in events]
            assert kinds.count("ready") == kinds.count("left") == 1 and kinds[-1] == "left"
            checks = [e["name"] for e in ears.of(peer, "check")]
            assert checks[:6] == ["device", "network", "reachable", "memory", "state", "training"]
            assert checks[6:] in ([], ["reachable"]), "the first peer can ask only once there is another one"
            assert kinds[0] == "check", "the checklist comes first"
            for fragment in range(2):
                versions = [e["version"] for e in ears.of(peer, "round") if e["fragment"] == fragment]
                assert versions == list(range(versions[0], versions[0] + len(versions)))

        # both are off; each comes back alone, from its own checkpoint, with no arguments at all
        again = [swarm.start_peer(number=peer.number) for peer in (first, second)]
        ready(swarm, *again)
        for old, new in zip((first, second), again, strict=True):
            assert new.last("ready", "peer_id") == old.last("ready", "peer_id")
            assert new.last("ready", "run_id") == old.last("ready", "run_id")
            state = next(e["text"] for e in ears.of(new, "check") if e["name"] == "state")
            assert f"versions {', '.join(str(e['version']) for e in checkpoint_of(old))}: from" in state
        swarm.wait_for(lambda: all("progress" in p.newest for p in again), timeout_s=START_S, what="training")

        with pytest.raises(SystemExit, match="in vain for nothing") as failed:
            swarm.wait_for(lambda: False, timeout_s=0.0, what="nothing")
        told = str(failed.value)
        mains = told.count("in _run_module_as_main\n")  # a signal may come to a thread of C++: none is "current" then
        assert mains == 2 and "swarm/peer.py" in told, f"where every thread of each peer is, the main one last: {told}"

        traces = [Traces(peer) for peer in again]
        again[0].process.kill()
        again[1].process.send_signal(signal.SIGINT)
        swarm.wait_for(lambda: "again to stop now" in "".join(again[1].stderr), timeout_s=STOP_S, what="a word")
        again[1].process.send_signal(signal.SIGINT)
        assert again[1].process.wait(STOP_S) == 130
        for left in traces:
            left.assert_gone()


def test_until_tokens_all_leave_with_the_same_weights(folder: Path) -> None:
    with Home.open(folder / "peer-0") as home:
        peer_id = Keypair(home.key_bytes()).peer_id
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}"
    run = write_run(folder)
    run.write_text(run.read_text().replace("n_embd: 48", "n_embd: 256"))  # slow, or one could get there alone
    until = ["--until-tokens", "60k"]
    with Swarm(folder) as swarm:
        swarm.start_peer("--new-swarm", "--run", str(run), "--listen", place, *until)
        for _ in range(2):
            swarm.start_peer("--initial-peers", f"{place}/p2p/{peer_id}", *until)
        swarm.wait_for(lambda: not swarm.running(), timeout_s=2 * START_S, what="60,000 tokens")
        while swarm.pump():
            pass
        assert [peer.process.returncode for peer in swarm.peers] == [0, 0, 0]
        for peer in swarm.peers:
            assert re.fullmatch("the swarm has trained [0-9]+ tokens", peer.last("left", "reason"))
            assert checkpoint_of(peer) == checkpoint_of(swarm.peers[0]), "one truth"
        assert min(entry["tokens"] for entry in checkpoint_of(swarm.peers[0])) >= 60_000


@pytest.mark.parametrize("arguments", [["--help"], ["--print-config"]])
def test_asking_costs_nothing(arguments: list[str], tmp_path: Path) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "swarm.peer", "--home", str(tmp_path / "home"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "home" in done.stdout and not done.stderr
    assert time.monotonic() - began < 5 and not (tmp_path / "home").exists()
