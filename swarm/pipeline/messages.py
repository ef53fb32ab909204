"""What peers of a chain say to each other about one microbatch.

A microbatch is named by its origin and a number of the origin's, so that asking twice is asking once. What is asked of
a peer is "this microbatch, from this fragment on": the answer is the gradient of what was sent, and the path that the
microbatch took, which only its origin may declare done (chain.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from swarm.errors import BadMessage
from swarm.network.records import MAX_FRAGMENTS, PeerIdText, Strict

MAX_HOPS = MAX_FRAGMENTS
MAX_SEQUENCES = 4096
MAX_LENGTH = 2**20
MAX_POSITIONS = 1024
"""whose logits may be asked for at once; their bytes are bounded as well (admission.py)"""

Number = Annotated[int, Field(ge=0, le=2**53)]
FragmentIndex = Annotated[int, Field(ge=0, lt=MAX_FRAGMENTS)]
FragmentEnd = Annotated[int, Field(ge=1, le=MAX_FRAGMENTS)]
Bits = Literal[4, 8, 32]
Seconds = Annotated[float, Field(ge=0, le=1e6)]


class Hop(Strict):
    """Fragments [start, end) of a microbatch were, or are being, done by this peer."""

    peer_id: PeerIdText
    start: FragmentIndex
    end: FragmentEnd


class Microbatch(Strict):
    """Asks a peer to go on with a microbatch at fragment `start`. The body: see wire.py."""

    origin: PeerIdText
    number: Number
    start: FragmentIndex
    sequences: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)]
    length: Annotated[int, Field(ge=1, le=MAX_LENGTH)]
    """tokens of each sequence; a loss needs two"""
    bits: Bits = 8
    """of the values in this message"""
    back_bits: Bits = 8
    """of the gradient that is asked for"""
    train: bool = True
    """False: only the loss, or logits, are wanted; nothing is learnt and nothing kept"""
    logits: Annotated[int, Field(ge=0, le=MAX_POSITIONS)] = 0
    """of so many last positions of each sequence are wanted, in place of the loss"""
    segments: Annotated[int, Field(ge=0, le=MAX_SEQUENCES * MAX_LENGTH)] = 0
    """of all its sequences together, in the body; none: each sequence is one causal segment"""
    version: Annotated[int, Field(ge=0, le=2**40)] = 0
    """no fragment may be older than this (`sync` runs: one version a step)"""
    again: bool = False
    """somebody was asked for it already, here or further up, and died or fell silent: it has waited long enough.
    Whoever says so without cause gets its turns sooner, and no more of them than admission.py allows"""
    known: Annotated[list[Hop], Field(max_length=MAX_HOPS)] = []
    """who has done, or is doing, the rest of it: they answer without doing it again"""

    @model_validator(mode="after")
    def _is_possible(self) -> Microbatch:
        if self.logits and self.train:
            raise ValueError("logits are not trained on")
        if not self.logits and self.length < 2:
            raise ValueError("one token says nothing of a next one")
        if self.segments and not self.sequences <= self.segments <= self.tokens:
            raise ValueError("a sequence has at least one segment, a segment at least one token")
        return self

    @property
    def key(self) -> tuple[str, int, int]:
        return self.origin, self.number, self.start

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class Gradient(Strict):
    """The answer. The body: the gradient of what was sent (none where only the loss was wanted, or at fragment 0), or
    the logits that were asked for."""

    loss: Annotated[float, Field(ge=0, le=1e6)]
    """mean over the microbatch's targets, nats a token; 0 where logits were asked for"""
    path: Annotated[list[Hop], Field(min_length=1, max_length=MAX_HOPS)]
    """from the peer that answers to the one that computed the loss"""
    inside_s: Seconds = 0.0
    """from the moment the request was there until the answer was: what is beyond it was spent on the way"""
    service_s: Seconds = 0.0
    """computing at this peer alone"""
    waited_s: Seconds = 0.0
    """for this peer's processor"""
    queue: Annotated[int, Field(ge=0, le=10**6)] = 0
    """microbatches at this peer that wait for its processor"""
    crowded: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """microbatches that wait for the busiest processor or line of the path: the origin sends fewer at once where there
    are many"""

    def check(self, microbatch: Microbatch, peer_id: str, num_fragments: int) -> None:
        """The path begins with who answers and covers all that was asked for. Raises BadMessage."""
        edges = [(hop.start, hop.end) for hop in self.path]
        joined = all(one[1] == other[0] for one, other in pairwise(edges))
        complete = edges[0][0] == microbatch.start and edges[-1][1] == num_fragments
        if self.path[0].peer_id != peer_id or not joined or not complete or any(a >= b for a, b in edges):
            raise BadMessage("an answer whose path is none")


class Working(Strict):
    """Told to whoever asked, now and then until the answer: "I am at it", and who does the rest, as far as known."""

    origin: PeerIdText
    number: Number
    start: FragmentIndex
    path: Annotated[list[Hop], Field(max_length=MAX_HOPS)] = []


class Verdict(Strict):
    """From a microbatch's origin to each peer of its path: it is done, and what you did of it counts."""

    number: Number
    start: FragmentIndex
    end: FragmentEnd


class Verdicts(Strict):
    verdicts: Annotated[list[Verdict], Field(min_length=1, max_length=256)]


def below(path: Sequence[Hop], fragment: int) -> list[Hop]:
    """The hops of a path from this boundary on; none where no hop begins there."""
    starts = [hop.start for hop in path]
    return list(path[starts.index(fragment):]) if fragment in starts else []
