"""When this peer opens a round, and whom it invites: the live holders of that fragment take turns.

A fragment is due when its holders have trained enough of it, or have waited long enough, or somebody leaves. Who holds
it, at which version and with how much drift, is known from statuses. Whoever does not hold it is neither invited nor
waited for.
"""

from __future__ import annotations

import asyncio
import logging
import random
import statistics
from collections.abc import Callable, Mapping

from swarm.averaging import plan
from swarm.averaging.context import Context
from swarm.averaging.download import LEASE_S
from swarm.averaging.follow import Follower
from swarm.averaging.held import HeldFragment
from swarm.averaging.messages import Commit
from swarm.errors import NetworkError, StateError
from swarm.network.records import Status

TICK_S = 0.2
MIN_PATIENCE_S = 3.0
RETRY_S = 0.5
"""between two openings that came to nothing"""

log = logging.getLogger(__name__)


class Turns:
    def __init__(
        self, context: Context, fragments: Mapping[int, HeldFragment], follower: Follower, *,
        is_leaving: Callable[[], bool],
    ) -> None:
        """`fragments`: those held, by their index in the run; they may change. `is_leaving`: has this peer stopped
        training for good?"""
        self._context, self._fragments, self._follower, self._is_leaving = context, fragments, follower, is_leaving
        self._sync_mode = context.run.averaging.mode == "sync"

    async def tick_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            everybody = self._context.directory.alive()
            for fragment in list(self._fragments.values()):
                try:
                    self._maybe_open(fragment, everybody, loop.time())
                except Exception:  # a bug of ours in one round must not end all rounds
                    log.exception("fragment %d: cannot tell whether to open a round", fragment.index)
            await asyncio.sleep(TICK_S / 20 if self._sync_mode else TICK_S)

    def heard(self, peer_id: str, status: Status) -> None:
        """A peer says what it has of each fragment of the run."""
        if len(status.heads) == len(status.pending) == self._context.run.fragments:
            for fragment in list(self._fragments.values()):
                self._heard(fragment, peer_id, status)

    def begin(self, fragment: HeldFragment) -> None:
        """From now on this peer takes part in the rounds of a fragment."""
        fragment.opened_at = asyncio.get_running_loop().time()
        for peer_id, status in self._context.directory.alive().items():
            if len(status.heads) == len(status.pending) == self._context.run.fragments:
                self._heard(fragment, peer_id, status)

    def applied(self, fragment: HeldFragment, commit: Commit) -> None:
        now = asyncio.get_running_loop().time()
        fragment.opened_at, fragment.due_since = now, None
        fragment.alone = len(commit.contributors) == 1 and commit.includes(self._me)
        fragment.progress.committed(commit, fragment.ledger.state.digest, now=now)

    def first_openers(self) -> set[str]:
        """Who opens the next round of each fragment, if nobody is late."""
        openers, everybody = set(), self._context.directory.alive()
        for fragment in [fragment for fragment in self._fragments.values() if fragment.ready]:
            peers, _ = self.holders(fragment, everybody)
            leaders = self._leaders(peers, everybody)
            openers.add(plan.rank(leaders, fragment=fragment.index, version=fragment.ledger.state.version + 1)[0])
        return openers

    def holders(self, fragment: HeldFragment, everybody: Mapping[str, Status]) -> tuple[list[str], list[str]]:
        """Live peers that hold a fragment: (at this peer's version, at another one). Who leaves counts while it has
        drift to give, and for who leaves as well: two that stopped training at the same moment know of each other only
        that there was none, and each would make the next version alone. All are invited: those behind catch up at that
        moment (where rounds are quicker than heartbeats, a newcomer would otherwise run after them for ever), and those
        ahead stop a round that would fork history."""
        index, now = fragment.index, asyncio.get_running_loop().time()
        alive = [
            peer_id for peer_id, status in everybody.items()
            if status.head(index) is not None
            and (not status.leaving or self._is_leaving() or status.pending[index:index + 1] > [0])
        ]
        level = fragment.progress.at(fragment.ledger.state.digest, alive)
        others = [p for p in alive if p not in level and fragment.distrusted_until.get(p, 0.0) < now]
        return level, others

    @property
    def _me(self) -> str:
        return self._context.keypair.peer_id

    def _heard(self, fragment: HeldFragment, peer_id: str, status: Status) -> None:
        head = status.heads[fragment.index]
        if head is None:
            fragment.progress.forget(peer_id)
            spare = status.spare(fragment.index)
            if spare is not None and spare.tokens > fragment.ledger.state.tokens:
                self._follower.heard(fragment, peer_id, spare)  # all who had that are gone
            return
        fragment.progress.heard(
            peer_id, version=head.version, digest=head.digest, pending=status.pending[fragment.index],
            tokens_per_s=0.0 if self._sync_mode else _fragment_speed(status), leaving=status.leaving,
            now=asyncio.get_running_loop().time(),
        )
        self._follower.heard(fragment, peer_id, head)

    def _leaders(self, holders: list[str], everybody: Mapping[str, Status]) -> list[str]:
        """Who of this peer and the holders may open rounds and own parts."""
        directory = self._context.directory
        reaches = {self._me: directory.reach} | {peer_id: everybody[peer_id].reach for peer_id in holders}
        return plan.leaders(reaches, others_outbound=directory.heard_of_outbound())

    def _maybe_open(self, fragment: HeldFragment, everybody: Mapping[str, Status], now: float) -> None:
        busy = fragment.opening or fragment.downloading or fragment.rounds.member.in_round()
        busy = busy or not self._context.has_room_for(fragment.index)
        if busy or not fragment.ready or self._context.directory.unsure():
            return
        holders, others = self.holders(fragment, everybody)
        at_least = self._is_due(fragment, holders, now)
        if at_least is None:
            fragment.due_since = None
            return
        if fragment.due_since is None:
            fragment.due_since = now
        leaders = self._leaders(holders, everybody)
        if self._me not in leaders or self._waits_for_downloads(fragment, now):
            return
        order = plan.rank(leaders, fragment=fragment.index, version=fragment.ledger.state.version + 1)
        patience_s = max(MIN_PATIENCE_S, 3 * statistics.median(fragment.recent_s or [1.0]))
        if now - fragment.due_since >= order.index(self._me) * patience_s and now >= fragment.retry_at:
            fragment.opening = True
            owners = [p for p in leaders if p == self._me or self._context.directory.maddrs(p)]
            self._context.spawn(self._open(fragment, [*holders, *others], owners, at_least))

    def _is_due(self, fragment: HeldFragment, holders: list[str], now: float) -> int | None:
        """None: it is not. Else the tokens without which the round is not worth it: a step of a `sync` run is all of
        it, or there is none yet."""
        averaging = self._context.run.averaging
        mine = fragment.ledger.pending_tokens
        others = fragment.progress.pending(holders, now=now)
        total = mine + sum(others.values())
        if total <= 0:
            return None
        if self._sync_mode and self._all_are_whole() and mine > 0 and all(tokens > 0 for tokens in others.values()):
            return 0
        state = fragment.ledger.state
        target = plan.target_tokens(
            self._context.run, fragment=fragment.index, version=state.version, tokens=state.tokens,
            staggered=not self._sync_mode,
        )
        overdue = now - fragment.opened_at >= averaging.max_round_s
        i_leave = (self._is_leaving() or fragment.leaving) and mine > 0
        if overdue or i_leave or fragment.progress.leaving(holders):
            return 0
        if total < target:
            return None
        return target if self._sync_mode and not self._all_are_whole() else 0

    def _waits_for_downloads(self, fragment: HeldFragment, now: float) -> bool:
        """A peer that averages with nobody, has no memory for older versions, and is being asked for this one, waits
        with the next for a while: those who are on their way to it would start over and over. Its tokens stay in its
        drift."""
        assert fragment.due_since is not None
        patient = now - fragment.due_since < LEASE_S and not (self._is_leaving() or fragment.leaving)
        return patient and fragment.alone and fragment.donor.gives_what_it_cannot_keep()

    def _all_are_whole(self) -> bool:
        """Does everybody hold all fragments? Only then does a peer's first word of a `sync` step say all of it."""
        return len(self._fragments) == self._context.run.fragments and not any(
            None in status.heads for status in self._context.directory.alive().values()
        )

    async def _open(
        self, fragment: HeldFragment, members: list[str], owners: list[str], at_least: int
    ) -> None:
        began = asyncio.get_running_loop().time()
        commit = None
        try:
            invited = plan.invited(
                members, first=[p for p in members if fragment.progress.leaving([p])], fragment=fragment.index,
                version=fragment.ledger.state.version + 1, most=plan.MAX_MEMBERS - 1,
            )
            invited_owners = [p for p in owners if p == self._me or p in invited]
            commit = await fragment.rounds.opener.open(invited, invited_owners, at_least=at_least)
        except (NetworkError, StateError) as error:
            log.warning("round of fragment %d: %s", fragment.index, error)
        finally:
            fragment.opening = False
            now = asyncio.get_running_loop().time()
            if commit is None:
                # not all at the same pace: two with room for one round only would refuse each other's for ever
                spread_s = RETRY_S * random.random() * 4 if self._context.keep.rounds < len(self._fragments) else 0.0
                fragment.retry_at = now + (TICK_S if self._sync_mode else RETRY_S) + spread_s
            else:
                fragment.recent_s = [*fragment.recent_s[-15:], now - began]
        elsewhere, fragment.rounds.opener.elsewhere = fragment.rounds.opener.elsewhere, []
        for peer_id in elsewhere:
            await self._follower.see_what_it_has(fragment, peer_id)


def _fragment_speed(status: Status) -> float:
    """Tokens a second of each fragment that a peer holds: it tells its share of whole tokens."""
    return status.tokens_per_s * len(status.heads) / max(1, len(status.held()))
