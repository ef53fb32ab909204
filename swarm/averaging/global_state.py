"""A fragment's global state at one version: weights and outer optimizer buffers, the digest that names them, and the
hashed chunks in which a newcomer downloads them.

    digest = SHA-256(fragment | version | tokens | SHA-256 of each chunk of (weights, buffers...) | roll, if any)

Immutable: an outer step makes a new one. Whoever serves an old version to a newcomer simply keeps a reference to it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

from swarm.averaging.roll import Roll, canonical

CHUNK_BYTES = 256 * 1024
HASH_BYTES = 32


@dataclass(frozen=True)
class GlobalState:
    fragment: int
    version: int
    tokens: int
    """trained in all committed rounds of this fragment, of the whole swarm"""
    weights: torch.Tensor = field(repr=False)
    """fp32 [numel], CPU"""
    buffers: tuple[torch.Tensor, ...] = field(repr=False)
    """fp32 [numel] each, CPU"""
    roll: Roll = field(default=(), repr=False)
    """who has contributed of late; empty in `sync` runs, which do not ask"""

    @cached_property
    def chunk_hashes(self) -> bytes:
        return b"".join(hashlib.sha256(self.chunk(index)).digest() for index in range(self.num_chunks))

    @cached_property
    def digest(self) -> str:
        return digest_of(self.fragment, self.version, self.tokens, self.chunk_hashes, self.roll)

    @property
    def num_chunks(self) -> int:
        return num_chunks(self.weights.numel(), len(self.buffers))

    def chunk(self, index: int) -> memoryview:
        """Bytes of one chunk; chunks run through weights, then each buffer, and never cross from one to the next."""
        per_tensor = _chunks_of(self.weights.numel())
        tensor = (self.weights, *self.buffers)[index // per_tensor]
        start = index % per_tensor * CHUNK_BYTES
        return tensor.numpy().data.cast("B")[start:start + CHUNK_BYTES]


class Ranked(Protocol):
    """A state, or a head."""

    @property
    def tokens(self) -> int: ...

    @property
    def digest(self) -> str: ...


def outranks(tokens: int, digest: str, state: Ranked) -> bool:
    """Of two heads that do not lead on from each other, everybody prefers the one with more tokens, then the lower
    digest: two halves of a parted swarm can have trained exactly the same number."""
    return (-tokens, digest) < (-state.tokens, state.digest)


def initial_state(fragment: int, weights: torch.Tensor, num_buffers: int) -> GlobalState:
    return GlobalState(fragment, 0, 0, weights, tuple(torch.zeros_like(weights) for _ in range(num_buffers)))


def digest_of(fragment: int, version: int, tokens: int, chunk_hashes: bytes, roll: Roll = ()) -> str:
    head = b"swarm state\0" + struct.pack("<IQQ", fragment, version, tokens)
    return hashlib.sha256(head + chunk_hashes + (canonical(roll) if roll else b"")).hexdigest()


def num_chunks(numel: int, num_buffers: int) -> int:
    return _chunks_of(numel) * (1 + num_buffers)


def chunk_length(numel: int, index: int) -> int:
    """Bytes of chunk `index` of a state whose tensors have `numel` values."""
    start = index % _chunks_of(numel) * CHUNK_BYTES
    return min(CHUNK_BYTES, numel * 4 - start)


def _chunks_of(numel: int) -> int:
    return -(-numel * 4 // CHUNK_BYTES)
