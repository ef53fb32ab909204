"""A swarm that was parted comes together: what only the losing side had committed goes into the next round (I2)."""

from __future__ import annotations

import pytest
import torch

from swarm.averaging.global_state import GlobalState, initial_state, outranks
from swarm.averaging.layout import layout_of
from swarm.averaging.ledger import Drift, Ledger
from swarm.averaging.packed import Packed
from swarm.host.keep import MAX_OWN
from swarm.model.fragments import FragmentSpec, TensorSpec
from swarm.network import codec

LAYOUT = layout_of(FragmentSpec(0, (0, 1), (TensorSpec("w", (20, 30), False), TensorSpec("b", (30,), True))))
BITS = 4


class Peer:
    """One peer's ledger, and an exact record of what it learnt and what it sent."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.parameters = {
            "w": torch.nn.Parameter(torch.randn(20, 30, generator=generator)),
            "b": torch.nn.Parameter(torch.randn(30, generator=generator)),
        }
        self.ledger = Ledger(initial_state(0, LAYOUT.flatten(self.parameters), 1), Drift(LAYOUT, self.parameters))
        self.learnt = torch.zeros(LAYOUT.numel, dtype=torch.float64)
        self.generator = generator

    def train(self, tokens: int) -> None:
        step = {name: torch.randn(p.shape, generator=self.generator) * 0.01 for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, change in step.items():
                self.parameters[name] -= change
        self.learnt += LAYOUT.flatten(step).double()
        self.ledger.trained(tokens)

    def commit(self, key: str) -> torch.Tensor:
        """A round of which this peer's contribution is a part; returns what it told the others."""
        contribution = self.ledger.contribute(key, self.ledger.state.version + 1)
        data = codec.encode(contribution.offered, LAYOUT.num_fine_blocks, BITS)
        said = codec.decode(data, LAYOUT.num_blocks, LAYOUT.num_fine_blocks, BITS)
        contribution.lost = Packed.of(contribution.offered - said)
        contribution.recall = lambda: codec.decode(data, LAYOUT.num_blocks, LAYOUT.num_fine_blocks, BITS)
        self.ledger.apply(self.state(self.ledger.state.weights - said, contribution.tokens), key, included=True)
        return said.double()

    def state(self, weights: torch.Tensor, tokens: int) -> GlobalState:
        old = self.ledger.state
        return GlobalState(0, old.version + 1, old.tokens + tokens, weights, old.buffers)

    def offers(self) -> torch.Tensor:
        probe = self.ledger.contribute("probe", self.ledger.state.version + 1)
        self.ledger.withdraw("probe")
        return probe.offered.double()


def other_weights() -> torch.Tensor:
    """What the winning side has come to; the padding is zero everywhere, always."""
    return LAYOUT.flatten({"w": torch.randn(20, 30), "b": torch.randn(30)})


@pytest.mark.parametrize("num_lost", [1, 2, 5])
def test_commits_of_the_losing_side_go_back_into_the_drift(num_lost: int) -> None:
    peer = Peer()
    said = []
    for number in range(5):
        peer.train(100)
        said.append(peer.commit(f"opening {number}"))
    peer.train(7)
    lost = [f"opening {number}" for number in range(5 - num_lost, 5)]
    assert set(lost) <= set(peer.ledger.recent())
    peer.ledger.adopt(peer.state(other_weights(), 10_000), absorbed=[], lost=lost)
    assert peer.ledger.pending_tokens == 7 + 100 * num_lost
    heard = sum(said[:5 - num_lost], torch.zeros(LAYOUT.numel, dtype=torch.float64))
    assert torch.allclose(peer.offers(), peer.learnt - heard, atol=5e-5), "nothing lost, nothing said twice"


def test_a_common_history_takes_nothing_back() -> None:
    peer = Peer()
    peer.train(100)
    said = peer.commit("opening")
    peer.ledger.adopt(peer.state(other_weights(), 10_000), absorbed=[], lost=[])
    assert peer.ledger.pending_tokens == 0
    assert torch.allclose(peer.offers(), peer.learnt - said, atol=5e-5)
    assert peer.ledger.recent() == {"opening": 1}, "but there may be a third side"


def test_it_remembers_a_bounded_number_of_commits() -> None:
    peer = Peer()
    for number in range(MAX_OWN + 5):
        peer.train(1)
        peer.commit(f"opening {number}")
    assert len(peer.ledger.recent()) == MAX_OWN
    assert f"opening {MAX_OWN + 4}" in peer.ledger.recent()


def test_what_the_others_committed_after_the_cut_is_not_offered_twice() -> None:
    """Cut off between pushing a contribution and its commit, a peer offers the same work again in its own history."""
    peer = Peer()
    peer.train(100)
    first = peer.ledger.contribute("theirs", 1)
    data = codec.encode(first.offered, LAYOUT.num_fine_blocks, BITS)
    said = codec.decode(data, LAYOUT.num_blocks, LAYOUT.num_fine_blocks, BITS)
    first.recall = lambda: said
    peer.train(30)
    peer.commit("mine 1")
    peer.train(30)
    peer.commit("mine 2")
    assert peer.ledger.outstanding()["theirs"] == 1, "remembered beyond its version"
    peer.train(7)
    peer.ledger.adopt(peer.state(other_weights(), 10_000), absorbed=["theirs"], lost=["mine 1", "mine 2"])
    assert peer.ledger.pending_tokens == 30 + 30 + 7
    assert torch.allclose(peer.offers(), peer.learnt - said.double(), atol=5e-5), "nothing lost, nothing said twice"
    assert peer.ledger.recent() == {"theirs": 1} and peer.ledger.outstanding() == {"mine 1": 1, "mine 2": 2}


def test_who_goes_from_one_history_to_another_and_back_offers_nothing_twice() -> None:
    """Found by scripts/faults.py: in the one that it came back to, its contributions were committed long ago."""
    peer = Peer()
    said = []
    for number in range(3):
        peer.train(100)
        said.append(peer.commit(f"one {number}"))
    peer.ledger.adopt(peer.state(other_weights(), 10_000), absorbed=[], lost=["one 1", "one 2"])
    assert peer.ledger.pending_tokens == 200 and set(peer.ledger.outstanding()) == {"one 1", "one 2"}
    peer.train(50)
    peer.commit("other")
    assert peer.ledger.pending_tokens == 0
    peer.train(7)
    peer.ledger.adopt(peer.state(other_weights(), 20_000), absorbed=["one 1", "one 2"], lost=["other"])
    assert peer.ledger.pending_tokens == 50 + 7, "of what it committed elsewhere, the rest"
    assert torch.allclose(peer.offers(), peer.learnt - sum(said), atol=1e-4)
    assert set(peer.ledger.recent()) == {"one 0", "one 1", "one 2"} and set(peer.ledger.outstanding()) == {"other"}


def test_it_may_come_back_by_the_commit_itself_and_take_that_back_too() -> None:
    peer = Peer()
    peer.train(100)
    first = peer.ledger.contribute("theirs", 2)
    data = codec.encode(first.offered, LAYOUT.num_fine_blocks, BITS)
    said = codec.decode(data, LAYOUT.num_blocks, LAYOUT.num_fine_blocks, BITS)
    first.recall = lambda: said
    peer.ledger.adopt(peer.state(other_weights(), 10_000), absorbed=[], lost=[])
    start = peer.ledger.state
    peer.train(10)
    for _ in range(2):
        peer.ledger.apply(peer.state(other_weights(), 100), "theirs", included=True)
        assert peer.ledger.pending_tokens == 10 and peer.ledger.recent() == {"theirs": 2}
        assert torch.allclose(peer.offers(), peer.learnt - said.double(), atol=1e-4)
        peer.ledger.take_back()
        assert peer.ledger.pending_tokens == 110 and peer.ledger.state is start
        assert peer.ledger.outstanding() == {"theirs": 2} and peer.ledger.recent() == {}


def test_a_passed_over_contribution_that_nobody_has_is_still_in_the_drift() -> None:
    peer = Peer()
    peer.train(100)
    first = peer.ledger.contribute("nobody's", 1)
    first.recall = lambda: torch.zeros(LAYOUT.numel)
    said = peer.commit("mine")
    peer.ledger.adopt(peer.state(other_weights(), 10_000), absorbed=[], lost=[])
    assert peer.ledger.pending_tokens == 0
    assert torch.allclose(peer.offers(), peer.learnt - said, atol=5e-5)


@pytest.mark.parametrize(("tokens", "digest", "wins"), [
    (101, "f" * 64, True), (99, "0" * 64, False), (100, "0" * 64, True), (100, "f" * 64, False),
])
def test_of_two_histories_all_prefer_the_same(tokens: int, digest: str, wins: bool) -> None:
    peer = Peer()
    state = peer.state(other_weights(), 100)
    assert outranks(tokens, digest, state) is wins
    assert not outranks(100, state.digest, state), "a head does not outrank itself"
