"""Four peers in a made-up world that have met and have each learnt something; nobody opens rounds by itself."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import torch

from swarm.averaging.layout import Layout
from swarm.averaging.messages import Commit
from swarm.averaging.opener import Opener
from swarm.config import RunConfig
from swarm.network.keys import Keypair
from tests.unit.averaging.simulation import Peer, World, play

Story = Callable[[list[Peer]], Coroutine[Any, Any, None]]
Tell = Callable[[Story], None]


def play_four(run: RunConfig, layout: Layout, keys: list[Keypair], story: Story) -> None:
    """They have learnt 100, 200, 300 and 400 tokens."""
    async def told() -> None:
        world = World(run, layout, seed=5)
        peers = [Peer(world, key) for key in keys[:4]]
        for number, peer in enumerate(peers, start=1):
            peer.averager.serving = True
            learn(peer, 0.1 * number, 100 * number)
        meet(peers)
        await story(peers)

    play(told())


def learn(peer: Peer, value: float, tokens: int) -> None:
    with torch.no_grad():
        for parameter in peer.parameters.values():
            parameter.sub_(value)
    peer.trained += tokens
    peer.averager.trained(tokens)


def meet(peers: list[Peer]) -> None:
    for one in peers:
        for other in peers:
            if one is not other:
                other.hear(one.id, one.status())


def opener_of(peer: Peer) -> Opener:
    return peer.averager._fragments[0].rounds.opener


async def open_round(peers: list[Peer], owners: list[Peer] | None = None) -> Commit | None:
    """By the first one, with the others."""
    owners = peers if owners is None else owners
    return await opener_of(peers[0]).open([peer.id for peer in peers[1:]], [peer.id for peer in owners])
