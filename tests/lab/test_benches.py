"""The benchmarks in the lab at their smallest: they measure, their books balance, and nothing of them is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.lab import lab_support as support
from tests.lab.lab_support import machine, namespaces

pytestmark = [*support.needs_a_lab, pytest.mark.timeout(400)]
SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"
LIMIT_S = 240
END_S = 60
LAB = "bench"


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    left = [process.cmdline() for process in psutil.process_iter() if "/bench-" in " ".join(cmdline(process))]
    assert not left
    assert LAB not in machine.labs()
    assert not list(namespaces.NETNS.glob(f"{LAB}.*"))


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *arguments, "--out", str(folder / "out.json")]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)},
    )


def bench(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """(the only row of the table, all that was printed)"""
    process = start(folder, *arguments)
    try:
        text, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.terminate()  # no harm where it has ended
        process.wait(END_S)
    assert process.returncode == 0, errors
    document = json.loads((folder / "out.json").read_text())
    assert document["cores"] == os.cpu_count() and document["commit"]
    (row,) = document["result"]["rows"]
    assert not row["failures"], row["failures"]
    return row, text


def pipeline(folder: Path, part: str) -> tuple[list[dict[str, Any]], str]:
    """(rows of that part's table, all that was printed)"""
    process = start(folder, "pipeline", "--quick", "--part", part)
    try:
        text, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.terminate()
        process.wait(END_S)
    assert process.returncode == 0, errors
    return json.loads((folder / "out.json").read_text())["result"][part]["rows"], text


def test_wan(folder: Path) -> None:
    row, text = bench(folder, "wan", "--quick")
    assert 0.1 < row["efficiency"]["median"] < 1.5
    assert row["tokens_per_s"]["median"] == pytest.approx(
        row["efficiency"]["median"] * row["alone_tokens_per_s"]["median"], rel=1e-3
    )
    assert row["commits"]["min"] >= 3 and row["up_bytes_per_s"]["min"] > 10_000
    assert row["overrun_packets"]["max"] == 0
    assert "| home-100 | 2 | swarm | " in text


def test_churn(folder: Path) -> None:
    # one crash: where both peers are dead at the same moment, what came after their checkpoints is gone with them
    faults = ["--kinds", "crash", "--faults-per-hour", "240", "--seed", "7"]
    row, _ = bench(folder, "churn", "--peers", "2", "--seconds", "15", "--set", "tokens_per_round=12000", *faults)
    assert row["num_faults"]["min"] == 1
    assert row["equal_weights"]["min"] == 2 and row["heads_agree"]["min"] == 1
    assert row["counted_twice_tokens"]["max"] == 0
    assert row["num_ended_by_themselves"]["max"] == 0
    assert 0.5 < row["participation"]["min"] <= 1


def test_a_pipeline_against_a_hub(folder: Path) -> None:
    rows, text = pipeline(folder, "speed")
    chain, hub = rows
    assert (chain["case"], hub["case"]) == ("chain", "hub")
    for row in rows:
        assert not row["failures"] and 0.1 < row["share"]["median"] < 1.1
        assert row["tokens_per_s"]["median"] == pytest.approx(
            row["share"]["median"] * row["bound_tokens_per_s"]["median"], rel=1e-3
        )
    # an activation in int8 is 1.06 MB; between two stages one goes up and its gradient comes down. As much as is under
    # way when the window begins and ends is counted for its neighbours
    assert 1.5e6 < chain["up_bytes_per_microbatch"]["median"] < 3.5e6
    assert 4e6 < hub["up_bytes_per_microbatch"]["median"] < 8e6
    assert "| yardstick | chain | 2 | " in text and "chain is " in text


def test_a_pipeline_whose_holders_are_killed(folder: Path) -> None:
    (row,), text = pipeline(folder, "churn")
    assert row["kills"] >= 1 and not row["ended_by_themselves"]
    assert row["calm_tokens_per_s"] > 100 and row["stormy_tokens_per_s"] > 0
    assert min(row["done_tokens"]) > 0
    assert max(row["lost_tokens"]) == max(row["twice_tokens"]) == 0
    assert "| home-100 | 3 | " in text


def test_one_that_is_stopped_leaves_nothing(folder: Path) -> None:
    process = start(folder, "wan", "--quick")
    deadline = time.monotonic() + END_S
    while not list(folder.glob("bench-*/*/*/peer-0.0.err")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=END_S)
    assert process.returncode == 130
