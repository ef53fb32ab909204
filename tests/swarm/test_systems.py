"""The systems that the benchmarks compare, as real processes on loopback: they train, agree, and leave nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.swarm.support import own_ports, write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches.systems import SYSTEMS, Setup, ours

ROOT = Path(__file__).parents[2]
LIMIT_S = 100.0
"""of one swarm: much more than it takes, for a machine that does other things as well"""


class Peers:
    """The processes of one swarm, and what they said."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.system, self.setup = SYSTEMS[name], setup
        if reason := self.system.available():
            pytest.skip(reason)
        setup.folder.mkdir(parents=True)
        self.ips = ["127.0.0.1"] * setup.num_peers
        ours.PORT = own_ports()
        self.lines: list[list[dict[str, Any]]] = [[] for _ in self.ips]
        self.began = time.monotonic()
        self.family: set[psutil.Process] = set()
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.helpers = [subprocess.Popen(argv, **quiet) for _, argv in self.system.helpers(setup, self.ips)]
        self.processes = [self._start(number) for number in range(setup.num_peers)]

    def _start(self, number: int) -> subprocess.Popen[str]:
        argv = self.system.command(self.setup, number, self.ips, [])
        with open(self.setup.folder / f"stderr-{number}", "w") as errors:
            process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )
        threading.Thread(target=self._read, args=(number, process), daemon=True).start()
        return process

    def _read(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines[number].append(json.loads(line))

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.processes, *self.helpers]:
            process.kill()
            process.wait()
        for child in self.family:
            if child.is_running():
                child.kill()

    def wait_until(self, condition: Any, what: str) -> None:
        while not condition():
            for process in self.processes:
                if process.poll() is None:
                    try:
                        self.family.update(psutil.Process(process.pid).children(recursive=True))
                    except psutil.NoSuchProcess:
                        pass
            assert time.monotonic() - self.began < LIMIT_S, f"waited in vain for {what}: {self.errors()}"
            time.sleep(0.1)

    def errors(self) -> str:
        return "\n".join(file.read_text()[-2000:] for file in sorted(self.setup.folder.glob("stderr-*")))

    def trained(self) -> bool:
        assert all(process.poll() is None for process in self.processes), self.errors()
        return all(self.last(number).get("swarm_tokens", 0) > 0 for number in range(len(self.processes)))

    def last(self, number: int) -> dict[str, Any]:
        return next((line for line in reversed(self.lines[number]) if line["event"] == "progress"), {})

    def finish(self) -> None:
        """They have ended by themselves, well, and nothing of theirs is left."""
        self.wait_until(lambda: all(process.poll() is not None for process in self.processes), "the end")
        assert [process.returncode for process in self.processes] == [0] * len(self.processes), self.errors()
        left = [child for child in self.family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert not left
        self.wait_until(lambda: all(lines[-1]["event"] == "left" for lines in self.lines), "the last lines")
        for lines in self.lines:
            assert lines[0] == {"event": "ready"}
            assert {line["event"] for line in lines[1:-1]} == {"progress"}

    def weights(self, number: int) -> torch.Tensor:
        tensors = load_file(self.system.weights(self.setup, number))
        return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def setup_of(tmp_path: Path, *, peers: int, until_tokens: int | None) -> Setup:
    run = write_run(tmp_path, averaging={"tokens_per_round": 8_000})
    return Setup(run, peers, until_tokens, tmp_path / "swarm", seed=3)


def test_alone_counts_its_own_tokens(tmp_path: Path) -> None:
    with Peers("alone", setup_of(tmp_path, peers=1, until_tokens=6_400)) as peers:
        peers.finish()
        last = peers.last(0)
        assert last["tokens"] == last["swarm_tokens"] == 6_400
        assert peers.weights(0).isfinite().all()


def test_ddp_peers_end_with_equal_weights(tmp_path: Path) -> None:
    with Peers("ddp-bf16", setup_of(tmp_path, peers=2, until_tokens=12_800)) as peers:
        peers.finish()
        assert [peers.last(number)["tokens"] for number in (0, 1)] == [6_400, 6_400]
        assert peers.last(0)["swarm_tokens"] == 12_800
        assert torch.equal(peers.weights(0), peers.weights(1))


def test_ddp_peers_that_are_asked_to_leave_end_after_the_same_step(tmp_path: Path) -> None:
    with Peers("ddp-fp32", setup_of(tmp_path, peers=2, until_tokens=None)) as peers:
        peers.wait_until(peers.trained, "steps")
        for process in peers.processes:
            process.send_signal(signal.SIGTERM)
        peers.finish()
        assert torch.equal(peers.weights(0), peers.weights(1))
        assert peers.last(0)["tokens"] == peers.last(1)["tokens"]


def test_hivemind_really_averages_and_ends_its_children(tmp_path: Path) -> None:
    with Peers("hivemind", setup_of(tmp_path, peers=2, until_tokens=20_000)) as peers:
        peers.finish()
        assert peers.family  # DHT, averager and p2pd were seen, and are gone
        first, second = peers.weights(0), peers.weights(1)
        # they end right after a round: what is between them is fp16's rounding, not thousands of tokens of other text
        assert float((first - second).norm() / first.norm()) < 5e-3
        for lines in peers.lines:
            assert "averaged, " in lines[-1]["reason"]
        assert peers.last(0)["swarm_tokens"] >= 20_000


def test_torchft_peers_end_with_equal_weights(tmp_path: Path) -> None:
    with Peers("torchft", setup_of(tmp_path, peers=2, until_tokens=60_000)) as peers:
        peers.finish()
        assert torch.equal(peers.weights(0), peers.weights(1))
        assert peers.last(0)["swarm_tokens"] >= 60_000 > peers.last(0)["tokens"]
