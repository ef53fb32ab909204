"""A peer's identity: an Ed25519 key. The peer id contains the public key, so whatever a peer signs certifies itself.

libp2p peer id spec: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md (identity multihash, key type 1).
"""

from __future__ import annotations

import functools
import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hivemind.p2p import PeerID

_ID_PREFIX = bytes.fromhex("002408011220")
"""multihash(identity, 36 bytes) of protobuf {key_type: Ed25519, data: 32 bytes}"""
MAX_PEER_ID_CHARACTERS = 80


class Keypair:
    """Signs for one peer. `seed`: 32 secret bytes."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self._public_bytes = self._private.public_key().public_bytes_raw()
        self.peer_id: str = PeerID(_ID_PREFIX + self._public_bytes).to_base58()

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)

    def libp2p_bytes(self) -> bytes:
        """The key as libp2p's daemon reads it: protobuf {key_type: Ed25519, data: seed + public key}."""
        return bytes.fromhex("08011240") + self._seed + self._public_bytes


def verify(peer_id: str, message: bytes, signature: bytes) -> bool:
    """True where `peer_id`'s key signed `message`. Never raises on bytes from strangers."""
    try:
        key = _public_key(peer_id)
        if key is None:
            return False
        key.verify(signature, message)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


@functools.lru_cache(maxsize=1024)
def _public_key(peer_id: str) -> Ed25519PublicKey | None:
    """The key that a peer id is; None where it is none. base58 takes longer to read than the signature to verify."""
    if len(peer_id) > MAX_PEER_ID_CHARACTERS:  # base58 takes quadratic time
        return None
    raw = PeerID.from_base58(peer_id).to_bytes()
    if len(raw) != 38 or not raw.startswith(_ID_PREFIX) or PeerID(raw).to_base58() != peer_id:
        return None
    return Ed25519PublicKey.from_public_bytes(raw[len(_ID_PREFIX):])


_ADJECTIVES = (
    "amber", "bold", "brisk", "calm", "clever", "coral", "dusty", "early", "fair", "gentle", "green", "hazel", "ivory",
    "jolly", "keen", "lively", "mellow", "misty", "noble", "olive", "proud", "quick", "quiet", "ruby", "sandy",
    "silver", "sunny", "swift", "tidy", "vivid", "warm", "wise",
)
_ANIMALS = (
    "badger", "bear", "bison", "crane", "crow", "deer", "dove", "eagle", "elk", "falcon", "ferret", "finch", "fox",
    "gecko", "hare", "hawk", "heron", "ibex", "jay", "kestrel", "lark", "lemur", "lynx", "marten", "moose", "otter",
    "owl", "panda", "puffin", "raven", "robin", "wren",
)


def friendly_name(peer_id: str) -> str:
    """Two words for a person, made from the peer id. Not unique; the peer id is."""
    digest = hashlib.sha256(peer_id.encode()).digest()
    return f"{_ADJECTIVES[digest[0] % 32]}-{_ANIMALS[digest[1] % 32]}"
