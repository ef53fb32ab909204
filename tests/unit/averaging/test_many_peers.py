"""Rounds of several peers without a network: ledgers, codec, reduction and outer step together keep I1 and I2."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from swarm.averaging import outer, plan, robust
from swarm.averaging.global_state import GlobalState, initial_state
from swarm.averaging.layout import Layout
from swarm.averaging.ledger import Drift, Ledger
from swarm.averaging.outer import OuterStep
from swarm.averaging.packed import Packed
from swarm.averaging.reduction import reduce_part
from swarm.config import RunConfig
from swarm.network import codec
from swarm.network.codec import BLOCK


class Peer:
    def __init__(self, name: str, layout: Layout, start: torch.Tensor) -> None:
        self.name, self.layout = name, layout
        self.parameters = {key: torch.nn.Parameter(values.clone()) for key, values in layout.views(start)}
        self.ledger = Ledger(initial_state(0, start.clone(), 1), Drift(layout, self.parameters))
        self.random = torch.Generator().manual_seed(hash_of(name))
        self.trained = 0
        self.learnt = torch.zeros(layout.numel, dtype=torch.float64)
        self.feedback: dict[tuple[int, int], torch.Tensor] = {}

    def train(self, tokens: int) -> None:
        used = self.layout.flatten({key: torch.ones_like(p) for key, p in self.parameters.items()})
        change = torch.randn(self.layout.numel, generator=self.random) * 1e-3 * used
        with torch.no_grad():
            for key, values in self.layout.views(change):
                self.parameters[key].add_(values)
        self.learnt += change.double()
        self.ledger.trained(tokens)
        self.trained += tokens

    @property
    def weights(self) -> torch.Tensor:
        return self.layout.flatten(self.parameters)


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(name))


def round_of(run: RunConfig, peers: list[Peer], contributors: list[Peer], opening: str) -> int:
    """One round: everybody applies it, `contributors` are in it. Returns its tokens."""
    bits, layout = run.averaging.bits, peers[0].layout
    state = peers[0].ledger.state
    decay = layout.decay_mask()
    offered = {p.name: p.ledger.contribute(opening, state.version + 1) for p in contributors}
    said: dict[str, list[torch.Tensor]] = {p.name: [] for p in contributors}
    bodies, spans = [], []
    for start, end, owner in plan.split(layout.num_blocks, [p.name for p in peers]):
        fine = layout.fine_in(start, end)
        received = {}
        for name, contribution in offered.items():
            data = codec.encode(contribution.offered[start * BLOCK:end * BLOCK], fine, bits)
            received[name] = codec.decode(data, end - start, fine, bits)
            said[name].append(received[name])
        keeper = next(p for p in peers if p.name == owner)
        old = keeper.feedback.get((start, end), torch.zeros((end - start) * BLOCK))
        counts = {name: c.tokens for name, c in offered.items()}
        verdict = robust.judge_for(run.averaging, received, counts, plan.weights(counts))
        data, new = reduce_part(received, counts, old, num_fine=fine, bits=bits, verdict=verdict)
        keeper.feedback = {(start, end): new}
        bodies.append(data)
        spans.append((start, end, fine))
    for name, contribution in offered.items():
        contribution.lost = Packed.of(contribution.offered - torch.cat(said[name]))
    tokens = sum(contribution.tokens for contribution in offered.values())
    for peer in peers:  # everyone on their own, from the same bytes
        average = torch.cat([
            codec.decode(data, end - start, fine, bits) for data, (start, end, fine) in zip(bodies, spans, strict=True)
        ])
        before = peer.ledger.state
        step = OuterStep(run, before.version + 1, before.tokens, before.tokens + tokens)
        weights, buffers = outer.apply(step, before.weights, list(before.buffers), average, decay)
        new_state = GlobalState(0, step.version, step.tokens_after, weights, tuple(buffers))
        peer.ledger.apply(new_state, opening, included=peer in contributors)
    return tokens


@pytest.fixture
def swarm_of(layout: Layout) -> Callable[[int], list[Peer]]:
    def make(count: int) -> list[Peer]:
        start = layout.flatten({
            slot.name: torch.randn(slot.shape, generator=torch.Generator().manual_seed(1)) for slot in layout.slots
        })
        return [Peer(f"peer-{i}", layout, start) for i in range(count)]

    return make


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_digests_are_equal_and_no_token_is_lost_or_counted_twice(
    make_run: Callable[..., RunConfig], swarm_of: Callable[[int], list[Peer]], bits: int, count: int
) -> None:
    run = make_run({"total_tokens": 10**9}, bits=bits)
    peers, dice, committed = swarm_of(count), random.Random(count * bits), 0
    for version in range(1, 31):
        for peer in peers:
            for _ in range(dice.randint(0, 3)):
                peer.train(dice.randint(1, 100))
        ready = [peer for peer in peers if peer.ledger.pending_tokens > 0]
        contributors = dice.sample(ready, dice.randint(1, len(ready))) if ready else []
        if not contributors:
            peers[0].train(10)
            contributors = [peers[0]]
        committed += round_of(run, peers, contributors, f"opening-{version}")
        digests = {peer.ledger.state.digest for peer in peers}
        assert len(digests) == 1, f"I1 at version {version}"
        assert peers[0].ledger.state.tokens == committed
        assert committed + sum(p.ledger.pending_tokens for p in peers) == sum(p.trained for p in peers), "I2"
    assert peers[0].ledger.state.version == 30


def test_fp32_and_a_plain_average_is_the_weighted_mean_of_the_working_weights(
    make_run: Callable[..., RunConfig], swarm_of: Callable[[int], list[Peer]]
) -> None:
    run = make_run({"total_tokens": 10**9}, bits=32, outer_learning_rate=1.0, outer_momentum=0.0, robust=False)
    peers = swarm_of(3)
    tokens = {"peer-0": 100, "peer-1": 150, "peer-2": 50}  # none is over the cap of twice the median
    for version in range(1, 21):
        for peer in peers:
            peer.train(tokens[peer.name])
        mean = sum(peer.weights.double() * tokens[peer.name] for peer in peers) / 300
        round_of(run, peers, peers, f"opening-{version}")
        assert torch.allclose(peers[0].ledger.state.weights.double(), mean, atol=1e-6)
        for peer in peers:
            assert torch.allclose(peer.weights, peer.ledger.state.weights, atol=1e-6), "all drift was absorbed"
            assert peer.ledger.pending_tokens == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_learnt_survives_quantising_both_ways(
    make_run: Callable[..., RunConfig], swarm_of: Callable[[int], list[Peer]], bits: int
) -> None:
    """A plain average of equal peers: start + mean of all learning = global weights + what feedbacks still hold."""
    run = make_run({"total_tokens": 10**9}, bits=bits, outer_learning_rate=1.0, outer_momentum=0.0, robust=False)
    peers = swarm_of(4)
    start = peers[0].ledger.state.weights.double()
    for version in range(1, 41):
        for peer in peers:
            peer.train(64)
        round_of(run, peers, peers, f"opening-{version}")
    reached = peers[0].ledger.state.weights.double()
    wanted = start + sum(peer.learnt for peer in peers) / 4
    owed = torch.zeros(peers[0].layout.numel, dtype=torch.float64)
    for peer in peers:
        owed += peer.ledger.contribute("probe", 99).offered.double() / 4
        for (first, end), values in peer.feedback.items():
            owed[first * BLOCK:end * BLOCK] += values.double()
    assert torch.allclose(reached - owed, wanted, atol=1e-5)
    assert float((reached - wanted).abs().max()) < 2e-3, "within about one quantum of one round"


def test_a_peer_that_is_always_too_late_loses_nothing(
    make_run: Callable[..., RunConfig], swarm_of: Callable[[int], list[Peer]]
) -> None:
    """Ten rounds go by without it; then its drift goes into one, whole."""
    run = make_run({"total_tokens": 10**9}, bits=32, outer_learning_rate=1.0, outer_momentum=0.0)
    quick, late = swarm_of(2)
    for version in range(1, 11):
        quick.train(20)
        late.train(7)
        round_of(run, [quick, late], [quick], f"opening-{version}")
    assert late.ledger.pending_tokens == 70
    drift = late.weights.double() - late.ledger.state.weights.double()
    assert torch.allclose(drift, late.learnt, atol=1e-5)
    round_of(run, [quick, late], [late], "opening-11")
    assert late.ledger.pending_tokens == 0
    everything = quick.learnt + late.learnt
    start = quick.ledger.state.weights.double() - everything
    assert torch.allclose(start, swarm_start(quick.layout), atol=1e-5)


def swarm_start(layout: Layout) -> torch.Tensor:
    return layout.flatten({
        slot.name: torch.randn(slot.shape, generator=torch.Generator().manual_seed(1)) for slot in layout.slots
    }).double()
