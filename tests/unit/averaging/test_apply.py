"""From commits to weights, between peers in one process: real books, codec, signatures and history; what carries their
calls is a loop. Who hears what first, and who misses what, is up to each test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any

import pytest
import torch

from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.download import Donor
from swarm.averaging.global_state import initial_state
from swarm.averaging.layout import Layout
from swarm.averaging.ledger import Drift, Ledger
from swarm.averaging.messages import Commit, Contributor, Opening, Part, PartResult, make_commit, result_message
from swarm.averaging.packed import Packed
from swarm.averaging.reduction import reduce_part
from swarm.averaging.synchronise import Synchroniser
from swarm.config import RunConfig
from swarm.errors import BadMessage, NetworkError, PeerGone, PeerRefused, StateError
from swarm.events import Event, Round
from swarm.network import codec
from swarm.network.keys import Keypair
from swarm.network.records import Head, Status
from swarm.train.boundary import Boundary


class Peer:
    """Also stands in for the endpoint and the directory: its links lead to the other peers of `swarm`."""

    bytes_sent = bytes_received = 0

    def __init__(self, run: RunConfig, key: Keypair, layout: Layout, swarm: dict[str, Peer]) -> None:
        start = layout.flatten({
            slot.name: torch.randn(slot.shape, generator=torch.Generator().manual_seed(3)) for slot in layout.slots
        })
        self.key, self.layout, self.swarm, self.dead = key, layout, swarm, False
        self.events: list[Event] = []
        self.parameters = {name: torch.nn.Parameter(v.clone()) for name, v in layout.views(start)}
        self.ledger = Ledger(initial_state(0, start, 1), Drift(layout, self.parameters))
        self.context = Context(run, key, self, self, Boundary(), self.events.append)  # type: ignore[arg-type]
        self.applier = Applier(self.context, fragment=0, layout=layout, ledger=self.ledger)
        self.donor = Donor(lambda: [self.ledger.state], lambda: 0.0)
        self.learnt = torch.zeros(layout.numel, dtype=torch.float64)
        self.trained = 0
        swarm[key.peer_id] = self

    @property
    def id(self) -> str:
        return self.key.peer_id

    @property
    def head(self) -> tuple[int, str]:
        return self.ledger.state.version, self.ledger.state.digest

    def train(self, tokens: int) -> None:
        self.trained += tokens
        generator = torch.Generator().manual_seed(self.trained)
        noise = {name: torch.randn(p.shape, generator=generator) for name, p in self.parameters.items()}
        change = self.layout.flatten(noise)
        with torch.no_grad():
            for name, values in self.layout.views(change * 1e-3):
                self.parameters[name].add_(values)
        self.learnt -= (change * 1e-3).double()
        self.ledger.trained(tokens)

    def drift(self) -> torch.Tensor:
        return self.ledger.state.weights.double() - self.layout.flatten(self.parameters).double()

    def maddrs(self, peer_id: str) -> list[str]:
        return []

    def alive(self) -> dict[str, Status]:
        return {peer.id: peer.status() for peer in self.swarm.values() if peer is not self and not peer.dead}

    def status(self) -> Status:
        state = self.ledger.state
        head = Head(version=state.version, digest=state.digest, tokens=state.tokens)
        return Status(run_id=self.context.run.run_id, name="x", role="trainer", heads=[head])

    def is_linked(self, peer_id: str) -> bool:
        return False  # nobody pushes results here: they are fetched

    async def call(
        self, peer_id: str, method: str, header: dict[str, Any], body: bytes = b"", *, deadline_s: float,
        max_answer: int = 0, maddrs: Iterable[str] = (),
    ) -> tuple[dict[str, Any], bytes]:
        await asyncio.sleep(0)
        other = self.swarm[peer_id]
        if other.dead or other is self:
            raise PeerGone("cannot reach it")
        answer = other.answer(method, header)
        assert len(answer[1]) <= max_answer
        return answer

    def answer(self, method: str, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        if method == "result":
            data = self.context.results.get(header["hash"])
            if data is None:
                raise PeerRefused("this peer does not have those bytes")
            return {}, data
        if method == "commits":
            return {}, self.applier.history.answer(header.get("since"))
        if method == "knows":
            return {"known": self.applier.history.knows(header["version"], header["digest"])}, b""
        if method == "state":
            return self.donor.manifest(header.get("digest"))
        return {}, self.donor.chunk(header["digest"], header["index"])


def commit_of(members: list[Peer], contributors: list[Peer], *, nonce: int = 0) -> Commit:
    """The round that the first member opens, as far as its commit; nobody has heard of it yet. One part, its own."""
    opener, layout = members[0], members[0].layout
    state = contributors[0].ledger.state
    opening = Opening(
        fragment=0, version=state.version + 1, base=state.digest, members=[peer.id for peer in members],
        parts=[Part(start=0, end=layout.num_blocks, owner=0)], nonce=f"{nonce:016x}", push_s=5.0,
    )
    bits, shape = opener.context.run.averaging.bits, (layout.num_blocks, layout.num_fine_blocks)
    received, tokens = {}, {}
    for peer in contributors:
        assert peer.head == contributors[0].head
        offer = peer.ledger.contribute(opening.id, opening.version)
        data = codec.encode(offer.offered, layout.num_fine_blocks, bits)
        received[peer.id], tokens[peer.id] = codec.decode(data, *shape, bits), offer.tokens
        offer.lost = Packed.of(offer.offered - received[peer.id])
        offer.recall = partial(codec.decode, data, *shape, bits)
    data, _ = reduce_part(received, tokens, torch.zeros(layout.numel), num_fine=layout.num_fine_blocks, bits=bits)
    in_order = sorted(contributors, key=members.index)
    listed = [Contributor(member=members.index(peer), tokens=tokens[peer.id]) for peer in in_order]
    digest = opener.context.results.put(data)
    signature = opener.key.sign(result_message(opening.id, 0, listed, digest)).hex()
    return make_commit(opener.key, opening, listed, [PartResult(hash=digest, signature=signature)])


@pytest.fixture
def peers(make_run: Callable[..., RunConfig], keys: list[Keypair], layout: Layout) -> list[Peer]:
    swarm: dict[str, Peer] = {}
    run = make_run({"total_tokens": 10**9}, tokens_per_round=100)
    return [Peer(run, key, layout, swarm) for key in keys[:4]]


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 30))


async def consider(commit: Commit, *peers: Peer) -> list[bool]:
    return [await peer.applier.consider(commit) for peer in peers]


def test_a_commit_makes_everybody_equal(peers: list[Peer]) -> None:
    async def scene() -> None:
        for peer in peers:
            peer.train(10)
        for version in range(1, 6):
            peers[version % 4].train(10)
            ready = [peer for peer in peers if peer.ledger.pending_tokens]
            commit = commit_of([peers[version % 4], *(p for p in peers if p is not peers[version % 4])], ready)
            assert await consider(commit, *peers) == [True] * 4
            assert {peer.head for peer in peers} == {(version, peers[0].ledger.state.digest)}
        assert await consider(commit, *peers) == [True] * 4, "once more changes nothing"
        assert peers[0].head[0] == 5
        rounds = [event for event in peers[3].events if isinstance(event, Round)]
        assert [event.version for event in rounds] == [1, 2, 3, 4, 5] and rounds[0].contributors == 4
        committed = peers[0].ledger.state.tokens
        assert committed + sum(p.ledger.pending_tokens for p in peers) == sum(p.trained for p in peers)

    play(scene())


def test_commits_that_lead_nowhere_are_left(peers: list[Peer]) -> None:
    async def scene() -> None:
        a, b = peers[:2]
        a.train(10)
        first = commit_of([a, b], [a])
        await consider(first, a)
        a.train(10)
        second = commit_of([a, b], [a])
        assert await consider(second, b) == [False], "there is a version between"
        assert await consider(first, b) == [True]
        forged = second.model_copy(update={"signature": first.signature})
        with pytest.raises(BadMessage):
            await b.applier.consider(forged)
        claimed = make_commit(a.key, second.opening, [Contributor(member=0, tokens=10**6)], second.results)
        with pytest.raises(BadMessage, match="too many tokens"):
            await b.applier.consider(claimed)
        assert b.head[0] == 1
        assert await consider(second, b) == [True]

    play(scene())


def test_result_bytes_come_from_whoever_has_them(peers: list[Peer]) -> None:
    async def scene() -> None:
        a, b, c, outsider = peers
        a.train(10)
        commit = commit_of([a, b, c], [a])
        assert await consider(commit, b) == [True]
        a.dead = True
        assert await consider(commit, c) == [True], "the owner is dead, another member has them"
        b.dead = c.dead = True
        before = outsider.head
        with pytest.raises(NetworkError):
            await outsider.applier.consider(commit)
        assert outsider.head == before, "nothing has changed"
        b.dead = False
        assert await outsider.applier.consider(commit, source=b.id)
        assert outsider.head == b.head == c.head

    play(scene())


def test_wrong_bytes_are_not_taken_for_the_result(peers: list[Peer]) -> None:
    async def scene() -> None:
        a, b, c, _ = peers
        a.train(10)
        commit = commit_of([a, b, c], [a])
        true = a.context.results.get(commit.results[0].hash)
        assert true is not None
        a.context.results._by_hash[commit.results[0].hash] = true[:-1] + bytes([true[-1] ^ 1])
        with pytest.raises(NetworkError):
            await c.applier.consider(commit)
        b.context.results.put(true)
        assert await consider(commit, c) == [True]

    play(scene())


@pytest.mark.parametrize("worse_first", [True, False])
def test_of_two_commits_of_one_version_all_end_at_the_better(peers: list[Peer], worse_first: bool) -> None:
    async def scene() -> None:
        a, b, c, d = peers
        for peer in peers:
            peer.train(10)
        worse = commit_of([a, b, c, d], [a, b, c], nonce=1)
        d.train(90)
        better = commit_of([d, c, b, a], [d, c], nonce=2)
        order = [worse, better] if worse_first else [better, worse]
        for peer in (a, b, c):
            await peer.applier.consider(order[0])
            await peer.applier.consider(order[1])
        await d.applier.consider(better)
        assert {peer.head for peer in peers} == {(1, d.ledger.state.digest)}
        assert [peer.ledger.pending_tokens for peer in peers] == [10, 10, 0, 0]
        for peer in (a, b):
            assert torch.allclose(peer.drift(), peer.learnt, atol=1e-5)
        for peer in (c, d):
            assert torch.allclose(peer.drift(), torch.zeros_like(peer.learnt), atol=1e-5)
            assert peer.applier.history.commit(1) == better

    play(scene())


@pytest.mark.parametrize(("nonce", "first"), [(1, 0), (1, 1), (3, 0), (5, 1), (7, 0)])
def test_of_two_commits_with_as_many_tokens_all_end_at_the_lower_digest(
    peers: list[Peer], nonce: int, first: int
) -> None:
    """As of two heads: with a rule for each, two peers could go where the other one came from."""
    async def scene() -> None:
        a, b, c, d = peers
        for peer in peers:
            peer.train(10)
        commits = [commit_of([a, b], [a, b], nonce=nonce), commit_of([c, d], [c, d], nonce=nonce + 1)]
        assert commits[0].tokens == commits[1].tokens
        await consider(commits[0], a)
        await consider(commits[1], d)
        lower = min(a.head[1], d.head[1])
        for peer in peers:
            for commit in (commits[first], commits[1 - first], commits[first]):
                await peer.applier.consider(commit)
        assert {peer.head for peer in peers} == {(1, lower)}
        included = [a, b] if a.applier.history.commit(1) == commits[0] else [c, d]
        assert [peer.ledger.pending_tokens for peer in peers] == [0 if peer in included else 10 for peer in peers]

    play(scene())


def test_who_was_away_follows_the_commits(peers: list[Peer]) -> None:
    async def scene() -> None:
        a, b, late, _ = peers
        late.train(25)
        for _ in range(6):
            a.train(10)
            await consider(commit_of([a, b], [a]), a, b)
        assert await late.applier.catch_up(b.id)
        assert late.head == a.head and late.ledger.pending_tokens == 25
        assert torch.allclose(late.drift(), late.learnt, atol=1e-5)

    play(scene())


def test_commits_are_served_to_those_who_ask_properly(peers: list[Peer]) -> None:
    for since in (None, -1, "0", 1.0):
        with pytest.raises(BadMessage):
            peers[0].applier.history.answer(since)
    assert peers[0].applier.history.answer(0) == b'{"commits":[]}'


@pytest.mark.parametrize("was_in_the_other", [True, False])
def test_the_loser_of_a_fork_moves_over_and_loses_nothing(peers: list[Peer], was_in_the_other: bool) -> None:
    """The lone peer has applied a commit of its own, better than the one of the others; but they went on from theirs
    before they heard of it, and have more tokens by now. What its commit absorbed is drift again (DESIGN 8)."""
    async def scene() -> None:
        a, b, _, lone = peers
        a.train(20)
        lone.train(30)
        theirs = commit_of([a, b, lone], [a, lone] if was_in_the_other else [a], nonce=1)
        lone.train(60)
        its_own = commit_of([lone], [lone], nonce=2)
        await consider(theirs, a, b, peers[2])
        await consider(its_own, lone)
        assert lone.ledger.pending_tokens == 0
        lone.train(5)
        for _ in range(3):
            a.train(100)
            await consider(commit_of([a, b], [a]), a, b, peers[2])
        assert not await lone.applier.catch_up(a.id), "no commits lead from here to there"
        await synchroniser(lone).download(lone.applier)
        assert lone.head == a.head == b.head
        absorbed = 30 if was_in_the_other else 0
        assert lone.ledger.pending_tokens == lone.trained - absorbed
        committed, pending = a.ledger.state.tokens, sum(peer.ledger.pending_tokens for peer in peers)
        assert committed + pending == sum(peer.trained for peer in peers)
        if not was_in_the_other:
            assert torch.allclose(lone.drift(), lone.learnt, atol=1e-5)
        assert not lone.applier.history.knows(1, "0" * 64) and lone.applier.history.knows(*a.head)

    play(scene())


def synchroniser(peer: Peer) -> Synchroniser:
    return Synchroniser(peer.context, lambda: [peer.applier])


@pytest.mark.parametrize("alone", [2, 5])
def test_a_parted_swarm_comes_together_and_loses_no_token(peers: list[Peer], alone: int) -> None:
    """Two went on by themselves for some rounds; the other two trained more. All that was learnt is in the end in one
    history, or in a drift."""
    async def scene() -> None:
        left, right = peers[:2], peers[2:]
        for peer in peers:
            peer.train(10)
        await consider(commit_of(peers, peers), *peers)
        for _ in range(alone):
            for peer in right:
                peer.train(5)
            await consider(commit_of(right, right), *right)
            for peer in left:
                peer.train(20)
            await consider(commit_of(left, left), *left)
        for peer in right:
            assert peer.ledger.pending_tokens == 0
            peer.train(3)
            assert not await peer.applier.catch_up(left[0].id)
            await synchroniser(peer).download(peer.applier)
            assert peer.head == left[0].head
            assert peer.ledger.pending_tokens == 5 * alone + 3
        pending = sum(peer.ledger.pending_tokens for peer in peers)
        assert left[0].ledger.state.tokens + pending == sum(peer.trained for peer in peers)
        await consider(commit_of(peers, right), *peers)
        assert {peer.ledger.pending_tokens for peer in peers} == {0}
        assert left[0].ledger.state.tokens == sum(peer.trained for peer in peers)
        assert {peer.head for peer in peers} == {left[0].head}

    play(scene())


def test_a_download_keeps_what_is_in_the_history_that_it_leads_to(peers: list[Peer]) -> None:
    """No fork: the peer's own last commit is part of what it downloads, and must not be taken back."""
    async def scene() -> None:
        a, b, c, late = peers
        late.train(40)
        await consider(commit_of([a, b, c, late], [late]), *peers)
        late.train(7)
        outstanding = commit_of([a, b, c, late], [late], nonce=5)
        late.train(3)
        await consider(outstanding, a, b, c)  # it goes away before it hears of this one
        for _ in range(2):
            a.train(10)
            await consider(commit_of([a, b], [a]), a, b, c)
        await synchroniser(late).download(late.applier)
        assert late.head == a.head
        assert late.ledger.pending_tokens == 3
        assert a.ledger.state.tokens + sum(p.ledger.pending_tokens for p in peers) == sum(p.trained for p in peers)

    play(scene())


def test_where_nobody_is_there_is_nothing_to_download(peers: list[Peer]) -> None:
    async def scene() -> None:
        for peer in peers[1:]:
            peer.dead = True
        with pytest.raises(StateError, match="nobody here holds fragment 0"):
            await synchroniser(peers[0]).download(peers[0].applier)

    play(scene())


def test_a_newcomer_joins_only_where_it_has_to(peers: list[Peer]) -> None:
    async def scene() -> None:
        newcomer = peers[3]
        assert await synchroniser(newcomer).join() == 0, "all are at the start"
        peers[0].train(10)
        await consider(commit_of(peers[:3], peers[:1]), *peers[:3])
        assert await synchroniser(newcomer).join() == 1
        assert newcomer.head == peers[0].head

    play(scene())


def test_a_start_that_is_not_the_runs_is_replaced_even_at_the_same_tokens(peers: list[Peer]) -> None:
    async def scene() -> None:
        odd = peers[3]
        odd.applier.trusted = False
        assert await synchroniser(odd).join() == 1
        assert odd.applier.trusted and odd.head == peers[0].head

    play(scene())
