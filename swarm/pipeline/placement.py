"""Which fragments a peer holds, and when it moves: the rule that every peer runs for itself, over what all say.

Nobody assigns anything. A newcomer takes the stage that raises the swarm's `worth` (throughput.py) most. Later a peer
moves, when another stage would be worth so much more that it pays, and then one peer at a time:

- a move is thought of in one round and must still be the same in the next: figures are noisy, and needless
  moves cost downloads (Petals reloads the very same blocks, issue 389);
- then it is claimed, in the peer's own entry, and after `CLAIM_S`, when everybody has read it, the peer looks again: it
  goes only if nobody claims more. Without that, everybody runs to the same hole (Petals' answer is to wait at random);
- fragments that nobody holds go before everything: no rounds, no rest after the last move, claims of `HEAL_S`.

What a move must gain is measured against the mover's own speed, not the swarm's: the same share of a peer's work pays
for its download in a swarm of ten and of ten thousand. Moving is make before break: loading.py.

All functions are pure: snapshot, own entry, own memory and the clock come in, a decision comes out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from swarm.pipeline.snapshot import NO_STAGE, Claim, Holder, Snapshot, Stage, options_of
from swarm.pipeline.throughput import Bools, Floats, Ints, masks_of

ROUND_S = 60.0
"""how often a peer thinks about moving, in swarms of up to `ROUND_PEERS`"""
ROUND_PEERS = 256
MAX_ROUND_S = 600.0
"""in large swarms one peer matters less, and more of them look"""
CLAIM_S = 10.0
"""an entry has reached everybody by then: two refreshes"""
HEAL_S = 4.0
"""as much as can be waited where nothing works: two heartbeats and a bit"""
PATIENCE_S = 60.0
"""for how long a better claim is respected: whoever claims and never goes shall not hold up the swarm"""
REST_S = 300.0
"""least time between two moves of a peer"""
PEERS_PER_MOVER = 64
"""so many peers for each that may move at a time"""
MIN_GAIN = 1.0
"""a move wins the swarm at least as much as the whole speed of the mover. That is not much: in a lopsided swarm one
peer at the bottleneck sets free many others. Less (0.3, 0.6) gave more moves, up to twice as many, for nothing"""
LOAD_GAIN_PER_S = 0.5 / 1800
"""what it must win in addition for each second of loading, of the mover's speed"""


@dataclass(frozen=True)
class Memory:
    """What a peer has to remember between two decisions."""

    moved_at_s: float = float("-inf")
    looked_at_s: float = float("-inf")
    wanted: Stage | None = None
    """what the last round found worth moving to"""
    claim: Claim | None = None
    claimed_at_s: float = 0.0
    ahead: tuple[tuple[str, float], ...] = ()
    """(peer, since when it has been seen to claim more)"""


class Act(Enum):
    STAY = "stay"
    CLAIM = "claim"
    """publish `Decision.claim`, and ask again soon"""
    GO = "go"
    """make the claim's stage the target now, and withdraw the claim"""


@dataclass(frozen=True)
class Decision:
    act: Act
    memory: Memory
    claim: Claim | None = None
    """to be published; None: withdraw it"""


def choose_stage(snapshot: Snapshot, me: Holder) -> Stage:
    """Where a newcomer goes: of the stages that fill its memory the one that raises the swarm's worth most; of equal
    ones, one by hash of the peer's id. `me` with what it can do; where it is does not matter. Raises ConfigError where
    no fragment fits."""
    options = options_of(me.room_bytes, snapshot.fragments)
    return _stage(options, _best(snapshot.worths(me, options), options, me.peer_id))


def decide(snapshot: Snapshot, me: Holder, memory: Memory, *, now_s: float, load_s: float) -> Decision:
    """Whether this peer moves. To be asked every heartbeat or two; most answers are quick.

    `load_s`: what it takes this peer to load one fragment, seconds; `now_s`: any clock that only goes forward.
    """
    gaps = snapshot.gaps(me)
    if gaps.any():
        claim = _healing(snapshot, me, gaps)
    elif memory.claim is not None and not memory.claim.heals:
        claim = _gainful(snapshot, me, load_s=load_s)
        if claim is not None and claim.stage != memory.claim.stage:
            claim = None
    else:
        if now_s - max(memory.moved_at_s, memory.looked_at_s) < round_s(len(snapshot)):
            return Decision(Act.STAY, memory if memory.claim is None else replace(memory, claim=None))
        memory = replace(memory, looked_at_s=now_s, claim=None)
        if now_s - memory.moved_at_s < REST_S:
            return Decision(Act.STAY, memory)
        claim = _gainful(snapshot, me, load_s=load_s)
        wanted = claim.stage if claim is not None else None
        if wanted is None or wanted != memory.wanted:
            return Decision(Act.STAY, replace(memory, wanted=wanted))
    if claim is None:
        return Decision(Act.STAY, replace(memory, claim=None, wanted=None, ahead=()))
    return _pursue(snapshot, me, memory, claim, now_s=now_s)


def _pursue(snapshot: Snapshot, me: Holder, memory: Memory, claim: Claim, *, now_s: float) -> Decision:
    """Claim it, or go, or yield to who claims more."""
    seen_s, mine = dict(memory.ahead), _rank(me.peer_id, claim)
    ahead = tuple(
        (peer_id, seen_s.get(peer_id, now_s)) for peer_id, other in snapshot.claims.items()
        if peer_id != me.peer_id and _rank(peer_id, other) > mine
    )
    memory = replace(memory, ahead=ahead)
    movers = 1 if claim.heals else 1 + len(snapshot) // PEERS_PER_MOVER
    if sum(now_s - since_s < PATIENCE_S for _, since_s in ahead) >= movers:
        return Decision(Act.STAY, replace(memory, claim=None))
    if memory.claim is None or memory.claim.stage != claim.stage or memory.claim.heals != claim.heals:
        return Decision(Act.CLAIM, replace(memory, claim=claim, claimed_at_s=now_s), claim)
    if now_s - memory.claimed_at_s < (HEAL_S if claim.heals else CLAIM_S):
        return Decision(Act.CLAIM, replace(memory, claim=claim), claim)
    return Decision(Act.GO, Memory(moved_at_s=now_s, looked_at_s=now_s), claim)


def round_s(num_peers: int) -> float:
    """Time between two thoughts of moving."""
    return min(MAX_ROUND_S, ROUND_S * max(1.0, num_peers / ROUND_PEERS))


def _healing(snapshot: Snapshot, me: Holder, gaps: Bools) -> Claim | None:
    """The stage with which the fewest fragments are left to nobody, if they are fewer than now. What only this peer
    holds becomes a gap when it goes."""
    options, worths, before = _prospects(snapshot, me)
    uncovered = gaps | snapshot.gaps(replace(me, serving=NO_STAGE, target=NO_STAGE))
    left = _left(uncovered, options)
    if left.min() >= _left(uncovered, np.array([me.target]))[0]:
        return None
    best = _best(np.where(left == left.min(), worths, -1.0), options, me.peer_id)
    return Claim(_stage(options, best), float(worths[best] / before), heals=True)


def _gainful(snapshot: Snapshot, me: Holder, *, load_s: float) -> Claim | None:
    """The stage that gains most after what its loading costs, if that pays."""
    options, worths, before = _prospects(snapshot, me)
    overlap = np.minimum(options[:, 1], me.target[1]) - np.maximum(options[:, 0], me.target[0])
    missing = options[:, 1] - options[:, 0] - np.maximum(overlap, 0)
    gains = (worths - before) * sum(snapshot.fragments.work) / me.speed - LOAD_GAIN_PER_S * load_s * missing
    best = _best(gains, options, me.peer_id)
    if gains[best] < MIN_GAIN or _stage(options, best) == me.target:
        return None
    return Claim(_stage(options, best), float(gains[best]))


def _prospects(snapshot: Snapshot, me: Holder) -> tuple[Ints, Floats, float]:
    """(stages that fill its memory, worth of each, worth as it is)"""
    options = options_of(me.room_bytes, snapshot.fragments)
    worths = snapshot.worths(me, np.concatenate([options, np.array([me.target], dtype=np.int64)]))
    return options, worths[:-1], float(worths[-1])


def _left(uncovered: Bools, options: Ints) -> Ints:
    """(K,) how many of the uncovered fragments each option leaves."""
    left: Ints = uncovered.sum() - (masks_of(options[:, 0], options[:, 1], len(uncovered)) @ uncovered).astype(np.int64)
    return left


def _best(values: Floats, options: Ints, peer_id: str) -> int:
    top = float(values.max())
    equal = np.flatnonzero(values >= top - 1e-9 * abs(top)).tolist()
    return int(min(equal, key=lambda index: _hash(f"{peer_id}/{options[index, 0]}")))


def _stage(options: Ints, index: int) -> Stage:
    return int(options[index, 0]), int(options[index, 1])


def _rank(peer_id: str, claim: Claim) -> tuple[bool, float, bytes]:
    return claim.heals, claim.gain, _hash(peer_id)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
