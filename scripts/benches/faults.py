"""A seeded schedule of accidents, and who does them to a swarm in the lab.

    crash      SIGKILL; the machine lives on and closes its connections. Started again after some seconds
    power      the machine goes silent and its processes are gone. Started again after some seconds
    freeze     SIGSTOP of all its processes, SIGCONT after some seconds: a laptop that was closed
    cut        the machine is silent for some seconds, its processes live
    partition  two halves of the swarm cannot hear each other for some seconds
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benches.labrun import LabSwarm

KINDS = ("crash", "power", "freeze", "cut", "partition")
LASTS_S = {"crash": (3, 15), "power": (5, 20), "freeze": (3, 15), "cut": (5, 20), "partition": (5, 20)}
"""from, to; uniform"""
SPARED = 2
"""peers that no fault touches at any time, but for partitions: where all die at once there is nothing to measure"""


@dataclass(frozen=True)
class Fault:
    at_s: float
    """since the schedule began"""
    kind: str
    numbers: tuple[int, ...]
    """the peers that it befalls; of a partition one half"""
    lasts_s: float

    @property
    def ends_s(self) -> float:
        return self.at_s + self.lasts_s


def schedule(
    *, seed: int, seconds: float, per_hour: float, kinds: Sequence[str], num_peers: int, spare_first: bool = False
) -> list[Fault]:
    """Faults come at random (Poisson), of random kind, to a random peer of those that are well; all end in time.

    `spare_first`: the first peer's machine has something on it that the others cannot do without."""
    dice = random.Random(seed)
    found: list[Fault] = []
    at = 0.0
    while True:
        at += dice.expovariate(per_hour / 3600)
        kind = dice.choice(list(kinds))
        lasts_s = min(dice.uniform(*LASTS_S[kind]), seconds / 4)
        order = dice.sample(range(num_peers), num_peers)
        if at + lasts_s >= seconds:
            return found
        now = [fault for fault in found if fault.ends_s > at]
        if kind == "partition":
            if not any(fault.kind == "partition" for fault in now):
                found.append(Fault(at, kind, tuple(sorted(order[:num_peers // 2])), lasts_s))
            continue
        ill = {number for fault in now if fault.kind != "partition" for number in fault.numbers}
        well = [number for number in order if number not in ill]
        victim = next((number for number in well if number or not spare_first), None)
        if victim is not None and len(well) > min(SPARED, num_peers - 1):
            found.append(Fault(at, kind, (victim,), lasts_s))


class Mischief:
    """Does what a schedule says to a swarm, as time passes: `tick` often."""

    def __init__(self, swarm: LabSwarm, faults: Sequence[Fault]) -> None:
        self.began = time.monotonic()
        self.done: list[Fault] = []
        self._swarm, self._coming, self._now = swarm, list(faults), list[Fault]()

    def tick(self) -> None:
        now_s = time.monotonic() - self.began
        for fault in [fault for fault in self._now if fault.ends_s <= now_s]:
            self._end(fault)
        while self._coming and self._coming[0].at_s <= now_s:
            self._begin(self._coming.pop(0))

    def is_over(self) -> bool:
        return not self._now and not self._coming

    def _begin(self, fault: Fault) -> None:
        swarm, lab = self._swarm, self._swarm.lab
        self._now.append(fault)
        self.done.append(fault)
        for number in fault.numbers:
            host = swarm.hosts[number]
            if fault.kind in ("crash", "power"):
                (lab.crash if fault.kind == "crash" else lab.kill)(host)
                swarm.ended(number)
            elif fault.kind == "freeze":
                swarm.signal_host(host, signal.SIGSTOP)
            elif fault.kind == "cut":
                lab.cut(host)
        if fault.kind == "partition":
            for a, b in self._across(fault):
                lab.cut(a, b)

    def _end(self, fault: Fault) -> None:
        swarm, lab = self._swarm, self._swarm.lab
        self._now.remove(fault)
        for number in fault.numbers:
            host = swarm.hosts[number]
            if fault.kind in ("power", "cut"):
                lab.heal(host)
            if fault.kind in ("crash", "power"):
                swarm.start(number, resume=True)
            elif fault.kind == "freeze":
                swarm.signal_host(host, signal.SIGCONT)
        if fault.kind == "partition":
            for a, b in self._across(fault):
                lab.heal(a, b)

    def _across(self, fault: Fault) -> list[tuple[str, str]]:
        hosts = self._swarm.hosts
        here = [hosts[number] for number in fault.numbers]
        return list(itertools.product(here, [host for host in hosts if host not in here]))
