"""What a swarm in the lab uses: bytes on the wires, CPU of its processes, and CPU of the lab itself."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import psutil
from wanlab import namespaces, processes
from wanlab.lab import Lab


@dataclass(frozen=True)
class Snapshot:
    """What the lab and the processes had used by then."""

    at: float
    hosts: dict[str, dict[str, float]]
    """the lab's counters of each host"""
    forwarder: dict[str, float]
    cpu_s: dict[int, float]
    """of each process in the lab"""


def take(lab: Lab, hosts: list[str]) -> Snapshot:
    stats = lab.stats()
    cpu = {}
    for host in hosts:
        for pid in pids_on(lab, host):
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                cpu[pid] = times.user + times.system
    return Snapshot(time.monotonic(), {host: stats[host] for host in hosts}, stats["forwarder"], cpu)


def pids_on(lab: Lab, host: str) -> list[int]:
    """All processes of a host, whoever started them."""
    return processes.in_namespace(namespaces.NETNS / f"{lab.name}.{host}")


def usage(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """Between two snapshots. Bytes are those on the wire, everything included, means over the peers."""
    seconds = after.at - before.at

    def mean(key: str) -> float:
        return sum(after.hosts[host][key] - before.hosts[host][key] for host in after.hosts) / len(after.hosts)

    return {
        "seconds": seconds,
        "up_bytes_per_peer": mean("up_bytes"),
        "up_bytes_per_s": mean("up_bytes") / seconds,
        "down_bytes_per_s": mean("down_bytes") / seconds,
        "cpu_cores": sum(spent - before.cpu_s.get(pid, 0.0) for pid, spent in after.cpu_s.items()) / seconds,
        "emulator_cores": (after.forwarder["cpu_s"] - before.forwarder["cpu_s"]) / seconds,
        "emulator_late_max_us": after.forwarder.get("late_max_us", 0.0),
        "overrun_packets": sum(after.hosts[host]["overrun"] - before.hosts[host]["overrun"] for host in after.hosts),
    }
