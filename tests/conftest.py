"""For all tests: one torch thread a worker, and nothing that a test started outlives it (I7)."""

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several workers share the cores

import psutil
import pytest

OURS = ("p2pd", "watchdog.py")
GONE_S = 10.0


def daemons() -> list[psutil.Process]:
    """libp2p daemons and their watchdogs that this worker started, at any depth."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            command, status = child.cmdline(), child.status()
        except psutil.NoSuchProcess:
            continue
        if status != psutil.STATUS_ZOMBIE and any(os.path.basename(word) in OURS for word in command[:6]):
            found.append(child)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = {child.pid for child in daemons()}
    yield
    deadline = time.monotonic() + GONE_S
    while left := [child for child in daemons() if child.pid not in before]:
        if time.monotonic() > deadline:
            names = [" ".join(child.cmdline()) for child in left]
            for child in left:
                child.kill()
            pytest.fail(f"left behind: {names}")
        time.sleep(0.02)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture
def folder():
    """Short: a unix socket's path must be, and pytest's own folders are not."""
    with tempfile.TemporaryDirectory(prefix="swarm-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def nets(folder):
    """Makes networks on loopback, and stops them with the test."""
    from tests.swarm.network_support import Nets

    with Nets(folder) as nets:
        yield nets
