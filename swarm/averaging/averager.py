"""All fragments that one peer holds: ties the parts of averaging together.

One instance a peer, on the network's event loop, beside the training thread. It is the only thing that the training
loop knows of averaging: `trained()` after each inner step, `pending()`, `heads()`, `settle()`. A peer may hold all
fragments of the run or some; which ones may change while it runs: `add()`, `remove()`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

import torch

from swarm.averaging.answers import Answers
from swarm.averaging.context import Context
from swarm.averaging.elsewhere import Elsewhere
from swarm.averaging.follow import Follower
from swarm.averaging.global_state import GlobalState
from swarm.averaging.held import HeldFragment
from swarm.averaging.layout import Layout
from swarm.averaging.messages import Commit
from swarm.averaging.spare_copies import SpareCopies, Store
from swarm.averaging.spares import Spares
from swarm.averaging.synchronise import Synchroniser
from swarm.averaging.turns import TICK_S, Turns
from swarm.network.records import Head, Status

LOOK_S = 1.0
"""how often to see how far the others are with the fragments that this peer does not hold"""


class Averager:
    def __init__(
        self, context: Context, layouts: Mapping[int, Layout], states: Mapping[int, GlobalState],
        parameters: Mapping[str, torch.nn.Parameter],
    ) -> None:
        """`layouts`, `states`: of the fragments held, by their index in the run; `parameters`: their working weights,
        by the names in the layouts."""
        self.context = context
        self.tokens_per_s = 0.0
        self.leaving = False
        self.serving = False
        """only once this peer's own state is that of the swarm does it take part in rounds"""
        self.settled = asyncio.Condition()
        self._fragments: dict[int, HeldFragment] = {}
        self._elsewhere = Elsewhere(context.run.fragments)
        self._looked_at = float("-inf")
        self._tick_task: asyncio.Task[None] | None = None
        self.synchroniser = Synchroniser(context, lambda: [f.applier for f in self._fragments.values()])
        follower = self._follower = Follower(context, self.synchroniser)
        self._turns = Turns(context, self._fragments, follower, is_leaving=lambda: self.leaving)
        self._answers = Answers(context, self._fragments, lambda: self.serving)
        self.spares: SpareCopies | None = None
        self._spares: Spares | None = None
        for index in sorted(layouts):
            self._hold(HeldFragment(context, index, layouts[index], states[index], parameters))
        self._answers.register()
        context.in_rounds = lambda: [
            f.index for f in list(self._fragments.values()) if f.opening or f.rounds.member.in_round()
        ]

    def keep_spares(self, store: Store, layouts: Mapping[int, Layout]) -> None:
        """Keep copies of fragments that this peer does not hold, before anything else. `layouts`: of all of the run."""
        self._spares = Spares(self.context, store, layouts, self.synchroniser, lambda: list(self._fragments))
        self.spares = self._answers.spares = self._spares.copies
        self.synchroniser.own_copy = self.spares.load

    def start(self) -> None:
        """Begin to open rounds and to take part in others'."""
        self.serving = True
        self.context.directory.on_status = self._on_status
        for fragment in self._fragments.values():
            self._turns.begin(fragment)
        self._look()
        self._tick_task = asyncio.create_task(self._turns.tick_forever())
        if self._spares is not None:
            self.context.spawn(self._spares.look_forever())

    def trust(self, trusted: Mapping[int, bool]) -> None:
        """For each fragment: is this peer's start the run's? What is not must be downloaded before it takes part."""
        for index, ok in trusted.items():
            self._fragments[index].applier.trusted = ok

    async def stop(self) -> None:
        tasks = [task for task in [self._tick_task, *self.context.tasks] if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what training sees -----------------------------------------------------------------------------------------

    def trained(self, tokens: int, gradients: Mapping[str, torch.Tensor] | None = None) -> None:
        """An inner step of all fragments is done. From the training thread, between two boundaries. `gradients`: `sync`
        runs only."""
        for fragment in self._ready():
            fragment.trained(tokens, gradients)

    def trained_fragment(self, index: int, tokens: int, gradients: Mapping[str, torch.Tensor] | None = None) -> None:
        """The same of one fragment: those of a stage take their inner steps after quotas of their own. What comes after
        its removal counts for nothing."""
        fragment = self._fragments.get(index)
        if fragment is not None and fragment.ready:
            fragment.trained(tokens, gradients)

    def states(self) -> list[GlobalState]:
        """Of the fragments held, in their order in the run."""
        return [fragment.ledger.state for fragment in self._ready()]

    def heads(self) -> list[Head | None]:
        """One a fragment of the run, None where it is not held; empty while this peer holds none, or is joining."""
        held = {s.fragment: Head(version=s.version, digest=s.digest, tokens=s.tokens) for s in self.states()}
        return [held.get(index) for index in range(self.context.run.fragments)] if self.serving and held else []

    def pending(self) -> list[int]:
        """Tokens in no commit yet, one number a fragment of the run; empty where `heads` is."""
        held = {fragment.index: fragment.ledger.pending_tokens for fragment in self._ready()}
        return [held.get(index, 0) for index in range(self.context.run.fragments)] if self.serving and held else []

    def swarm_tokens(self) -> int:
        """In committed rounds, of the fragment that has fewest; of those held elsewhere, as their holders say."""
        return self._elsewhere.swarm_tokens({state.fragment: state.tokens for state in self.states()})

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
        openers = self._turns.first_openers() - {self.context.keypair.peer_id}
        await asyncio.gather(*(self.context.directory.tell(peer_id) for peer_id in openers))

    # -- which fragments --------------------------------------------------------------------------------------------

    def held(self) -> list[int]:
        """Fragments that this peer serves and averages, in their order in the run."""
        return [fragment.index for fragment in self._ready()]

    async def add(
        self, index: int, layout: Layout, state: GlobalState, parameters: Mapping[str, torch.nn.Parameter], *,
        trusted: bool = False,
    ) -> bool:
        """Hold one more fragment: download it first, then serve it and take part in its rounds. `parameters`: its
        working weights, which are at `state` now. `trusted`: that state is the run's start or a copy of the swarm's, so
        it will do where nobody has more.

        Returns whether it was downloaded. Raises StateError where nobody can give it; then it is not held.
        """
        assert index not in self._fragments, f"fragment {index} is held already"
        fragment = HeldFragment(self.context, index, layout, state, parameters)
        fragment.ready, fragment.applier.trusted = False, trusted
        self._hold(fragment)
        self._answers.register()
        try:
            downloaded = await self.synchroniser.bring_level(fragment.applier)
        except BaseException:
            del self._fragments[index]
            raise
        fragment.ready = True
        self._turns.begin(fragment)
        self._tell_all()
        return downloaded

    async def remove(self, index: int, *, deadline_s: float) -> int:
        """Let go of a fragment that is not trained any more, once all that was learnt is in commits which another
        holder, if there is one, has too. After `deadline_s` what is left is given up; returns those tokens.
        """
        fragment = self._fragments[index]
        fragment.leaving = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + deadline_s
        while not self._may_go(fragment) and loop.time() < deadline:
            await asyncio.sleep(TICK_S)
        fragment.ready = False
        del self._fragments[index]
        if self.spares is not None and not self._heads_elsewhere(index):  # so that it is not lost with us
            await self.spares.write(fragment.ledger.state, fragment.applier.history)
        self._elsewhere.let_go(index, fragment.ledger.state.tokens)
        self._look()
        self._tell_all()
        return fragment.ledger.pending_tokens

    def _may_go(self, fragment: HeldFragment) -> bool:
        if fragment.ledger.pending_tokens or fragment.opening or fragment.rounds.member.in_round():
            return False
        others = self._heads_elsewhere(fragment.index)
        return not others or any(head.tokens >= fragment.ledger.state.tokens for head in others)

    def _heads_elsewhere(self, index: int) -> list[Head]:
        statuses = self.context.directory.alive().values()
        return [head for status in statuses if (head := status.head(index)) is not None]

    def _hold(self, fragment: HeldFragment) -> None:
        self._fragments[fragment.index] = fragment
        fragment.applier.on_applied += [fragment.rounds.settled, partial(self._on_applied, fragment)]

    def _ready(self) -> list[HeldFragment]:
        """A copy: the training thread reads it while the network's thread adds and removes."""
        return sorted((f for f in list(self._fragments.values()) if f.ready), key=lambda f: f.index)

    def _tell_all(self) -> None:
        """Others should know at once who holds what: they would invite this peer, or do without it."""
        directory = self.context.directory
        for peer_id in directory.alive():
            self.context.spawn(directory.tell(peer_id))

    # -- what happens -----------------------------------------------------------------------------------------------

    def _on_applied(self, fragment: HeldFragment, commit: Commit) -> None:
        self._turns.applied(fragment, commit)
        self.context.spawn(self._notify_settled())

    async def _notify_settled(self) -> None:
        async with self.settled:
            self.settled.notify_all()

    def _on_status(self, peer_id: str, status: Status) -> None:
        self._turns.heard(peer_id, status)
        if asyncio.get_running_loop().time() - self._looked_at >= LOOK_S:
            self._look()

    def _look(self) -> None:
        if len(self._fragments) < self.context.run.fragments:
            self._looked_at = asyncio.get_running_loop().time()
            self._elsewhere.heard(self.context.directory.alive().values())
