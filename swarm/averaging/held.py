"""All that a peer keeps for one fragment that it holds. Which ones it holds may change while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import torch

from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.download import Donor
from swarm.averaging.global_state import GlobalState
from swarm.averaging.layout import Layout
from swarm.averaging.ledger import Drift, Gradients, Ledger
from swarm.averaging.progress import Progress
from swarm.averaging.round import FragmentRounds


class HeldFragment:
    """Books, rounds, and what others have trained. `parameters`: the working weights."""

    def __init__(
        self, context: Context, index: int, layout: Layout, state: GlobalState,
        parameters: Mapping[str, torch.nn.Parameter],
    ) -> None:
        sync = context.run.averaging.mode == "sync"
        kind = Gradients if sync else Drift
        self.work = kind(layout, parameters, lambda: context.before_write(index))
        self.index = index
        self.ledger = Ledger(state, self.work, context.keep)
        self.applier = Applier(context, fragment=index, layout=layout, ledger=self.ledger)
        self.rounds = FragmentRounds(context, self.applier)
        self.progress = Progress()
        self.donor = Donor(
            self.served_states, asyncio.get_running_loop().time, max_leases=context.keep.leases
        )
        self.opened_at = asyncio.get_running_loop().time()
        self.due_since: float | None = None
        self.recent_s: list[float] = []
        self.retry_at = 0.0
        self.distrusted_until: dict[str, float] = {}
        self.alone = False
        """the newest commit is of this peer's tokens only"""
        self.following = self.opening = self.downloading = False
        self.ready = True
        """False: it was added and is still being downloaded, or was removed; nothing of it is served or averaged"""
        self.leaving = False
        """it is about to be removed: what was learnt goes into a round soon"""

    def trained(self, tokens: int, gradients: Mapping[str, torch.Tensor] | None) -> None:
        """From the training thread, between two boundaries. `gradients`: `sync` runs only."""
        if isinstance(self.work, Gradients):
            assert gradients is not None, "a sync run averages gradients"
            self.work.add(gradients, tokens)
        self.ledger.trained(tokens)

    def served_states(self) -> list[GlobalState]:
        previous = self.ledger.previous
        return [self.ledger.state, *([previous] if previous else [])]
