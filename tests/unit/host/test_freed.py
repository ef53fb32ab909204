"""What is freed is the system's again. In a process of its own: how memory is handed out stays so for its life."""

from __future__ import annotations

import subprocess
import sys

from swarm.host.freed import LARGE_BYTES, return_freed_memory

PROGRAM = """
import re, sys, torch
from swarm.host.freed import return_freed_memory
def held():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
if sys.argv[1] == "yes":
    assert return_freed_memory()
torch.ones(8_000_000)  # freed at once: from here on glibc would keep blocks of this size
tensors = [torch.ones(2_000_000) for _ in range(20)]
before = held()
kept = tensors[1::2]
del tensors  # every other one: holes between those that stay
print(before - held())
"""


def test_holes_between_what_stays_go_back() -> None:
    if sys.platform != "linux":
        assert not return_freed_memory()
        return

    def given_back(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert given_back("yes") > 70_000_000 > LARGE_BYTES
    assert given_back("no") < 70_000_000, "else this file is of no use any more"
