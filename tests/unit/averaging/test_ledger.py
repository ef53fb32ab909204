"""The books (I2): whatever happens, what a peer learnt is in exactly one commit of its history, or still in its drift.

A state machine plays one peer and compares with books kept in float64 beside it; the two are compared through the
public side only: what the peer would offer now.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarm.averaging.global_state import GlobalState, initial_state
from swarm.averaging.layout import Layout, layout_of
from swarm.averaging.ledger import Contribution, Drift, Gradients, Ledger
from swarm.averaging.packed import Packed
from swarm.host.keep import LITTLE, MAX_OWN
from swarm.model import working
from swarm.model.fragments import FragmentSpec, TensorSpec
from swarm.network import codec

LAYOUT = layout_of(FragmentSpec(0, (0, 1), (
    TensorSpec("bias", (10,), fine=True), TensorSpec("matrix", (20, 15), fine=False),
    TensorSpec("norm", (7,), fine=True),
)))
TOLERANCE = 2e-5
"""fp32 weights of about 1 that are moved a hundred times; what is learnt in one step is 50 times as much"""


def draw(seed: int, scale: float = 1.0) -> torch.Tensor:
    """Values where tensors lie, zero in the padding."""
    values = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(seed)) * scale
    used = torch.zeros(LAYOUT.numel)
    for _, view in LAYOUT.views(used):
        view.fill_(1.0)
    return values * used


def parameters_of(weights: torch.Tensor) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(values.clone()) for name, values in LAYOUT.views(weights)}


def learn(parameters: dict[str, torch.nn.Parameter], change: torch.Tensor) -> None:
    with torch.no_grad():
        for name, values in LAYOUT.views(change):
            parameters[name].add_(values)


@dataclass
class Offer:
    key: str
    contribution: Contribution
    base: str
    said: torch.Tensor
    """what the encoded bytes say, float64 [numel]"""
    before: list[str]
    """the history at that moment: the openings in it"""


class OnePeer(RuleBasedStateMachine):
    """`local` mode with four bits. History is a list of what each commit of it has absorbed of this peer's work."""

    @initialize()
    def begin(self) -> None:
        self.ids, self.seeds = itertools.count(), itertools.count(1)
        state = initial_state(0, draw(0), 1)
        self.parameters = parameters_of(state.weights)
        self.work = self.make_work()
        self.ledger = Ledger(state, self.work)
        self.learnt = torch.zeros(LAYOUT.numel, dtype=torch.float64)
        self.trained = 0
        self.offers: dict[str, Offer] = {}
        self.history: list[Offer | None] = []
        self.rounding = torch.zeros(LAYOUT.numel, dtype=torch.float64)
        self.newest: tuple[Offer | None, GlobalState] | None = None  # of the commit that can be taken back

    def make_work(self) -> Drift | Gradients:
        return Drift(LAYOUT, self.parameters)

    def next_state(self, base: GlobalState, *, versions: int = 1) -> GlobalState:
        return GlobalState(
            0, base.version + versions, base.tokens + 1000, base.weights + draw(next(self.seeds), 3e-3), base.buffers
        )

    def usable(self, base: GlobalState) -> list[str]:
        """Openings that a commit on `base` can name."""
        return [key for key, offer in self.offers.items() if offer.base == base.digest]

    @rule(tokens=st.integers(1, 500))
    def train_some(self, tokens: int) -> None:
        self.train(tokens)

    def train(self, tokens: int) -> None:
        change = draw(next(self.seeds), 1e-3)
        learn(self.parameters, change)
        self.learnt -= change.double()  # as a pseudo-gradient
        self.ledger.trained(tokens)
        self.trained += tokens

    @rule(tokens=st.integers(0, 500))
    def contribute_some(self, tokens: int) -> None:
        self.contribute(tokens)

    def contribute(self, tokens: int) -> None:
        if tokens:
            self.train(tokens)
        key = f"opening-{next(self.ids)}"
        contribution = self.ledger.contribute(key, self.ledger.state.version + 1)
        said = codec.decode(codec.encode(contribution.offered, 1, self.bits), 3, 1, self.bits)
        contribution.lost = Packed.of(contribution.offered - said)
        contribution.recall = lambda: said
        self.offers[key] = Offer(key, contribution, self.ledger.state.digest, said.double(), self.keys())

    bits = 4

    @precondition(lambda self: self.usable(self.ledger.state))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.usable(self.ledger.state)))
        self.ledger.withdraw(key)
        del self.offers[key]

    @precondition(lambda self: self.usable(self.ledger.state))
    @rule(data=st.data())
    def commit_with_it(self, data: st.DataObject) -> None:
        self.commit(data.draw(st.sampled_from(self.usable(self.ledger.state))), included=True)

    @rule(count=st.integers(2, 4), tokens=st.integers(1, 500))
    def some_rounds(self, count: int, tokens: int) -> None:
        for _ in range(count):
            self.contribute(tokens)
            self.commit(next(reversed(self.offers)), included=True)

    @rule(data=st.data())
    def commit_without_it(self, data: st.DataObject) -> None:
        """An opening that it was in, but too late, or one that it never heard of."""
        self.commit(data.draw(st.sampled_from([*self.usable(self.ledger.state), "unheard of"])), included=False)

    def commit(self, key: str, *, included: bool) -> None:
        before = self.ledger.state
        self.ledger.apply(self.next_state(before), key, included=included)
        absorbed = self.offers[key] if included else None
        self.history.append(absorbed)
        self.newest = absorbed, before

    @precondition(lambda self: self.newest is not None)
    @rule(data=st.data(), included=st.booleans())
    def a_better_commit_replaces_the_newest(self, data: st.DataObject, included: bool) -> None:
        assert self.newest is not None
        _, before = self.newest
        assert self.ledger.previous is before
        self.ledger.take_back()
        assert self.ledger.previous is None and self.ledger.state is before
        self.history.pop()
        self.newest = None
        self.the_books_balance()
        keys = self.usable(before) if included else []
        self.commit(data.draw(st.sampled_from(keys)) if keys else "other", included=bool(keys))

    @rule(data=st.data(), with_it=st.booleans())
    def adopt(self, data: st.DataObject, with_it: bool) -> None:
        """A download, some versions ahead on the same history; what it absorbed may be known."""
        keys = self.usable(self.ledger.state) if with_it else []
        absorbed = [data.draw(st.sampled_from(keys))] if keys else []
        self.ledger.adopt(self.next_state(self.ledger.state, versions=3), absorbed=absorbed)
        self.history += [self.offers[key] for key in absorbed]
        self.jumped()

    def left_behind(self) -> list[str]:
        """Openings that were passed over, and may be in a history that has parted from this one when they were made."""
        keys = self.keys()
        passed_over = [self.offers[sent.opening_id] for sent in self.ledger._passed_over]
        return [offer.key for offer in passed_over if keys[:len(offer.before)] == offer.before]

    def keys(self) -> list[str]:
        return [offer.key if offer is not None else "" for offer in self.history]

    @precondition(lambda self: self.left_behind())
    @rule(data=st.data())
    def come_back_to_a_history_that_was_left(self, data: st.DataObject) -> None:
        """It has a contribution that this one passed over, and nothing of what came here since."""
        offer = self.offers[data.draw(st.sampled_from(self.left_behind()))]
        gone = [other for other in self.history[len(offer.before):] if other is not None]
        newest = self.newest[0] if self.newest is not None else None
        self.ledger.adopt(
            self.next_state(self.ledger.state, versions=5), absorbed=[offer.key], lost=[other.key for other in gone]
        )
        for other in gone:
            if other is not newest:
                self.rounding += other.contribution.values.double() - other.said
        self.rounding -= offer.contribution.values.double() - offer.said
        self.history[len(offer.before):] = [offer]
        self.jumped()

    @precondition(lambda self: self.newest is not None)
    @rule(data=st.data(), with_it=st.booleans())
    def adopt_a_history_without_the_newest(self, data: st.DataObject, with_it: bool) -> None:
        """The head with more tokens wins; the loser's progress re-enters as an ordinary contribution."""
        assert self.newest is not None
        _, before = self.newest
        keys = self.usable(before) if with_it else []
        absorbed = [data.draw(st.sampled_from(keys))] if keys else []
        newest = self.history.pop()
        lost = [newest.key] if newest else []
        self.ledger.adopt(self.next_state(self.ledger.state, versions=2), absorbed=absorbed, lost=lost)
        self.history += [self.offers[key] for key in absorbed]
        self.jumped()

    @precondition(lambda self: len(self.history) > 0)
    @rule(data=st.data())
    def adopt_a_history_that_parted_long_ago(self, data: st.DataObject) -> None:
        """What older commits had absorbed comes back as what others had heard of it: only the bytes are kept."""
        parted_at = data.draw(st.integers(0, len(self.history) - 1))
        gone = [offer for offer in self.history[parted_at:] if offer is not None]
        newest = self.newest[0] if self.newest is not None else None
        self.ledger.adopt(
            self.next_state(self.ledger.state, versions=5), absorbed=[], lost=[offer.key for offer in gone]
        )
        for offer in gone:
            if offer is not newest:
                self.rounding += offer.contribution.values.double() - offer.said
        del self.history[parted_at:]
        self.jumped()

    @precondition(lambda self: self.newest is not None and self.newest[0] is not None)
    @rule()
    def adopt_what_names_a_commit_that_was_applied_meanwhile(self) -> None:
        """Between asking what a donor's history absorbed and jumping to it, the same commit may have arrived here."""
        assert self.newest is not None and self.newest[0] is not None
        key = self.newest[0].key
        self.ledger.adopt(self.next_state(self.ledger.state, versions=2), absorbed=[key], lost=["unheard of"])
        self.jumped()

    def jumped(self) -> None:
        self.newest = None
        assert self.ledger.previous is None and not self.ledger._contributions

    @invariant()
    def the_books_balance(self) -> None:
        absorbed = [offer for offer in self.history if offer is not None]
        pending = self.trained - sum(offer.contribution.tokens for offer in absorbed)
        assert self.ledger.pending_tokens == pending >= 0
        recent = [offer.key for offer in absorbed]
        assert sorted(self.ledger.recent()) == sorted(recent[-MAX_OWN:])
        if len(self.offers) < MAX_OWN:
            assert set(self.offers) - set(recent) <= self.ledger.outstanding().keys(), "it may be in another history"
        probe = self.ledger.contribute("probe", self.ledger.state.version + 1)
        self.ledger.withdraw("probe")
        assert probe.tokens == pending
        self.values_balance(probe, absorbed)

    def values_balance(self, probe: Contribution, absorbed: list[Offer]) -> None:
        drift = self.learnt - sum(offer.contribution.values.double() for offer in absorbed) - self.rounding
        assert torch.allclose(probe.values.double(), drift, atol=TOLERANCE), "the drift is what no commit has absorbed"
        assert torch.allclose(
            LAYOUT.flatten(self.parameters).double(), self.ledger.state.weights.double() - drift, atol=TOLERANCE
        )
        heard = sum(offer.said for offer in absorbed)
        assert torch.allclose(probe.offered.double(), self.learnt - heard, atol=TOLERANCE), (
            "what was learnt is what others have heard plus what is still to be said: feedback is charged once"
        )


class OneSyncPeer(OnePeer):
    """`sync` mode: gradients times tokens, in fp32; working weights are always the global ones."""

    bits = 32

    def make_work(self) -> Drift | Gradients:
        return Gradients(LAYOUT, self.parameters)

    def train(self, tokens: int) -> None:
        gradient = draw(next(self.seeds), 1e-2)
        assert isinstance(self.work, Gradients)
        self.work.add(dict(LAYOUT.views(gradient)), tokens)
        self.learnt += gradient.double() * tokens
        self.ledger.trained(tokens)
        self.trained += tokens

    def values_balance(self, probe: Contribution, absorbed: list[Offer]) -> None:
        left = self.learnt - sum(o.contribution.values.double() * o.contribution.tokens for o in absorbed)
        assert torch.allclose(probe.values.double() * probe.tokens, left, atol=1e-3, rtol=1e-4)
        assert torch.equal(probe.values, probe.offered)
        assert torch.equal(LAYOUT.flatten(self.parameters), self.ledger.state.weights)


machine = settings(max_examples=100, stateful_step_count=30, derandomize=True, deadline=None)
TestOnePeer = OnePeer.TestCase
TestOnePeer.settings = machine
TestOneSyncPeer = OneSyncPeer.TestCase
TestOneSyncPeer.settings = settings(machine, max_examples=50)


@pytest.fixture
def peer(layout: Layout) -> tuple[Ledger, dict[str, torch.nn.Parameter]]:
    state = initial_state(0, draw(0), 1)
    parameters = parameters_of(state.weights)
    return Ledger(state, Drift(layout, parameters)), parameters


def test_weights_after_a_commit_keep_what_was_learnt_meanwhile(
    peer: tuple[Ledger, dict[str, torch.nn.Parameter]]
) -> None:
    """DESIGN 8: w += (G' - G) + (d if included else 0)."""
    for included in (True, False):
        ledger, parameters = peer
        old = ledger.state
        base = LAYOUT.flatten(parameters)
        learn(parameters, draw(1, 0.1))
        ledger.trained(10)
        contribution = ledger.contribute("a", old.version + 1)
        learn(parameters, draw(2, 0.1))
        ledger.trained(5)
        before = LAYOUT.flatten(parameters)
        new = replace(old, version=old.version + 1, weights=old.weights + draw(3))
        ledger.apply(new, "a", included=included)
        expected = before + (new.weights - old.weights) + (contribution.values if included else 0)
        assert torch.allclose(LAYOUT.flatten(parameters), expected, atol=1e-6)
        if included:
            left = base - old.weights + draw(2, 0.1)
            assert torch.allclose(LAYOUT.flatten(parameters), new.weights + left, atol=1e-6)


def test_contributing_changes_nothing(peer: tuple[Ledger, dict[str, torch.nn.Parameter]]) -> None:
    ledger, parameters = peer
    learn(parameters, draw(1))
    ledger.trained(7)
    before, state = LAYOUT.flatten(parameters), ledger.state
    contribution = ledger.contribute("a", 1)
    assert ledger.outstanding() == {"a": 1}
    assert torch.equal(LAYOUT.flatten(parameters), before) and ledger.state is state and ledger.pending_tokens == 7
    learn(parameters, draw(2))
    assert torch.allclose(contribution.values, -draw(1), atol=1e-6), "a copy, not a view"


def test_a_commit_with_an_opening_this_process_never_saw(peer: tuple[Ledger, dict[str, torch.nn.Parameter]]) -> None:
    """After a restart: the commit names this peer, whose drift went with the old process. Nothing is absorbed."""
    ledger, parameters = peer
    learn(parameters, draw(1))
    ledger.trained(7)
    ledger.apply(replace(ledger.state, version=1, weights=ledger.state.weights + draw(2)), "before", included=True)
    assert ledger.pending_tokens == 7
    assert torch.allclose(LAYOUT.flatten(parameters), draw(0) + draw(1) + draw(2), atol=1e-5)


def test_settled_openings_are_let_go(peer: tuple[Ledger, dict[str, torch.nn.Parameter]]) -> None:
    """Each holds three copies of the fragment: they must not pile up."""
    ledger, _ = peer
    for version in range(1, 6):
        ledger.trained(1)
        for attempt in range(3):
            ledger.contribute(f"{version}/{attempt}", version)
        ledger.apply(replace(ledger.state, version=version, tokens=version), f"{version}/1", included=True)
        assert set(ledger.outstanding()) == {f"{version}/{attempt}" for attempt in range(3)}, "a better one may come"
    assert ledger.pending_tokens == 0


def test_only_one_commit_can_be_taken_back(peer: tuple[Ledger, dict[str, torch.nn.Parameter]]) -> None:
    ledger, _ = peer
    with pytest.raises(AssertionError):
        ledger.take_back()
    ledger.apply(replace(ledger.state, version=1), "a", included=False)
    ledger.take_back()
    with pytest.raises(AssertionError):
        ledger.take_back()


def test_half_precision_working_weights(layout: Layout) -> None:
    """A GPU may train in bfloat16: global weights stay fp32, and moving does not fail."""
    state = initial_state(0, draw(0), 1)
    parameters = {name: torch.nn.Parameter(v.bfloat16()) for name, v in layout.views(state.weights)}
    ledger = Ledger(state, Drift(layout, parameters))
    ledger.trained(3)
    contribution = ledger.contribute("a", 1)
    assert contribution.values.dtype == torch.float32 and float(contribution.values.abs().max()) < 0.02
    ledger.apply(replace(state, version=1, weights=state.weights + draw(1)), "a", included=True)
    assert torch.allclose(layout.flatten(parameters), draw(0) + draw(1), atol=0.06)
    assert ledger.state.weights.dtype == torch.float32


@pytest.mark.parametrize("halved", [False, True])
def test_what_rounding_bfloat16_loses_stays_in_the_drift(layout: Layout, halved: bool) -> None:
    """With 8 further bits: what was learnt comes out of the drift, and after a commit nothing is left that was not
    there. Nobody learns the rounding error of a start."""
    state = initial_state(0, draw(0), 1)
    parameters = {name: torch.nn.Parameter(v.clone()) for name, v in layout.views(state.weights)}
    if halved:
        working.halve(parameters.values())
    ledger = Ledger(state, Drift(layout, parameters))
    limit = 2.0**-15 * state.weights.abs() + 1e-7 if halved else torch.full_like(state.weights, 1e-6)
    assert (ledger.contribute("start", 1).values.abs() <= limit).all()
    change = draw(1, 1e-3)
    for name, values in layout.views(change):
        working.add(parameters[name], values)
    ledger.trained(5)
    contribution = ledger.contribute("a", 1)
    assert ((contribution.values + change).abs() <= 2 * limit).all()
    new = replace(state, version=1, weights=state.weights + draw(2, 1e-3))
    ledger.apply(new, "a", included=True)
    left = ledger.contribute("b", 2).values
    assert (left.abs() <= 3 * limit).all(), "the part of the move that was rounded away, for the next round"
    moved = layout.flatten(parameters)
    assert ((moved + left - new.weights).abs() <= 1e-6).all(), "no more and no less than the distance"


def test_who_writes_says_so_before(layout: Layout) -> None:
    state = initial_state(0, draw(0), 1)
    parameters = {name: torch.nn.Parameter(v.clone()) for name, v in layout.views(state.weights)}
    seen: list[torch.Tensor] = []
    work = Drift(layout, parameters, lambda: seen.append(layout.flatten(parameters)))
    ledger = Ledger(state, work)
    ledger.trained(1)
    ledger.contribute("a", 1)
    assert not seen, "to contribute is to read"
    ledger.apply(replace(state, version=1, weights=draw(3)), "a", included=False)
    assert len(seen) == 1 and torch.equal(seen[0], state.weights)
    assert not torch.equal(layout.flatten(parameters), seen[0])
    sync: list[int] = []
    gradients = Ledger(state, Gradients(layout, parameters, lambda: sync.append(1)))
    gradients.apply(replace(state, version=1, weights=draw(3)), "a", included=False)
    assert sync == [1]


def test_with_little_memory_nothing_of_the_last_version_is_kept(layout: Layout) -> None:
    state = initial_state(0, draw(0), 1)
    parameters = {name: torch.nn.Parameter(v.clone()) for name, v in layout.views(state.weights)}
    ledger = Ledger(state, Drift(layout, parameters), LITTLE)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.01)
    ledger.trained(4)
    contribution = ledger.contribute("a", 1)
    used = (draw(0) != 0).float()
    said = contribution.offered + 0.001 * used
    contribution.lost, contribution.recall = Packed.of(contribution.offered - said), lambda: said
    ledger.apply(replace(state, version=1, weights=draw(0) + 0.005 * used), "a", included=True)
    assert ledger.previous is None and not ledger._contributions
    assert ledger.pending_tokens == 0 and ledger.recent() == {"a": 1}
    drift = ledger.contribute("probe", 2)
    assert drift.values.abs().max() < 1e-5 and (drift.offered + 0.001 * used).abs().max() < 1e-5
    ledger.withdraw("probe")
    # the swarm goes on from a history without it: what was sent is back in the drift, and so is what was not said
    ledger.adopt(replace(state, version=2, weights=draw(5)), absorbed=[], lost=["a"])
    again = ledger.contribute("b", 3)
    assert ledger.pending_tokens == 4
    assert (again.offered + 0.01 * used).abs().max() < 2e-5
