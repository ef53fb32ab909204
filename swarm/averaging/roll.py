"""Who has contributed to a fragment of late, and how much: the memory that its state carries from commit to commit.

Two decisions of a round need to know who took part in those before, and everybody must come to the same answer, who has
downloaded the newest version a second ago too (I1). So what they need is part of the state and of its digest, follows
from the commits alone, and is bounded.

- A newcomer's inner optimizer knows no moments yet: what it contributes first is noisier than its tokens say. Its
  weight grows with what it has contributed (`warmth`).
- Outer momentum is the direction that a certain swarm has been taking. Where most of it is exchanged at once, that says
  little of where the new one goes, and the momentum starts again (`is_shock`; that restarts widen the range of good
  outer steps: https://arxiv.org/abs/2605.28585). A peer that misses a round or two has not left.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from swarm.averaging import plan
from swarm.config import RunConfig
from swarm.errors import BadMessage
from swarm.network import records
from swarm.network.records import MAX_TOKENS, PeerIdText, Strict

PRESENT_VERSIONS = 3
"""who contributed to none of so many commits has left"""
KEPT_VERSIONS = 16
"""who contributed to none of so many commits is forgotten, and cold again"""
MAX_ENTRIES = 128
"""the most recent ones: twice as many as one commit can have"""
LEAST_WARMTH = 0.1


@dataclass(frozen=True)
class Entry:
    peer_id: str
    version: int
    """the newest one that it contributed to"""
    tokens: int
    """of that contribution"""
    trained: int
    """in all of its contributions since it came"""


Roll = tuple[Entry, ...]
"""by peer id"""


class _Said(Strict):
    """An entry as it travels."""

    peer_id: PeerIdText
    version: Annotated[int, Field(ge=1, le=2**40)]
    tokens: Annotated[int, Field(ge=1, le=2**40)]
    trained: Annotated[int, Field(ge=1, le=MAX_TOKENS)]


def after(roll: Roll, version: int, contributions: Mapping[str, int]) -> Roll:
    """The roll once the commit that makes `version` is applied. `contributions`: peer id -> tokens, none without."""
    entries = {entry.peer_id: entry for entry in roll if entry.version > version - KEPT_VERSIONS}
    for peer_id, tokens in contributions.items():
        known = entries.get(peer_id)
        trained = min(MAX_TOKENS, tokens + (known.trained if known is not None else 0))
        entries[peer_id] = Entry(peer_id, version, tokens, trained)
    newest = sorted(entries.values(), key=lambda entry: (-entry.version, entry.peer_id))[:MAX_ENTRIES]
    return tuple(sorted(newest, key=lambda entry: entry.peer_id))


def present(roll: Roll, version: int) -> dict[str, int]:
    """Who makes up the swarm at this version, with the tokens of each one's last contribution."""
    return {entry.peer_id: entry.tokens for entry in roll if entry.version > version - PRESENT_VERSIONS}


def is_shock(before: Roll, now: Roll, *, version: int, limit: float) -> bool:
    """Is more than `limit` of the weight in the commit that makes `version` of peers that were not there before, or has
    more than that of the swarm before now left? `now`: the roll with that commit. Shares are capped as in the average,
    so that nobody can bring it about by claiming tokens. Never where more have contributed of late than one commit has
    room for: who is not in it has not left."""
    old, new = present(before, version - 1), present(now, version)
    if not old or len(now) > plan.MAX_MEMBERS:
        return False  # the first round of all: there is no momentum yet
    here = plan.weights({entry.peer_id: entry.tokens for entry in now if entry.version == version})
    came = math.fsum(share for peer_id, share in here.items() if peer_id not in old)
    left = math.fsum(share for peer_id, share in plan.weights(old).items() if peer_id not in new)
    return max(came, left) > limit


def warmth(roll: Roll, tokens: Mapping[str, int], run: RunConfig) -> dict[str, float]:
    """For which part of its tokens each contribution counts: by what its peer has contributed before, and half of a
    usual contribution for this one, against `warm_steps` inner steps of the run. `tokens`: peer id -> tokens of the
    contributions to be averaged. Where all are as cold, all weigh alike."""
    warm_tokens = run.averaging.warm_steps * run.train.batch_sequences * run.train.sequence_length
    if not warm_tokens or run.averaging.mode == "sync":
        return {}
    trained = {entry.peer_id: entry.trained for entry in roll}
    usual = statistics.median(tokens.values()) / 2
    return {
        peer_id: min(1.0, max(LEAST_WARMTH, (trained.get(peer_id, 0) + usual) / warm_tokens)) for peer_id in tokens
    }


def to_json(roll: Roll) -> list[dict[str, Any]]:
    return [vars(entry) for entry in roll]


def canonical(roll: Roll) -> bytes:
    """The one spelling of a roll, for the digest."""
    return json.dumps(to_json(roll), sort_keys=True, separators=(",", ":")).encode()


def from_json(document: Any) -> Roll:
    """A roll that somebody says a state has. Raises BadMessage where it cannot be one; whether it is the right one, the
    digest says."""
    if not isinstance(document, list) or len(document) > MAX_ENTRIES:
        raise BadMessage("a list of contributors that is none, or too long", why=f"the limit is {MAX_ENTRIES}")
    said = [records.parse(_Said, item) for item in document]
    names = [entry.peer_id for entry in said]
    if any(one >= other for one, other in zip(names, names[1:], strict=False)):
        raise BadMessage("a list of contributors that is out of order")
    return tuple(Entry(entry.peer_id, entry.version, entry.tokens, entry.trained) for entry in said)
