"""All fragments of one peer: decides when to open a round, answers the other peers, follows whoever is ahead.

One instance a peer, on the network's event loop, beside the training thread. It is the only thing that the training
loop knows of averaging: `trained()` after each inner step, `pending()`, `heads()`, `finish()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from swarm.averaging import plan
from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.download import Donor
from swarm.averaging.global_state import GlobalState, outranks
from swarm.averaging.layout import Layout
from swarm.averaging.ledger import Drift, Gradients, Ledger
from swarm.averaging.messages import MAX_MEMBERS, Commit, Opening
from swarm.averaging.progress import Progress
from swarm.averaging.round import FragmentRounds
from swarm.averaging.synchronise import Synchroniser
from swarm.errors import BadMessage, NetworkError, PeerRefused, StateError
from swarm.network import records
from swarm.network.link import Answer, Link
from swarm.network.records import Head, Status

TICK_S = 0.2
MIN_PATIENCE_S = 3.0
CATCH_UP_S = 5.0
"""an invited peer that is behind may take this long to come level; the round waits for it no longer"""
DISTRUST_S = 5.0
"""a peer that claims another version, but gives nothing that leads there, is not invited for this long"""
RETRY_S = 0.5
"""between two openings that came to nothing"""
FOLLOW_AFTER_S = 0.5
"""a commit usually arrives by itself within this time"""

log = logging.getLogger(__name__)


class _Fragment:
    """One fragment's parts: books, rounds, what others have trained."""

    def __init__(self, context: Context, index: int, layout: Layout, state: GlobalState,
                 parameters: Mapping[str, torch.nn.Parameter]) -> None:
        sync = context.run.averaging.mode == "sync"
        self.work = Gradients(layout, parameters) if sync else Drift(layout, parameters)
        self.ledger = Ledger(state, self.work)
        self.applier = Applier(context, fragment=index, layout=layout, ledger=self.ledger)
        self.rounds = FragmentRounds(context, self.applier)
        self.progress = Progress()
        self.donor = Donor(self.served_states, asyncio.get_running_loop().time)
        self.opened_at = asyncio.get_running_loop().time()
        self.due_since: float | None = None
        self.recent_s: list[float] = []
        self.retry_at = 0.0
        self.distrusted_until: dict[str, float] = {}
        self.following = self.opening = self.downloading = False

    def served_states(self) -> list[GlobalState]:
        previous = self.ledger.previous
        return [self.ledger.state, *([previous] if previous else [])]


class Averager:
    def __init__(
        self, context: Context, layouts: list[Layout], states: list[GlobalState],
        parameters: Mapping[str, torch.nn.Parameter],
    ) -> None:
        self.context = context
        self._sync_mode = context.run.averaging.mode == "sync"
        self._fragments = [
            _Fragment(context, index, layout, state, parameters)
            for index, (layout, state) in enumerate(zip(layouts, states, strict=True))
        ]
        self._parameters = parameters
        self._tick_task: asyncio.Task[None] | None = None
        self._introducing: asyncio.Task[None] | None = None
        self.tokens_per_s = 0.0
        self.leaving = False
        self.serving = False
        """only once this peer's own state is that of the swarm does it take part in rounds"""
        self.settled = asyncio.Condition()
        self.synchroniser = Synchroniser(context, [f.applier for f in self._fragments])
        for fragment in self._fragments:
            fragment.applier.on_applied += [fragment.rounds.settled, self._on_applied]
        self._register()

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
        if fragment.opening or fragment.downloading or fragment.rounds.in_round() or self.context.directory.unsure():
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

    async def _open(self, fragment: _Fragment, members: list[str], owners: list[str]) -> None:
        began = asyncio.get_running_loop().time()
        commit = None
        try:
            invited = members[:MAX_MEMBERS - 1]
            commit = await fragment.rounds.open(invited, [p for p in owners if p == self._me or p in invited])
        except (NetworkError, StateError) as error:
            log.warning("round of fragment %d: %s", fragment.applier.fragment, error)
        finally:
            fragment.opening = False
            now = asyncio.get_running_loop().time()
            if commit is None:
                fragment.retry_at = now + RETRY_S
            else:
                fragment.recent_s = [*fragment.recent_s[-15:], now - began]
        elsewhere, fragment.rounds.elsewhere = fragment.rounds.elsewhere, []
        for peer_id in elsewhere:
            await self._see_what_it_has(fragment, peer_id)

    async def _see_what_it_has(self, fragment: _Fragment, peer_id: str) -> None:
        """A peer said that it is at another version than the round's base: follow it, or do without it for a while."""
        state = fragment.ledger.state
        try:
            moved = await fragment.applier.catch_up(peer_id) or await self._jump(fragment, peer_id)
        except (NetworkError, StateError):
            moved = False
        if not moved and fragment.ledger.state is state:
            fragment.distrusted_until[peer_id] = asyncio.get_running_loop().time() + DISTRUST_S

    def _on_applied(self, commit: Commit) -> None:
        fragment, now = self._fragments[commit.opening.fragment], asyncio.get_running_loop().time()
        fragment.opened_at, fragment.due_since = now, None
        fragment.progress.committed(commit, fragment.ledger.state.digest, now=now)
        self.context.spawn(self._notify_settled())

    async def _notify_settled(self) -> None:
        async with self.settled:
            self.settled.notify_all()

    # -- following the others ---------------------------------------------------------------------------------------

    def _on_status(self, peer_id: str, status: Status) -> None:
        if len(status.heads) != len(self._fragments) or len(status.pending) != len(self._fragments):
            return
        now = asyncio.get_running_loop().time()
        for fragment, head, pending in zip(self._fragments, status.heads, status.pending, strict=True):
            fragment.progress.heard(
                peer_id, version=head.version, digest=head.digest, pending=pending,
                tokens_per_s=0.0 if self._sync_mode else status.tokens_per_s, leaving=status.leaving, now=now,
            )
            if self._is_ahead(fragment, head) and not fragment.following:
                fragment.following = True
                self.context.spawn(self._follow(fragment, peer_id, head))

    def _is_ahead(self, fragment: _Fragment, head: Head) -> bool:
        state = fragment.ledger.state
        return head.digest != state.digest and head.tokens >= state.tokens

    async def _follow(self, fragment: _Fragment, peer_id: str, head: Head) -> None:
        try:
            await asyncio.sleep(FOLLOW_AFTER_S)
            if not self._is_ahead(fragment, head):
                return
            if not await fragment.applier.catch_up(peer_id):
                await self._jump(fragment, peer_id)
        except (NetworkError, StateError) as error:
            log.info("cannot follow %s yet: %s", peer_id[-6:], error)
        finally:
            fragment.following = False

    async def _jump(self, fragment: _Fragment, peer_id: str) -> bool:
        """Download, where a peer's history does not lead on from ours and outranks it. Meanwhile this peer opens
        no rounds: they would only prolong a history that is about to end."""
        index, before = fragment.applier.fragment, fragment.ledger.state
        status = self.context.directory.alive().get(peer_id)
        if status is None or len(status.heads) <= index:
            return False
        if not outranks(status.heads[index].tokens, status.heads[index].digest, before):
            return False
        if not fragment.downloading:
            fragment.downloading = True
            try:
                await self.synchroniser.download(index)
            finally:
                fragment.downloading = False
        return fragment.ledger.state is not before

    # -- what others may ask ----------------------------------------------------------------------------------------

    def _register(self) -> None:
        endpoint = self.context.endpoint
        largest = max(4 * fragment.applier.layout.numel + 1024 for fragment in self._fragments)
        endpoint.on("open", self._on_open)
        endpoint.on("push", self._on_push, max_body=largest)
        endpoint.on("reduce", self._on_reduce)
        endpoint.on("reduced", self._on_reduced, max_body=largest)
        endpoint.on("abort", self._on_abort)
        endpoint.on("commit", self._on_commit)
        endpoint.on("commits", self._on_commits)
        endpoint.on("result", self._on_result)
        endpoint.on("state", self._on_state)
        endpoint.on("chunk", self._on_chunk)
        endpoint.on("knows", self._on_knows)

    def _fragment(self, header: dict[str, Any]) -> _Fragment:
        index = header.get("fragment")
        if not isinstance(index, int) or not 0 <= index < len(self._fragments):
            raise BadMessage("there is no such fragment")
        if not self.serving:
            raise PeerRefused("this peer is still joining")
        return self._fragments[index]

    async def _on_open(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        opening = records.parse(Opening, header)
        fragment = self._fragment(header)
        opening.check(fragment.applier.layout.num_blocks)
        if opening.opener != link.peer_id or self._me not in opening.members:
            raise BadMessage("an opening by somebody else, or for somebody else")
        if fragment.ledger.state.version < opening.version - 1:
            with contextlib.suppress(asyncio.TimeoutError, NetworkError):
                await asyncio.wait_for(fragment.applier.catch_up(link.peer_id), min(CATCH_UP_S, opening.push_s / 2))
        state = fragment.ledger.state
        if state.version >= opening.version or (state.version == opening.version - 1 and state.digest != opening.base):
            return {"elsewhere": True}, b""
        reason = fragment.rounds.refuse_reason(opening)
        if reason is not None:
            raise PeerRefused(reason)
        if self._introducing is None or self._introducing.done():  # one at a time, or openings could flood the DHT
            self._introducing = self.context.spawn(self.context.directory.introduce(opening.members))
        return await fragment.rounds.take_part(opening), b""

    async def _on_push(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        await self._fragment(header).rounds.owner.push(header, body, sender=link.peer_id)
        return {}, b""

    async def _on_reduce(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        return await self._fragment(header).rounds.owner.reduce(header, asker=link.peer_id), b""

    async def _on_reduced(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        self._fragment(header).rounds.reduced(header, body, sender=link.peer_id)
        return {}, b""

    async def _on_abort(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        self._fragment(header).rounds.abort(header.get("id"), by=link.peer_id)
        return {}, b""

    async def _on_commit(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        commit = records.parse(Commit, header.get("commit"))
        fragment = self._fragment({"fragment": commit.opening.fragment})
        if commit.opening.version - fragment.ledger.state.version in (0, 1):  # others are not worth their signatures
            self.context.spawn(self._consider(fragment, commit, link.peer_id))
        return {}, b""

    async def _consider(self, fragment: _Fragment, commit: Commit, source: str) -> None:
        with contextlib.suppress(NetworkError):  # the next status brings it up again
            await fragment.applier.consider(commit, source=source)

    async def _on_commits(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        return {}, self._fragment(header).applier.serve_commits(header)

    async def _on_result(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        data = self.context.results.get(str(header.get("hash")))
        if data is None:
            raise PeerRefused("this peer does not have those bytes")
        return {}, data

    async def _on_state(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        return self._fragment(header).donor.manifest(header.get("digest"))

    async def _on_chunk(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        return {}, self._fragment(header).donor.chunk(header.get("digest"), header.get("index"))

    async def _on_knows(self, link: Link, header: dict[str, Any], body: bytes) -> Answer:
        version, digest = header.get("version"), header.get("digest")
        if not isinstance(version, int) or not isinstance(digest, str):
            raise BadMessage("a head without version and digest")
        return {"known": self._fragment(header).applier.history.knows(version, digest)}, b""


