"""All fragments of one peer: decides when to open a round, and ties the parts of averaging together.

One instance a peer, on the network's event loop, beside the training thread. It is the only thing that the training
loop knows of averaging: `trained()` after each inner step, `pending()`, `heads()`, `settle()`.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import Mapping

import torch

from swarm.averaging import plan
from swarm.averaging.answers import Answers
from swarm.averaging.context import Context
from swarm.averaging.follow import Follower
from swarm.averaging.global_state import GlobalState
from swarm.averaging.held import HeldFragment
from swarm.averaging.layout import Layout
from swarm.averaging.ledger import Gradients
from swarm.averaging.messages import MAX_MEMBERS, Commit
from swarm.averaging.synchronise import Synchroniser
from swarm.errors import NetworkError, StateError
from swarm.network.records import Head, Status

TICK_S = 0.2
MIN_PATIENCE_S = 3.0
RETRY_S = 0.5
"""between two openings that came to nothing"""

log = logging.getLogger(__name__)


class Averager:
    def __init__(
        self, context: Context, layouts: list[Layout], states: list[GlobalState],
        parameters: Mapping[str, torch.nn.Parameter],
    ) -> None:
        self.context = context
        self._sync_mode = context.run.averaging.mode == "sync"
        self._fragments = [
            HeldFragment(context, index, layout, state, parameters)
            for index, (layout, state) in enumerate(zip(layouts, states, strict=True))
        ]
        self._tick_task: asyncio.Task[None] | None = None
        self.tokens_per_s = 0.0
        self.leaving = False
        self.serving = False
        """only once this peer's own state is that of the swarm does it take part in rounds"""
        self.settled = asyncio.Condition()
        self.synchroniser = Synchroniser(context, [f.applier for f in self._fragments])
        for fragment in self._fragments:
            fragment.applier.on_applied += [fragment.rounds.settled, self._on_applied]
        self._follower = Follower(context, self.synchroniser)
        Answers(context, self._fragments, lambda: self.serving).register()

    def start(self) -> None:
        """Begin to open rounds and to take part in others'."""
        now = asyncio.get_running_loop().time()
        for fragment in self._fragments:
            fragment.opened_at = now
        self.serving = True
        self.context.directory.on_status = self._on_status
        for peer_id, status in self.context.directory.alive().items():
            self._on_status(peer_id, status)
        self._tick_task = asyncio.create_task(self._tick_forever())

    def trust(self, trusted: list[bool]) -> None:
        """For each fragment: is this peer's start the run's? What is not must be downloaded before it takes part."""
        for fragment, ok in zip(self._fragments, trusted, strict=True):
            fragment.applier.trusted = ok

    async def stop(self) -> None:
        tasks = [task for task in [self._tick_task, *self.context.tasks] if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what training sees -----------------------------------------------------------------------------------------

    def trained(self, tokens: int, gradients: Mapping[str, torch.Tensor] | None = None) -> None:
        """An inner step is done. From the training thread, between two boundaries. `gradients`: `sync` runs only."""
        for fragment in self._fragments:
            if isinstance(fragment.work, Gradients):
                assert gradients is not None, "a sync run averages gradients"
                fragment.work.add(gradients, tokens)
            fragment.ledger.trained(tokens)

    def states(self) -> list[GlobalState]:
        return [fragment.ledger.state for fragment in self._fragments]

    def heads(self) -> list[Head]:
        if not self.serving:
            return []
        return [Head(version=s.version, digest=s.digest, tokens=s.tokens) for s in self.states()]

    def pending(self) -> list[int]:
        return [fragment.ledger.pending_tokens for fragment in self._fragments] if self.serving else []

    def swarm_tokens(self) -> int:
        """in committed rounds, of the fragment that has fewest"""
        return min(state.tokens for state in self.states())

    def estimated_tokens(self) -> int:
        """Committed and not yet committed tokens of the whole swarm, for the learning-rate schedule."""
        return self.swarm_tokens() + max(self.pending(), default=0)

    async def settle(self, *, deadline_s: float) -> bool:
        """Wait until everything that this peer trained is in commits. False: the deadline passed first."""
        async def nothing_pending() -> None:
            async with self.settled:
                await self.settled.wait_for(lambda: not any(self.pending()))

        try:
            await asyncio.wait_for(nothing_pending(), deadline_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def announce(self) -> None:
        """Tell the next openers now that there is something to average (`sync` runs, and peers that leave)."""
        openers, everybody = set(), self.context.directory.alive()
        for index, fragment in enumerate(self._fragments):
            peers, _ = self._holders(index, everybody)
            leaders = self._leaders(peers, everybody)
            openers.add(plan.rank(leaders, fragment=index, version=fragment.ledger.state.version + 1)[0])
        await asyncio.gather(*(self.context.directory.tell(peer_id) for peer_id in openers - {self._me}))

    # -- when to open -----------------------------------------------------------------------------------------------

    @property
    def _me(self) -> str:
        return self.context.keypair.peer_id

    def _holders(self, index: int, everybody: Mapping[str, Status]) -> tuple[list[str], list[str]]:
        """Live peers that hold a fragment: (at this peer's version, at another one). Who leaves counts while it has
        drift to give. All are invited: those behind catch up at that moment (where rounds are quicker than heartbeats,
        a newcomer would otherwise run after them for ever), and those ahead stop a round that would fork history."""
        fragment, now = self._fragments[index], asyncio.get_running_loop().time()
        alive = [
            peer_id for peer_id, status in everybody.items()
            if status.heads and not (status.leaving and not status.pending[index:index + 1] > [0])
        ]
        level = fragment.progress.at(fragment.ledger.state.digest, alive)
        others = [p for p in alive if p not in level and fragment.distrusted_until.get(p, 0.0) < now]
        return level, others

    def _leaders(self, holders: list[str], everybody: Mapping[str, Status]) -> list[str]:
        """Who of this peer and the holders may open rounds and own parts."""
        directory = self.context.directory
        reaches = {self._me: directory.reach} | {peer_id: everybody[peer_id].reach for peer_id in holders}
        return plan.leaders(reaches, others_outbound=directory.heard_of_outbound())

    async def _tick_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            everybody = self.context.directory.alive()
            for index in range(len(self._fragments)):
                try:
                    self._maybe_open(index, everybody, loop.time())
                except Exception:  # a bug of ours in one round must not end all rounds
                    log.exception("fragment %d: cannot tell whether to open a round", index)
            await asyncio.sleep(TICK_S / 20 if self._sync_mode else TICK_S)

    def _maybe_open(self, index: int, everybody: Mapping[str, Status], now: float) -> None:
        fragment = self._fragments[index]
        busy = fragment.opening or fragment.downloading or fragment.rounds.member.in_round()
        if busy or self.context.directory.unsure():
            return
        holders, others = self._holders(index, everybody)
        if not self._is_due(index, holders, now):
            fragment.due_since = None
            return
        if fragment.due_since is None:
            fragment.due_since = now
        leaders = self._leaders(holders, everybody)
        if self._me not in leaders:
            return
        order = plan.rank(leaders, fragment=index, version=fragment.ledger.state.version + 1)
        patience_s = max(MIN_PATIENCE_S, 3 * statistics.median(fragment.recent_s or [1.0]))
        if now - fragment.due_since >= order.index(self._me) * patience_s and now >= fragment.retry_at:
            fragment.opening = True
            owners = [p for p in leaders if p == self._me or self.context.directory.maddrs(p)]
            self.context.spawn(self._open(fragment, [*holders, *others], owners))

    def _is_due(self, index: int, holders: list[str], now: float) -> bool:
        fragment, averaging = self._fragments[index], self.context.run.averaging
        mine = fragment.ledger.pending_tokens
        others = fragment.progress.pending(holders, now=now)
        total = mine + sum(others.values())
        if total <= 0:
            return False
        if self._sync_mode and mine > 0 and all(tokens > 0 for tokens in others.values()):
            return True
        target = plan.target_tokens(
            averaging.tokens_per_round, len(self._fragments), fragment=index,
            version=fragment.ledger.state.version, staggered=not self._sync_mode,
        )
        overdue = now - fragment.opened_at >= averaging.max_round_s
        someone_leaves = (self.leaving and mine > 0) or fragment.progress.leaving(holders)
        return total >= target or overdue or someone_leaves

    async def _open(self, fragment: HeldFragment, members: list[str], owners: list[str]) -> None:
        began = asyncio.get_running_loop().time()
        commit = None
        try:
            invited = members[:MAX_MEMBERS - 1]
            commit = await fragment.rounds.opener.open(invited, [p for p in owners if p == self._me or p in invited])
        except (NetworkError, StateError) as error:
            log.warning("round of fragment %d: %s", fragment.applier.fragment, error)
        finally:
            fragment.opening = False
            now = asyncio.get_running_loop().time()
            if commit is None:
                fragment.retry_at = now + RETRY_S
            else:
                fragment.recent_s = [*fragment.recent_s[-15:], now - began]
        elsewhere, fragment.rounds.opener.elsewhere = fragment.rounds.opener.elsewhere, []
        for peer_id in elsewhere:
            await self._follower.see_what_it_has(fragment, peer_id)

    def _on_applied(self, commit: Commit) -> None:
        fragment, now = self._fragments[commit.opening.fragment], asyncio.get_running_loop().time()
        fragment.opened_at, fragment.due_since = now, None
        fragment.progress.committed(commit, fragment.ledger.state.digest, now=now)
        self.context.spawn(self._notify_settled())

    async def _notify_settled(self) -> None:
        async with self.settled:
            self.settled.notify_all()

    def _on_status(self, peer_id: str, status: Status) -> None:
        if len(status.heads) != len(self._fragments) or len(status.pending) != len(self._fragments):
            return
        now = asyncio.get_running_loop().time()
        for fragment, head, pending in zip(self._fragments, status.heads, status.pending, strict=True):
            fragment.progress.heard(
                peer_id, version=head.version, digest=head.digest, pending=pending,
                tokens_per_s=0.0 if self._sync_mode else status.tokens_per_s, leaving=status.leaving, now=now,
            )
            self._follower.heard(fragment, peer_id, head)
