"""A flat vector that is kept for later in a byte a value: what quantising has lost, until it is said in the next round.

In blocks of 256 with a scale each, as int8 travels (swarm/network/codec.py). What is lost of a loss is at most a 254th
of the largest in its block, and that is at most a quantum or two of what was sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from swarm.network import codec
from swarm.network.codec import BLOCK


@dataclass(frozen=True)
class Packed:
    numel: int
    """a multiple of 256"""
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, values: torch.Tensor) -> Packed:
        """`values`: fp32 [numel]. Raises PeerRefused where one is not finite."""
        return cls(values.numel(), codec.encode(values, 0, 8))

    def read(self) -> torch.Tensor:
        """fp32 [numel]"""
        return codec.decode(self.data, self.numel // BLOCK, 0, 8)
