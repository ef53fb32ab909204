"""What peers say to each other in a round, and the commit that ends it.

A commit certifies itself: the opener signs it, each owner has signed its part's result, and it names the digest of the
version it builds on. Whoever carries it makes no difference (DESIGN 8).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated

from pydantic import Field

from swarm.averaging.plan import MAX_MEMBERS, MAX_PARTS
from swarm.errors import BadMessage
from swarm.network.keys import Keypair, verify
from swarm.network.records import MAX_FRAGMENTS, Contact, Digest, PeerIdText, Strict

Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
MemberIndex = Annotated[int, Field(ge=0, lt=MAX_MEMBERS)]
Block = Annotated[int, Field(ge=0, le=2**40)]


class Part(Strict):
    """A run of blocks and the member that reduces it."""

    start: Block
    end: Block
    owner: MemberIndex


class Opening(Strict):
    """One attempt at a round: who takes part and who reduces what. Made by the opener, the same for all members."""

    fragment: Annotated[int, Field(ge=0, lt=MAX_FRAGMENTS)]
    version: Annotated[int, Field(ge=1, le=2**40)]
    """that the round makes"""
    base: Digest
    """of the version before"""
    members: Annotated[list[PeerIdText], Field(min_length=1, max_length=MAX_MEMBERS)]
    """the opener first"""
    parts: Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    push_s: Annotated[float, Field(gt=0, le=600)]
    """members have this long to deliver"""

    def owner(self, part: Part) -> str:
        return self.members[part.owner]

    @property
    def opener(self) -> str:
        return self.members[0]

    @cached_property
    def id(self) -> str:
        return hashlib.sha256(canonical(self)).hexdigest()

    def check(self, num_blocks: int) -> None:
        """Parts tile the fragment exactly, owners and members are sound; raises BadMessage."""
        edges = [0, *(part.end for part in self.parts)]
        if len(set(self.members)) != len(self.members):
            raise BadMessage("an opening names a member twice")
        starts = [part.start for part in self.parts]
        if starts != edges[:-1] or edges[-1] != num_blocks or any(part.start >= part.end for part in self.parts):
            raise BadMessage("the parts of an opening do not tile the fragment")
        if any(part.owner >= len(self.members) for part in self.parts):
            raise BadMessage("an owner is no member")


class Invitation(Strict):
    """What the opener sends: the opening, and how to reach the other members; not everybody has met everybody."""

    opening: Opening
    contacts: Annotated[list[Contact], Field(max_length=MAX_MEMBERS)] = []


class Contributor(Strict):
    member: MemberIndex
    tokens: Annotated[int, Field(ge=1, le=2**40)]


class PartResult(Strict):
    """An owner's word for its part: hash of the result bytes."""

    hash: Digest
    signature: Signature


class Commit(Strict):
    opening: Opening
    contributors: Annotated[list[Contributor], Field(min_length=1, max_length=MAX_MEMBERS)]
    results: Annotated[list[PartResult], Field(min_length=1, max_length=MAX_PARTS)]
    signature: Signature

    @property
    def tokens(self) -> int:
        return sum(contributor.tokens for contributor in self.contributors)

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(canonical(self)).hexdigest()

    def includes(self, peer_id: str) -> bool:
        return any(self.opening.members[contributor.member] == peer_id for contributor in self.contributors)

    def check(self, num_blocks: int, *, max_claim: int) -> None:
        """Everything but the base: form, bounds and all signatures. Raises BadMessage."""
        opening = self.opening
        opening.check(num_blocks)
        members = [contributor.member for contributor in self.contributors]
        if len(set(members)) != len(members) or max(members) >= len(opening.members):
            raise BadMessage("a commit with a contributor that is no member, or twice")
        if max(contributor.tokens for contributor in self.contributors) > max_claim:
            raise BadMessage("a commit with a contribution of too many tokens", why=f"the limit is {max_claim}")
        if len(self.results) != len(opening.parts):
            raise BadMessage("a commit without a result for each part")
        for index, (result, part) in enumerate(zip(self.results, opening.parts, strict=True)):
            message = result_message(opening.id, index, self.contributors, result.hash)
            if not verify(opening.members[part.owner], message, bytes.fromhex(result.signature)):
                raise BadMessage("a commit with a result that its owner did not sign")
        message = commit_message(opening.id, self.contributors, self.results)
        if not verify(opening.opener, message, bytes.fromhex(self.signature)):
            raise BadMessage("a commit that its opener did not sign")


def canonical(model: Strict) -> bytes:
    return json.dumps(model.model_dump(), sort_keys=True, separators=(",", ":")).encode()


def result_message(opening_id: str, part: int, contributors: Sequence[Contributor], result_hash: str) -> bytes:
    return _signed("result", opening_id, part, [c.model_dump() for c in contributors], result_hash)


def commit_message(opening_id: str, contributors: Sequence[Contributor], results: Sequence[PartResult]) -> bytes:
    return _signed(
        "commit", opening_id, [c.model_dump() for c in contributors], [result.model_dump() for result in results]
    )


def make_commit(
    keypair: Keypair, opening: Opening, contributors: list[Contributor], results: list[PartResult]
) -> Commit:
    signature = keypair.sign(commit_message(opening.id, contributors, results)).hex()
    return Commit(opening=opening, contributors=contributors, results=results, signature=signature)


def _signed(kind: str, *content: object) -> bytes:
    return f"swarm {kind}\0".encode() + json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
