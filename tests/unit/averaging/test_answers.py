"""What a peer says to those who ask for a fragment: that it does not hold it, has not got it yet, or that there is no
such one. Nothing of another fragment is ever given in its place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from swarm.averaging.messages import Commit
from swarm.config import RunConfig
from swarm.errors import BadMessage, PeerRefused
from swarm.network.keys import Keypair
from tests.unit.averaging.partial import LAYOUTS, fragment_of, head_in, make_world
from tests.unit.averaging.simulation import Caller, Peer, play

MakeRun = Callable[..., RunConfig]
Story = Callable[[list[Peer]], Coroutine[Any, Any, None]]

BY_FRAGMENT = ("push", "reduce", "reduced", "abort", "commits", "state", "chunk", "knows")


@pytest.fixture
def tell(make_run: MakeRun, keys: list[Keypair], no_threads: None) -> Callable[[Story], None]:
    """A {0}, B {0, 1}, C {1, 2}, D {2} have met and have each learnt something; nobody opens rounds by itself."""
    async def told(story: Story) -> None:
        world = make_world(make_run, keys, seed=1)
        peers = list(world.peers.values())
        for peer in peers:
            peer.averager.serving = True
            for index in peer.averager.held():
                peer.averager.trained_fragment(index, 100)
        for one in peers:
            for other in peers:
                if one is not other:
                    one.hear(other.id, other.status())
        await story(peers)

    return lambda story: play(told(story))


async def ask(peer: Peer, method: str, header: dict[str, Any], body: bytes = b"") -> Any:
    return await peer.methods[method](Caller("somebody"), header, body)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", BY_FRAGMENT)
def test_a_fragment_that_is_not_held_is_refused_with_the_reason(
    tell: Callable[[Story], None], method: str
) -> None:
    async def story(peers: list[Peer]) -> None:
        header = {"fragment": 2, "version": 0, "digest": "0" * 64, "since": 0, "index": 0, "id": "x", "part": 0}
        for peer in peers[:2]:
            with pytest.raises(PeerRefused, match="does not hold fragment 2"):
                await ask(peer, method, header)

    tell(story)


@pytest.mark.parametrize("method", BY_FRAGMENT)
@pytest.mark.parametrize("index", [3, -1, 10**30, True, None, "1", 1.0])
def test_a_fragment_that_the_run_does_not_have_is_malformed(
    tell: Callable[[Story], None], method: str, index: object
) -> None:
    async def story(peers: list[Peer]) -> None:
        with pytest.raises(BadMessage, match="no such fragment"):
            await ask(peers[1], method, {"fragment": index, "version": 0, "digest": "0" * 64})

    tell(story)


def test_while_joining_it_says_that(tell: Callable[[Story], None]) -> None:
    async def story(peers: list[Peer]) -> None:
        peers[0].averager.serving = False
        for index in range(3):
            with pytest.raises(PeerRefused, match="still joining"):
                await ask(peers[0], "state", {"fragment": index})

    tell(story)


def test_a_fragment_in_the_middle_of_its_download_is_not_given(tell: Callable[[Story], None]) -> None:
    async def story(peers: list[Peer]) -> None:
        fragment_of(peers[1], 1).ready = False
        with pytest.raises(PeerRefused, match="still downloading fragment 1"):
            await ask(peers[1], "state", {"fragment": 1})
        header, _ = await ask(peers[1], "state", {"fragment": 0})
        assert header == {"version": 0, "tokens": 0, "roll": []}, "the others are given meanwhile"

    tell(story)


def test_each_holder_gives_the_fragment_that_was_asked_for(tell: Callable[[Story], None]) -> None:
    async def story(peers: list[Peer]) -> None:
        for peer, index in ((peers[0], 0), (peers[1], 0), (peers[1], 1), (peers[2], 1), (peers[2], 2), (peers[3], 2)):
            _, hashes = await ask(peer, "state", {"fragment": index})
            state = fragment_of(peer, index).ledger.state
            assert hashes == state.chunk_hashes and state.weights.numel() == LAYOUTS[index].numel
            head = head_in(peer, index)
            known, _ = await ask(peer, "knows", {"fragment": index, "version": 0, "digest": head.digest})
            assert known == {"known": True}

    tell(story)


def test_an_opener_that_believes_otherwise_gets_a_refusal_and_its_round_all_the_same(
    tell: Callable[[Story], None]
) -> None:
    """A peer let go of the fragment, and its old status is still about: even if it was to own a part."""
    async def story(peers: list[Peer]) -> None:
        gone, opener = peers[2], peers[3]
        commit = await fragment_of(opener, 2).rounds.opener.open(
            [peers[0].id, gone.id], [peers[0].id, gone.id, opener.id]
        )
        assert commit is not None and commit.includes(opener.id) and not commit.includes(peers[0].id)
        assert all(commit.opening.owner(part) != peers[0].id for part in commit.opening.parts)
        await asyncio.sleep(2)
        assert opener.head_of(2) == gone.head_of(2) and opener.averager.pending() == [0, 0, 0]

    tell(story)


def test_commits_of_fragments_not_held_change_nothing(
    tell: Callable[[Story], None], signed_commit: Callable[..., Commit]
) -> None:
    async def story(peers: list[Peer]) -> None:
        before = peers[0].averager.states()
        with pytest.raises(PeerRefused, match="does not hold fragment 1"):
            await ask(peers[0], "commit", {"commit": signed_commit(fragment=1, version=1).model_dump()})
        assert peers[0].averager.states() == before

    tell(story)


def test_the_largest_fragment_held_bounds_what_others_may_send(tell: Callable[[Story], None]) -> None:
    async def story(peers: list[Peer]) -> None:
        bounds: dict[str, int] = {}

        def note(method: str, handler: object, *, max_body: int = 0) -> None:
            bounds[method] = max_body

        for peer, largest in ((peers[0], 0), (peers[1], 1), (peers[3], 2)):
            peer.on = note  # type: ignore[assignment]
            peer.averager._answers.register()
            assert bounds["push"] == bounds["reduced"] == 4 * LAYOUTS[largest].numel + 1024
            assert bounds["open"] == bounds["state"] == 0

    tell(story)


def test_statuses_have_an_entry_a_fragment_of_the_run(tell: Callable[[Story], None]) -> None:
    async def story(peers: list[Peer]) -> None:
        for peer, held in zip(peers, ({0}, {0, 1}, {1, 2}, {2}), strict=True):
            status = peer.status()
            assert len(status.heads) == len(status.pending) == 3
            assert set(status.held()) == held == set(peer.averager.held())
            assert [status.head(i) is None for i in range(4)] == [i not in held for i in range(4)]
            assert [tokens > 0 for tokens in status.pending] == [i in held for i in range(3)]

    tell(story)


@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_a_status_of_another_number_of_fragments_says_nothing(tell: Callable[[Story], None], length: int) -> None:
    async def story(peers: list[Peer]) -> None:
        fragment, other = fragment_of(peers[0], 0), peers[1]
        heads = ([head_in(other, 0)] * 4)[:length]
        status = other.status().model_copy(update={"heads": heads, "pending": [10**6] * length})
        fragment.progress.forget(other.id)
        peers[0].averager._on_status(other.id, status)
        assert fragment.progress.pending([other.id], now=0.0) == {}
        peers[0].averager._on_status(other.id, other.status())
        assert fragment.progress.at(fragment.ledger.state.digest, [other.id]) == [other.id]

    tell(story)
