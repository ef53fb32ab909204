"""How much of its past a peer keeps, and how much it does at a time, for the memory that it has.

The last version of a fragment is what a peer goes back to when a better commit of the same version turns up, and what
newcomers are in the middle of downloading; own contributions are kept for the case that a parted swarm comes together
again; results are what others fetch who missed them. None of it is needed for the arithmetic of a round. A peer without
it downloads a state where another one would go back, and newcomers start again where it moves on. What never gets less
is that a token is in one commit or in the drift.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_OWN = 256


@dataclass(frozen=True)
class Keep:
    name: str = "ample"
    previous: bool = True
    """the last version of each fragment"""
    leases: int = 4
    """older versions of a fragment at a time, for newcomers that are downloading them"""
    own_values: int = 32 * 1024 * 1024
    """own contributions of a fragment, whose values are so many in all ..."""
    own_least: int = 4
    """... and at least this many contributions"""
    results_bytes: int = 512 * 1024 * 1024
    """of recent rounds, of all fragments together"""
    rounds: int = 8
    """of different fragments at a time: each takes seven times a fragment's weights for a while"""

    def own(self, numel: int) -> int:
        """Contributions kept of a fragment of so many values."""
        return min(MAX_OWN, max(self.own_least, self.own_values // max(1, numel)))


AMPLE = Keep()
SOME = Keep(
    leases=1, own_values=4 * 1024 * 1024, own_least=1, results_bytes=128 * 1024 * 1024, rounds=2, name="some"
)
LITTLE = Keep(
    previous=False, leases=0, own_values=1024 * 1024, own_least=1, results_bytes=16 * 1024 * 1024,
    rounds=1, name="little",
)
LEVELS = (AMPLE, SOME, LITTLE)
"""from much memory to little"""
