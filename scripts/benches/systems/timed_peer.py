"""The product's peer that tells how long its inner steps take, for `bench.py overlap`: timed_peer.py FLAGS

Besides the product's own JSON lines it prints, of every inner step:

    {"event": "step", "seconds": S, "rounds": N, "turns": M}

`seconds`: since the step before. `rounds`: of this peer's fragments, how many had contributed and had not applied the
result yet when it began; `turns`: contributions made and results applied during it, which training makes room for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from swarm import peer
from swarm.averaging.ledger import Ledger
from swarm.train import participant


class Steps:
    """Of one peer, as its training thread sees them; ledgers are used between two steps only."""

    def __init__(self, *, clock: Callable[[], float], tell: Callable[[dict[str, Any]], None]) -> None:
        self._clock, self._tell = clock, tell
        self._under_way: set[Ledger] = set()
        self._turns = self._rounds = 0
        self._at: float | None = None

    def contributed(self, ledger: Ledger) -> None:
        self._under_way.add(ledger)
        self._turns += 1

    def applied(self, ledger: Ledger) -> None:
        self._under_way.discard(ledger)
        self._turns += 1

    def stepped(self, loss: float, tokens: int) -> None:
        now = self._clock()
        if self._at is not None:
            self._tell({
                "event": "step", "seconds": round(now - self._at, 5), "rounds": self._rounds, "turns": self._turns,
            })
        self._at, self._turns, self._rounds = now, 0, len(self._under_way)


def install(steps: Steps) -> None:
    """Tell it what happens in this process from now on."""
    contribute, apply = Ledger.contribute, Ledger.apply

    def contributing(ledger: Ledger, *args: Any, **options: Any) -> Any:
        steps.contributed(ledger)
        return contribute(ledger, *args, **options)

    def applying(ledger: Ledger, *args: Any, **options: Any) -> None:
        steps.applied(ledger)
        apply(ledger, *args, **options)

    class Timed(participant.Participant):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.on_step = steps.stepped

    changed: Any = Ledger
    changed.contribute, changed.apply = contributing, applying
    changed = participant
    changed.Participant = Timed


def tell(event: dict[str, Any]) -> None:
    """One write, so that the product's own lines are not torn."""
    os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    install(Steps(clock=time.monotonic, tell=tell))
    sys.exit(peer.main(sys.argv[1:]))
