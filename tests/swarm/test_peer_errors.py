"""Bad input to a whole peer: each mistake is a stated error with an exit code, before anything was started or lost."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swarm import peer
from swarm.cli import EXAMPLE_PEER
from swarm.config import PeerConfig, canonical_json
from swarm.errors import JoinError
from swarm.events import Bus
from swarm.host.home import Home
from swarm.network import join
from swarm.train.participant import Participant
from tests.swarm.network_support import DEAD, Nets
from tests.swarm.support import InProcessPeer, peers_in_process, wait_until, write_run

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
QUICK_S = 15.0
"""for an error that needs no waiting, on a machine that is busy with other tests as well"""
RunPeer = Callable[..., tuple[int, str]]


@pytest.fixture
def run_peer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPeer]:
    """`python -m swarm.peer` in this process: its exit code and what it wrote to stderr."""
    for name in [name for name in os.environ if name.startswith("SWARM_")]:
        monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logger = logging.getLogger("swarm")
    before = (list(logger.handlers), logger.propagate, logger.level)

    def run(*arguments: object) -> tuple[int, str]:
        code = peer.main([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessPeer]:
    """A swarm of one to join, or not."""
    folder = tmp_path_factory.mktemp("running")
    with peers_in_process() as make:
        first = make(folder / "first", new_swarm=True, run=str(write_run(folder)))
        first.participant.join()
        first.participant.take_part()
        yield first


def assert_stated(said: str, *, do: bool = True) -> None:
    assert "Traceback" not in said and "why:" in said and ("do:" in said or not do), said


# -- usage: a flag or a file says what cannot be ------------------------------------------------------------------


@pytest.mark.parametrize(("config", "said"), [
    ("listne: /ip4/0.0.0.0/tcp/1\n", "unknown key 'listne'"),
    ("averaging: {bits: 8}\n", r"this is decided by the swarm \(averaging.bits\); you asked for 8"),
    ("learning_rate: 1\n", r"this is decided by the swarm \(train.learning_rate\); you asked for 1"),
    ("new-swarm: true\n", "cannot be used together"),
    ("a: [\n", "is not YAML"),
])  # fmt: skip
def test_a_bad_config_file_is_a_usage_error(run_peer: RunPeer, tmp_path: Path, config: str, said: str) -> None:
    file = tmp_path / "peer.yaml"
    file.write_text(config)
    code, err = run_peer("--config", file, "--initial-peers", DEAD, "--home", tmp_path / "home")
    assert code == 2 and re.search(said, err) and str(file) in err
    assert_stated(err, do=False)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (["--initial-peers", "/ip4/1.2.3.4/tcp/5"], "bad address"),
    (["--new-swarm", "--initial-peers", DEAD], "cannot be used together"),
    (["--run", "x.yaml", "--initial-peers", DEAD], "only for --new-swarm"),
    (["--new-swarm", "--bits", "8"], "decided by the swarm"),
    ([], "there is no run to resume"),
])  # fmt: skip
def test_bad_flags_are_usage_errors(run_peer: RunPeer, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, err = run_peer(*arguments, "--home", tmp_path / "home")
    assert code == 2 and said in err
    assert_stated(err)


@pytest.mark.parametrize(("text", "said"), [
    (None, "cannot read"),
    ("name: [", "is not YAML"),
    ("name: x\nmodel: {config: {model_type: gptj}}\ndata: {stdlib: true}\nsed: 1\n", "sed"),
    ("name: x\nmodel: {config: {model_type: nonsense}}\ndata: {stdlib: true}\n", "nonsense"),
])  # fmt: skip
def test_a_bad_run_file_is_named_before_anything_starts(
    run_peer: RunPeer, tmp_path: Path, text: str | None, said: str
) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    code, err = run_peer("--new-swarm", "--run", file, "--home", tmp_path / "home")
    assert code == 2 and said in err
    assert_stated(err, do=False)
    assert not (tmp_path / "home" / "runs").exists()


# -- stated errors: the world is not as it should be --------------------------------------------------------------


def test_unreachable_initial_peers_each_have_their_own_reason(run_peer: RunPeer, tmp_path: Path) -> None:
    file = tmp_path / "peer.yaml"
    file.write_text("join-timeout-s: 1\n")
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def hang_up() -> None:
            while True:
                try:
                    stranger.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        other = f"/ip4/127.0.0.1/tcp/{stranger.getsockname()[1]}{EXAMPLE_PEER}"
        began = time.monotonic()
        code, err = run_peer(
            "--config", file, "--home", tmp_path / "home", "--listen", LOOPBACK, "--initial-peers", DEAD, other
        )
        stranger.shutdown(socket.SHUT_RDWR)
    assert code == 1 and time.monotonic() - began < QUICK_S
    assert_stated(err)
    reasons = {maddr: line for line in err.splitlines() for maddr in (DEAD, other) if f"{maddr}: " in line}
    assert "refused" in reasons[DEAD] and "refused" not in reasons[other] and "--new-swarm" in err
    assert not (tmp_path / "home" / "runs").exists(), "joining is never starting"


def test_with_v_an_error_comes_with_its_traceback(run_peer: RunPeer, tmp_path: Path) -> None:
    arguments = ["--home", tmp_path, "--initial-peers", DEAD, "--join-timeout-s", "1", "--listen", LOOPBACK]
    code, err = run_peer(*arguments, "-v")
    assert code == 1 and "Traceback" in err and err.rstrip().splitlines()[-1].strip().startswith("do:")


def test_a_port_in_use(run_peer: RunPeer, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        code, err = run_peer("--new-swarm", "--run", run, "--home", tmp_path / "home", "--listen", place)
    assert code == 1 and f"cannot listen on {place}" in err and "--listen" in err
    assert_stated(err)


@pytest.mark.parametrize("home", ["file", "file/below", "/proc/swarm", "/dev/null"])
def test_a_home_that_cannot_be_written(run_peer: RunPeer, tmp_path: Path, home: str) -> None:
    (tmp_path / "file").write_text("mine")
    code, err = run_peer("--initial-peers", DEAD, "--home", tmp_path / home)
    assert code == 1 and "home folder" in err and "--home" in err
    assert_stated(err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_home_in_use(run_peer: RunPeer, running: InProcessPeer) -> None:
    code, err = run_peer("--initial-peers", *running.maddrs, "--home", running.home.path)
    assert code == 1 and "is in use" in err and str(os.getpid()) in err
    assert_stated(err)


def test_a_run_that_is_not_there(run_peer: RunPeer, running: InProcessPeer, tmp_path: Path) -> None:
    code, err = run_peer(
        "--initial-peers", *running.maddrs, "--home", tmp_path, "--run-id", "other-0123456789ab", "--listen", LOOPBACK,
        "--join-timeout-s", "1",
    )
    assert code == 1 and "found no run other-0123456789ab within 1 s" in err and "--run-id" in err
    assert_stated(err)
    assert not (tmp_path / "runs").exists()


def test_a_network_without_a_run(run_peer: RunPeer, nets: Nets, tmp_path: Path) -> None:
    rendezvous = nets.start("rendezvous")
    arguments = ["--initial-peers", *rendezvous.maddrs, "--home", tmp_path, "--listen", LOOPBACK]
    for role in ("trainer", "rendezvous"):
        code, err = run_peer(*arguments, "--join-timeout-s", "1", "--role", role)
        assert code == 1 and "found no run within 1 s" in err and "--new-swarm" in err
        assert_stated(err)
    assert not (tmp_path / "runs").exists(), "it never starts one"


def test_a_damaged_run_file_in_the_home_folder(run_peer: RunPeer, running: InProcessPeer, tmp_path: Path) -> None:
    run_id = running.participant.run.run_id
    (tmp_path / "runs" / run_id).mkdir(parents=True)
    changed = canonical_json(running.participant.run).replace(b'"seed":0', b'"seed":1')
    (tmp_path / "runs" / run_id / "run.json").write_bytes(changed)
    (tmp_path / "state.json").write_text(json.dumps({"last_run_id": run_id}))
    code, err = run_peer("--home", tmp_path)
    assert code in (1, 2) and run_id in err
    assert_stated(err)


@pytest.mark.parametrize("off_s", [10, -10])
def test_a_clock_that_is_10_s_off(running: InProcessPeer, tmp_path: Path, off_s: int) -> None:
    config = PeerConfig(home=str(tmp_path), initial_peers=running.maddrs, listen=[LOOPBACK], device="cpu")
    with Home.open(tmp_path) as home:
        participant = Participant(config, home, Bus(), clock=lambda: time.time() + off_s)
        try:
            with pytest.raises(JoinError, match="clock is 10 s") as caught:
                participant.join()
        finally:
            participant.close()
    assert "timedatectl" in caught.value.do


@pytest.mark.parametrize("way", ["through the original", "through another", "with no arguments"])
def test_a_copied_home_is_refused_while_the_original_runs(
    running: InProcessPeer, tmp_path: Path, run_peer: RunPeer, way: str
) -> None:
    with peers_in_process() as make:
        other = make(tmp_path / "other", initial_peers=running.maddrs)
        other.participant.join()
        other.participant.take_part()
        wait_until(
            lambda: bool(other.participant.network.peer_id in running.participant.network.directory.alive()),
            timeout_s=30, what="the two to meet",
        )  # fmt: skip
        shutil.copytree(running.home.path, tmp_path / "twin", ignore=shutil.ignore_patterns("lock", "p2p-*", ".*.tmp"))
        maddrs = {"through the original": running.maddrs, "through another": other.maddrs}.get(way, [])
        code, err = run_peer(
            "--home", tmp_path / "twin", "--listen", LOOPBACK, "--until-tokens", "1",
            *(["--initial-peers", *maddrs, "--join-timeout-s", "1"] if maddrs else []),
        )
        assert code == 1 and "identity" in err and "--home" in err
        assert_stated(err)
        alive = other.participant.network.directory.alive()
        assert running.participant.network.peer_id in alive, "the original goes on"


def test_a_changed_run_config_under_the_same_name_misleads_nobody(
    running: InProcessPeer, nets: Nets, tmp_path: Path
) -> None:
    run = running.participant.run
    changed = canonical_json(run).replace(b'"seed":0', b'"seed":7').decode()
    assert changed != canonical_json(run).decode()
    evil = nets.start("evil", initial_peers=running.maddrs)
    evil.run(evil.dht.publish(f"{run.run_id}/config", changed, ttl_s=60))
    evil.run(evil.dht.publish(join.RUNS_KEY, run.run_id, ttl_s=60))
    with peers_in_process() as make:
        joiner = make(tmp_path / "joiner", initial_peers=evil.maddrs, join_timeout_s=20.0)
        joiner.participant.join()
        joiner.participant.take_part()
        assert canonical_json(joiner.participant.run) == canonical_json(run)
        saved = joiner.home.path / "runs" / run.run_id / "run.json"
        assert saved.read_bytes() == canonical_json(run)
        assert joiner.heads() == running.heads()


def test_the_first_signal_calls_off_joining(run_peer: RunPeer, tmp_path: Path) -> None:
    signalled: list[float] = []

    def interrupt() -> None:
        signalled.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Timer(1.0, interrupt).start()
    arguments = ["--home", tmp_path, "--initial-peers", DEAD, "--join-timeout-s", "60", "--listen", LOOPBACK]
    code, err = run_peer(*arguments, "--ui", "json")
    assert code == 0 and time.monotonic() - signalled[0] < QUICK_S and not err
