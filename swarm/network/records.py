"""What travels as signed values: a peer's status (told directly every 1.5 s and kept in the DHT) and run configs.

Schemas are strict and bounded: whatever does not fit is dropped, never repaired. A signature proves a key, not good
will, so nothing here is believed beyond "this peer says so"; heads and run configs are checked by hash (I4).
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from swarm.errors import BadMessage
from swarm.network import frames
from swarm.network.keys import Keypair, verify

MAX_RECORD_BYTES = 9_500
"""records over 10 kB break the DHT (DESIGN 9)"""
MAX_TTL_S = 600.0
MAX_FRAGMENTS = 256
MAX_SPARES = 128
"""of one peer: its status must fit into what is told directly"""
MAX_TOKENS = 10**15

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Maddr = Annotated[str, Field(max_length=200, pattern=r"^/[ -~]+$")]
PeerIdText = Annotated[str, Field(min_length=20, max_length=80, pattern=r"^[1-9A-HJ-NP-Za-km-z]+$")]
Reach = Annotated[str, Field(pattern=r"^(public|punched|outbound|)$")]
RunId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}-[0-9a-f]{12}$")]
TokenCount = Annotated[int, Field(ge=0, le=MAX_TOKENS)]


class Strict(BaseModel):
    """A message from a stranger: no unknown keys, no coercion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


Span = Annotated[list[Annotated[int, Field(ge=0, le=MAX_FRAGMENTS)]], Field(min_length=2, max_length=2)]
"""fragments [first, one past the last)"""


class Move(Strict):
    """Where a peer would like to go; pipeline/placement.py says who may."""

    stage: Span
    gain: Annotated[float, Field(ge=0, le=1e9)]
    heals: bool = False


class Head(Strict):
    """A fragment's newest committed version at one peer."""

    version: Annotated[int, Field(ge=0, le=2**40)]
    digest: Digest
    tokens: TokenCount
    """trained in all committed rounds of this fragment"""


class Spare(Strict):
    """A copy, on a peer's disk, of a fragment that it does not hold."""

    fragment: Annotated[int, Field(ge=0, lt=MAX_FRAGMENTS)]
    head: Head


class Status(Strict):
    """What one peer says of itself."""

    run_id: RunId
    name: Annotated[str, Field(max_length=40)]
    role: Annotated[str, Field(pattern=r"^(trainer|rendezvous|observer)$")]
    maddrs: Annotated[list[Maddr], Field(max_length=8)] = []
    reach: Reach = ""
    """whether others can dial it: see reachability.py; empty: not known"""
    heads: Annotated[list[Head | None], Field(max_length=MAX_FRAGMENTS)] = []
    """of each fragment of the run, None for those that it does not hold; empty: holds none (yet)"""
    pending: Annotated[list[TokenCount], Field(max_length=MAX_FRAGMENTS)] = []
    """tokens in its drift, by fragment; 0 for those that it does not hold"""
    spares: Annotated[list[Spare], Field(max_length=MAX_SPARES)] = []
    spare_room_bytes: Annotated[int, Field(ge=0, le=2**50)] = 0
    """of its disk, for all its spares together; 0: it keeps none"""
    tokens: TokenCount = 0
    tokens_per_s: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    serving: Span | None = None
    """what microbatches can use now; None: nothing"""
    target: Span | None = None
    """what it is loading fragments for; None: it has what it serves"""
    speed: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    """fragments times tokens a second that it could do, measured; 0: not known yet"""
    claim: Move | None = None
    loss: Annotated[float, Field(ge=0, le=1e6)] | None = None
    leaving: bool = False

    def head(self, fragment: int) -> Head | None:
        """None: it does not hold that fragment."""
        return self.heads[fragment] if fragment < len(self.heads) else None

    def spare(self, fragment: int) -> Head | None:
        """Of the copy of that fragment on its disk; None: it has none."""
        return next((spare.head for spare in self.spares if spare.fragment == fragment), None)

    def held(self) -> dict[int, Head]:
        """Fragments that it holds -> their heads."""
        return {index: head for index, head in enumerate(self.heads) if head is not None}


class Contact(Strict):
    """Another peer's addresses, passed on."""

    peer_id: PeerIdText
    maddrs: Annotated[list[Maddr], Field(max_length=8)]
    reach: Reach = ""


Model = TypeVar("Model", bound=Strict)


def parse(model: type[Model], document: Any) -> Model:
    """A message from plain data; raises BadMessage naming the first thing that is wrong with it."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadMessage(f"a malformed {model.__name__}", why=f"{where}: {first['msg']}") from None


def seal(keypair: Keypair, key: bytes, payload: str, *, expires: float) -> bytes:
    """Signed value for the DHT. Bound to its key and its expiry, so it cannot be replayed elsewhere or kept alive."""
    signature = keypair.sign(_signed_bytes(key, payload, expires))
    value = json.dumps({"payload": payload, "sig": signature.hex()}).encode()
    if len(value) > MAX_RECORD_BYTES:
        raise ValueError(f"a record of {len(value)} bytes, the limit is {MAX_RECORD_BYTES}")
    return value


def unseal(peer_id: str, key: bytes, value: bytes, *, expires: float, now: float) -> str | None:
    """The payload; None where it is too long, not signed by `peer_id`, or its expiry is past, far or not a number."""
    if not isinstance(expires, float) or not math.isfinite(expires) or not now < expires < now + MAX_TTL_S + 60:
        return None
    if len(value) > MAX_RECORD_BYTES:
        return None
    try:
        document = frames.parse_head(value)
        payload, signature = document["payload"], bytes.fromhex(document["sig"])
        signed = _signed_bytes(key, payload, expires)
    except (BadMessage, ValueError, KeyError, TypeError, AttributeError):
        return None
    return payload if verify(peer_id, signed, signature) else None


def _signed_bytes(key: bytes, payload: str, expires: float) -> bytes:
    return b"swarm record\0" + key + expires.hex().encode() + b"\0" + payload.encode()
