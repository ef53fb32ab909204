"""The peers of `bench.py pipeline` as real processes on loopback: the chain and the hub do what their books say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swarm.config import load_run
from tests.swarm.support import GPTJ, own_ports, wait_until, write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches.systems import Setup, ours
from benches.systems.stages import Stages, StageSpec

ROOT = Path(__file__).parents[2]
LIMIT_S = 100
SERVICE_S = 0.02
LONG = 512
"""tokens of a sequence where the bytes of activations are counted: rounds, copies and records, which every peer sends
too, are few beside them however slow the machine is"""


class Process:
    def __init__(self, argv: list[str], errors: Path) -> None:
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )
        self.lines: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in list(self.lines) if line["event"] == event]


@contextlib.contextmanager
def swarm(tmp_path: Path, system: Stages, **changes: object) -> Iterator[list[Process]]:
    run = write_run(tmp_path, fragments=3, model={"config": {**GPTJ, "n_layer": 3, "n_positions": LONG}}, **changes)
    setup = Setup(run, len(system.specs), None, tmp_path / "swarm", seed=3)
    setup.folder.mkdir()
    peers: list[Process] = []
    ours.PORT = own_ports()
    try:
        for number in range(setup.num_peers):
            join = peers[0].of("ready")[0]["maddrs"] if peers else []
            argv = system.command(setup, number, ["127.0.0.1"] * setup.num_peers, join)
            peers.append(Process(argv, tmp_path / f"stderr-{number}"))
            if number in (0, setup.num_peers - 1):  # the others need the first one's addresses only
                wait_until(lambda: all(p.of("ready") for p in peers), timeout_s=LIMIT_S, what="peers to be ready")
        yield peers
        for peer in peers:
            peer.process.send_signal(signal.SIGTERM)
        for peer in peers:
            assert peer.process.wait(LIMIT_S) == 0
    finally:
        for peer in peers:
            peer.process.kill()
            peer.process.wait()


def specs(*parts: tuple[int, int]) -> list[StageSpec]:
    return [StageSpec(part, SERVICE_S * (part[1] - part[0])) for part in parts]


def test_what_an_origin_says_is_done_is_added_up_once_by_each_peer_of_the_path(tmp_path: Path) -> None:
    with swarm(tmp_path, Stages(specs((0, 1), (1, 3)), emulate=False)) as peers:
        wait_until(lambda: len(peers[0].of("done")) >= 12, timeout_s=LIMIT_S, what="microbatches")
    first, second = (peer.of("ready")[0]["peer_id"] for peer in peers)
    done = peers[0].of("done")
    # in two hops where the second peer had but the first of its fragments when it began
    holders = [[peer for peer, a, b in line["path"] for _ in range(a, b)] for line in done]
    assert all(found == [first, second, second] for found in holders)
    committed = Counter(
        (line["origin"], line["number"], line["start"], line["end"])
        for peer in peers for line in peer.of("committed")
    )
    assert committed == Counter((first, line["number"], a, b) for line in done for _, a, b in line["path"])
    # one stage computes at a time what it is given, and a microbatch takes it no less than the time that was set
    times = [line["at"] for line in peers[1].of("committed")]
    assert times[-1] - times[0] >= (len(times) - 10) * 2 * SERVICE_S, "no faster than its slowest stage"
    losses = [line["loss"] for line in peers[0].of("progress")]
    assert losses and not all(loss == 1.0 for loss in losses), "of the text: 1.0 is what is said where none is computed"


def test_a_hub_drives_each_stage_itself_and_tries_several_numbers_in_flight(tmp_path: Path) -> None:
    system = Stages(specs((0, 1), (1, 2), (2, 3)), emulate=True, hub=[2, 5], each_s=2.0)
    longer = {"train": {"sequence_length": LONG}, "averaging": {"tokens_per_round": 100_000}}
    with swarm(tmp_path, system, **longer) as peers:
        wait_until(lambda: {line["credit"] for line in peers[0].of("done")} == {2, 5}, timeout_s=LIMIT_S, what="both")
        # peers that draw no text speak of progress once they have heard a loss
        wait_until(lambda: all(peer.of("progress") for peer in peers), timeout_s=LIMIT_S, what="progress of all")
        before = [peer.of("progress")[-1]["bytes_sent"] for peer in peers]
        done = len(peers[0].of("done"))
        wait_until(lambda: len(peers[0].of("done")) > done + 30, timeout_s=LIMIT_S, what="more of them")
        counts = [len(peer.of("progress")) for peer in peers]
        wait_until(
            lambda: all(len(peer.of("progress")) > count for peer, count in zip(peers, counts, strict=True)),
            timeout_s=LIMIT_S, what="more progress",
        )
        after = [peer.of("progress")[-1]["bytes_sent"] for peer in peers]
    sent = [later - earlier for earlier, later in zip(before, after, strict=True)]  # of joining: nothing
    assert all(line["loss"] == 1.0 for peer in peers for line in peer.of("progress")), "nothing is computed"
    run = load_run(tmp_path / "run.yaml")
    activation = run.train.sequence_length * 48  # of one sequence, a byte a value
    assert sent[0] > 6 * activation * 30, "three ways up for each of two other stages"
    assert sent[1] < sent[0] / 2
    assert not peers[1].of("done") and not peers[2].of("done")
