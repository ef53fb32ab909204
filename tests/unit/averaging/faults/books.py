"""The books of a whole swarm, kept from outside: what every process has learnt, offered and applied.

With them the invariants can be checked exactly, at each commit and at the end (swarm/README.md, DESIGN 4):

    I1  whoever applies a commit comes to the same digest, and the same state from the same past
    I2  of each process:  trained = in commits of the history that leads to its head + pending,  in tokens and weights;
        a commit's tokens are those that its contributors offered to that very opening, and its result, where nothing
        is quantised, is their average

Every history is known here, since every commit is noted when the first process applies it, also by one that then dies.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from swarm.averaging import plan, robust
from swarm.averaging.apply import Applier
from swarm.averaging.global_state import GlobalState
from swarm.averaging.ledger import Contribution, Ledger
from swarm.averaging.messages import Commit
from swarm.averaging.reduction import reduce_part
from swarm.network.codec import BLOCK
from tests.unit.averaging.faults.loop import START_S
from tests.unit.averaging.faults.peer import STEP, Peer

CLOSE = STEP / 3
"""weights may be off by what rounding and 8-bit feedback lose, but by no inner step"""


class Broken(AssertionError):
    """An invariant does not hold."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        BROKEN.append(text)


BROKEN: list[str] = []
"""what was raised inside of the product, which may go on"""


@dataclass
class Offer:
    """What one process contributed to one opening."""

    process: str
    contribution: Contribution
    tokens: int


@dataclass(frozen=True)
class Step:
    """A commit that somebody has applied, and the state that it led to."""

    commit: Commit
    base: str
    digest: str
    own: dict[str, int]
    """process -> its tokens in this commit and all before it"""
    openings: dict[str, tuple[str, ...]]
    """process -> the openings by which they came in"""


@dataclass
class Books:
    peers: list[Peer] = field(default_factory=list)
    """every process there ever was"""
    offers: dict[tuple[str, str], Offer] = field(default_factory=dict)
    """(opening, peer id) -> what it offered"""
    steps: dict[str, Step] = field(default_factory=dict)
    """digest -> how it came about; the runs' starts are not in it"""
    results: dict[str, str] = field(default_factory=dict)
    """commit -> the digest it led to"""
    last_commit: dict[tuple[str, int], float] = field(default_factory=dict)
    """(process, fragment) -> when its state last changed"""
    log: list[str] = field(default_factory=list)

    def watch(self, peer: Peer) -> None:
        self.peers.append(peer)
        for index in peer.holds:
            fragment = peer.averager._fragments[index]
            self._watch_offers(peer, fragment.ledger)
            self._watch_steps(peer, fragment.applier)
            fragment.applier.on_applied.insert(0, self._listener(peer, fragment.applier))

    def say(self, peer: Peer | None, text: str) -> None:
        self.note(peer.process.name if peer is not None else "", text)

    def note(self, name: str, text: str) -> None:
        now = self.peers[0].around.loop.time() - START_S if self.peers else 0.0
        self.log.append(f"{now:8.3f}  {name:6}{text}")

    def _watch_offers(self, peer: Peer, ledger: Ledger) -> None:
        contribute = ledger.contribute

        def noted(opening_id: str, version: int, *, max_tokens: int = 2**40) -> Contribution:
            contribution = contribute(opening_id, version, max_tokens=max_tokens)
            self.offers[opening_id, peer.id] = Offer(peer.process.name, contribution, contribution.tokens)
            self.say(peer, f"offers {contribution.tokens} to {opening_id[:6]} for version {version}")
            return contribution

        ledger.contribute = noted  # type: ignore[method-assign]

    def _watch_steps(self, peer: Peer, applier: Applier) -> None:
        """A commit is known from the moment on at which its state is: it may be on a disk before it is in a history."""
        take = applier._step

        def noted(state: GlobalState, commit: Commit, average: torch.Tensor) -> GlobalState:
            new = take(state, commit, average)
            known = self.results.setdefault(commit.hash, new.digest)
            if known != new.digest:
                raise Broken(f"I1: {peer.process.name} makes {new.digest[:6]} of a commit that made {known[:6]}")
            if new.digest not in self.steps:
                self.steps[new.digest] = self._step(peer, commit, new)
            return new

        applier._step = noted  # type: ignore[method-assign]

    def _listener(self, peer: Peer, applier: Applier):  # type: ignore[no-untyped-def]
        def applied(commit: Commit) -> None:
            if not peer.process.dead:
                self._applied(peer, applier, commit)

        return applied

    def _applied(self, peer: Peer, applier: Applier, commit: Commit) -> None:
        state = applier.ledger.state
        self.say(peer, (
            f"applies {commit.opening.id[:6]}: version {commit.opening.version}, {commit.tokens} tokens of "
            f"{len(commit.contributors)}, base {commit.opening.base[:6]} -> {state.digest[:6]}, "
            f"pending {applier.ledger.pending_tokens}"
        ))
        self.check(peer, applier.fragment)

    def _step(self, peer: Peer, commit: Commit, state: GlobalState) -> Step:
        opening = commit.opening
        before = self.steps.get(opening.base)
        own = dict(before.own) if before is not None else {}
        openings = dict(before.openings) if before is not None else {}
        offers = {}
        for contributor in commit.contributors:
            peer_id = opening.members[contributor.member]
            offer = self.offers.get((opening.id, peer_id))
            if offer is None or offer.tokens != contributor.tokens:
                raise Broken(f"I2: version {opening.version} has {contributor.tokens} tokens that nobody offered")
            own[offer.process] = own.get(offer.process, 0) + offer.tokens
            openings[offer.process] = (*openings.get(offer.process, ()), opening.id)
            offers[peer_id] = offer
        if state.tokens != sum(own.values()):
            raise Broken(f"I2: version {state.version} counts {state.tokens} tokens, and has {sum(own.values())}")
        if peer.around.run.averaging.bits == 32:  # no feedback
            self._check_results(commit, offers)
        return Step(commit, opening.base, state.digest, own, openings)

    def _check_results(self, commit: Commit, offers: dict[str, Offer]) -> None:
        tokens = {peer_id: offer.tokens for peer_id, offer in offers.items()}
        for part, result in zip(commit.opening.parts, commit.results, strict=True):
            span = slice(part.start * BLOCK, part.end * BLOCK)
            values = {peer_id: offer.contribution.values[span] for peer_id, offer in offers.items()}
            data, _ = reduce_part(
                values, tokens, torch.zeros(span.stop - span.start), num_fine=0, bits=32,
                verdict=robust.plain(plan.weights(tokens)),
            )
            if hashlib.sha256(data).hexdigest() != result.hash:
                raise Broken(f"I2: version {commit.opening.version} is not the average of what its members offered")

    def check(self, peer: Peer, fragment: int, *, weights: bool = False) -> None:
        """I2 of one process. Raises Broken."""
        ledger = peer.averager._fragments[fragment].ledger
        step = self.steps.get(ledger.state.digest)
        if step is None and ledger.state.version:
            raise Broken(f"I1: {peer.process.name} is at {ledger.state.digest[:6]}, which no commit leads to")
        committed = step.own.get(peer.process.name, 0) if step is not None else 0
        trained = peer.trained[fragment]
        if committed + ledger.pending_tokens != trained:
            raise Broken(
                f"I2: {peer.process.name} has trained {trained} tokens; {committed} are in its history at version "
                f"{ledger.state.version}, {ledger.pending_tokens} pending"
            )
        if weights:
            self._check_weights(peer, fragment, step)

    def _check_weights(self, peer: Peer, fragment: int, step: Step | None) -> None:
        """What was learnt = what commits have said of it + what the next contribution would say."""
        held = peer.averager._fragments[fragment]
        wanted = held.work.learnt(held.ledger.state.weights)
        if held.ledger._feedback is not None:
            wanted += held.ledger._feedback.read()
        for opening_id in step.openings.get(peer.process.name, ()) if step is not None else ():
            contribution = self.offers[opening_id, peer.id].contribution
            wanted += contribution.recall() if contribution.recall is not None else contribution.values
        learnt = peer.learns[fragment] * peer.steps[fragment]
        off = float((wanted - learnt).abs().max())
        if off > CLOSE:
            raise Broken(
                f"I2: {peer.process.name} has learnt {float(learnt[0]):.3f} of the first weight; its commits and its "
                f"drift have {float(wanted[0]):.3f}, and are off by up to {off:.3f} elsewhere"
            )

    def check_agreement(self, peers: list[Peer], fragment: int) -> None:
        """After quiet: one head, and of each process all tokens in its history; of the dead no more than they had."""
        holders = [peer for peer in peers if fragment in peer.holds]
        heads = {peer.averager._fragments[fragment].ledger.state.digest for peer in holders}
        if len(heads) > 1:
            raise Broken(f"I1: {len(heads)} truths of fragment {fragment} after quiet")
        for digest in heads:
            step = self.steps.get(digest)
            for process, tokens in (step.own if step is not None else {}).items():
                [peer] = [peer for peer in self.peers if peer.process.name == process]
                if tokens > peer.trained[fragment]:
                    raise Broken(f"I2: {tokens} tokens of {process} count, and it had trained {peer.trained[fragment]}")
        for peer in holders:
            self.check(peer, fragment, weights=True)
            if peer.averager._fragments[fragment].ledger.pending_tokens:
                raise Broken(f"I2: {peer.process.name} still has tokens pending after quiet")
