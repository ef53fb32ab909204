"""A swarm of which only placement is simulated: peers come and go, load fragments, see each other a little late.

Everything that decides is the rule's: for ours that is the product's own functions, asked as a peer would ask them. The
number of peers stays the same: whoever dies is replaced at once by another, of any class, that holds nothing.

Time is events. After each one the optimal flow through what is served is worked out (`throughput.flow`: the linear
program's optimum, by its dual), and counts until the next.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benches.placement_rules import Rule
from swarm.pipeline.loading import next_fragment, stage_to_serve
from swarm.pipeline.snapshot import NO_STAGE, Claim, Fragments, Holder, Snapshot, Stage
from swarm.pipeline.throughput import flow, stages_of

CLASSES = ((2, 1.0),) * 3 + ((4, 4.0),) * 4 + ((8, 8.0),) * 2 + ((16, 16.0),)
"""(fragments that fit, speed): three of ten peers are laptops, one is a workstation"""
SPEED_SPREAD = 0.3
LOAD_S = (20.0, 60.0)
"""to load a fragment: one value a peer"""
PUBLISH_S = (0.5, 3.0)
"""until an entry has reached the others"""
MISSED_S = (3.0, 6.0)
"""until the others know that one is dead"""


@dataclass(frozen=True)
class Trace:
    """What happens to a swarm."""

    num_peers: int
    lifetime_s: float
    """mean of an exponential distribution; inf: nobody leaves"""
    hours: float
    """that are measured, after `warm_hours`"""
    warm_hours: float = 1.0
    num_fragments: int = 32
    noise: float = 0.0
    """of measured speeds: each is off by up to this share, another one every minute"""
    refresh_s: float = 1.0
    """how old a snapshot may be (beside what publishing takes)"""
    sample_s: float = 0.0
    """least time between two evaluations of the flow"""


@dataclass
class Peer:
    peer_id: str
    room: int
    speed: float
    load_s: float
    serving: Stage = NO_STAGE
    target: Stage = NO_STAGE
    claim: Claim | None = None
    have: set[int] = field(default_factory=set)
    loading: bool = False
    state: Any = None
    alive: bool = True
    measured: float = 0.0
    asked: tuple[Any, ...] = ()

    def entry(self) -> Holder:
        return Holder(self.peer_id, self.serving, self.target, self.room, self.measured, self.claim)


class Swarm:
    """One simulation; `run` gives its figures."""

    def __init__(self, rule: Rule, trace: Trace, *, seed: int) -> None:
        self.rule, self.trace = rule, trace
        self.fragments = Fragments((1,) * trace.num_fragments, (1.0,) * trace.num_fragments)
        self.now_s = 0.0
        self.peers: dict[str, Peer] = {}
        self.moves = self.heals = self.loads = 0
        self.series: list[tuple[float, float, float]] = []
        """(seconds, flow, what all compute evenly spread would do), both microbatches/s, from then on"""
        self._fate = np.random.default_rng([seed, 0])  # the same lives and classes for every rule
        self._rng = np.random.default_rng([seed, 1])
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._visible: dict[str, Holder] = {}
        self._snapshot = Snapshot([], self.fragments)
        self._snapshot_s, self._stale = 0.0, False
        self._changed = True

    def run(self) -> dict[str, float]:
        trace = self.trace
        self.found()
        end_s = (trace.warm_hours + trace.hours) * 3600
        sampled_s = -np.inf
        while self._events and self._events[0][0] <= end_s:
            at_s, _, act, arguments = heapq.heappop(self._events)
            if at_s > self.now_s and self._changed and self.now_s - sampled_s >= trace.sample_s:
                self._sample()
                sampled_s = self.now_s
            self.now_s = at_s
            act(*arguments)
        self._sample()
        return figures(self.series, begin_s=trace.warm_hours * 3600, end_s=end_s) | {
            "moves_per_h": self.moves / trace.hours, "heals_per_h": self.heals / trace.hours,
            "loads_per_peer_h": self.loads / trace.hours / trace.num_peers,
            "moves_per_peer_day": self.moves / trace.hours * 24 / trace.num_peers,
        }

    def found(self) -> None:
        """The first peers: each has loaded its stage already."""
        for _ in range(self.trace.num_peers):
            self._born(complete=True)

    def _at(self, at_s: float, act: Callable[..., None], *arguments: Any) -> None:
        if np.isfinite(at_s):
            heapq.heappush(self._events, (at_s, next(self._numbers), act, arguments))

    def _measuring(self) -> bool:
        return self.now_s >= self.trace.warm_hours * 3600

    def _sample(self) -> None:
        peers = list(self.peers.values())
        places = np.array([peer.serving for peer in peers], dtype=np.int64)
        speeds = np.array([peer.speed for peer in peers])
        served = stages_of(places[:, 0], places[:, 1], speeds, num_fragments=len(self.fragments))
        work = np.array(self.fragments.work)
        self.series.append((self.now_s, flow(served, work), float(speeds.sum() / work.sum())))
        self._changed = False

    # ---- lives ----

    def _born(self, *, complete: bool = False) -> None:
        room, speed = CLASSES[self._fate.integers(len(CLASSES))]
        speed *= self._fate.uniform(1 - SPEED_SPREAD, 1 + SPEED_SPREAD)
        peer = Peer(f"peer-{next(self._numbers)}", room, speed, self._fate.uniform(*LOAD_S), measured=speed)
        life_s = self._fate.exponential() * self.trace.lifetime_s
        self.peers[peer.peer_id] = peer
        self._at(self.now_s + life_s, self._die, peer)
        peer.target = self.rule.join(self._seen(), peer.entry())
        if complete:
            peer.have, peer.serving = set(range(*peer.target)), peer.target
            self._visible[peer.peer_id] = peer.entry()
            self._stale = True
            if len(self.peers) % (1 + len(self.peers) // 64) == 0:
                self._snapshot_s = -np.inf  # founders come one after the other and see each other
        self._changed = True
        self._publish(peer)
        self._load(peer)
        self._at(self.now_s + self._rng.uniform(0, 5), self._ask, peer)
        if self.trace.noise:
            self._at(self.now_s + self._rng.uniform(0, 60), self._measure, peer)

    def _die(self, peer: Peer) -> None:
        peer.alive = False
        del self.peers[peer.peer_id]
        self._changed = True
        self._at(self.now_s + self._rng.uniform(*MISSED_S), self._forget, peer)
        self._born()

    def _forget(self, peer: Peer) -> None:
        self._stale |= self._visible.pop(peer.peer_id, None) is not None

    def _measure(self, peer: Peer) -> None:
        if peer.alive:
            peer.measured = peer.speed * self._rng.uniform(1 - self.trace.noise, 1 + self.trace.noise)
            self._publish(peer)
            self._at(self.now_s + 60, self._measure, peer)

    # ---- what they see of each other ----

    def _publish(self, peer: Peer) -> None:
        self._at(self.now_s + self._rng.uniform(*PUBLISH_S), self._hear, peer, peer.entry())

    def _hear(self, peer: Peer, entry: Holder) -> None:
        if peer.alive:
            self._visible[peer.peer_id] = entry
            self._stale = True

    def _seen(self) -> Snapshot:
        if self._stale and self.now_s - self._snapshot_s >= self.trace.refresh_s:
            self._snapshot = Snapshot(self._visible.values(), self.fragments, like=self._snapshot)
            self._snapshot_s, self._stale = self.now_s, False
        return self._snapshot

    # ---- what they do ----

    def _ask(self, peer: Peer) -> None:
        if not peer.alive:
            return
        step = self.rule.step(
            self._seen(), peer.entry(), peer.state, now_s=self.now_s, load_s=peer.load_s, rng=self._rng
        )
        peer.state = step.state
        self._at(self.now_s + step.again_s, self._ask, peer)
        if step.target is not None and step.target != peer.target:
            self.moves += self._measuring()
            self.heals += self._measuring() and step.heals
            peer.target, peer.claim = step.target, None
            if self.rule.breaks:
                peer.have = set()
                self._serve(peer, NO_STAGE)
            self._publish(peer)
            self._load(peer)
        elif step.claim != peer.claim:
            peer.claim = step.claim
            self._publish(peer)

    def _load(self, peer: Peer) -> None:
        """Begin with the next fragment; one at a time."""
        if peer.loading:
            return
        if self.rule.breaks:
            wanted = min(set(range(*peer.target)) - peer.have, default=None)
        else:
            wanted = next_fragment(self._seen(), peer.entry(), peer.have)
        if wanted is not None:
            peer.loading = True
            self._at(self.now_s + peer.load_s, self._loaded, peer, wanted)

    def _loaded(self, peer: Peer, fragment: int) -> None:
        if not peer.alive:
            return
        peer.loading = False
        peer.have.add(fragment)
        self.loads += self._measuring()
        complete = peer.have >= set(range(*peer.target))
        if self.rule.breaks:
            stage = peer.target if complete else NO_STAGE
        else:
            stage = stage_to_serve(self._seen(), peer.entry(), peer.have)
        if complete:
            peer.have = set(range(*peer.target))
        if stage != peer.serving:
            self._serve(peer, stage)
            self._publish(peer)
        self._load(peer)

    def _serve(self, peer: Peer, stage: Stage) -> None:
        peer.serving = stage
        self._changed = True


def figures(series: list[tuple[float, float, float]], *, begin_s: float, end_s: float) -> dict[str, float]:
    """Of a series of (from when, flow, bound): each value counts until the next, within the window."""
    times, flows, bounds = np.array(series).T
    seconds = np.diff(np.append(np.clip(times, begin_s, end_s), end_s))
    share = flows / bounds
    order = np.argsort(share)
    passed = np.cumsum(seconds[order]) / seconds.sum()
    return {
        "efficiency": float((share * seconds).sum() / seconds.sum()),
        "worst_decile": float(share[order][np.searchsorted(passed, 0.1)]),
        "gap": float(seconds[flows <= 0].sum() / seconds.sum()),
    }
