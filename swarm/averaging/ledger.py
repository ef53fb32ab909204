"""The books of one fragment at one peer: what it has learnt, what it has offered, what a commit has absorbed (I2).

With G the global weights, w the working weights, s the working weights when the peer contributed and d = G - s:

    contribute    offer d + feedback, remember (d, what quantising lost, tokens) under the opening's id
    commit        w += (G' - G) + (d if this peer is among the contributors, else 0)

Whatever a commit did not absorb is thus still in w - G: the drift is what is left, not something to restore. A commit
can be replaced by a better one of the same version; then the same lines are read backwards first. `sync` runs offer
the mean gradient since the last commit instead, and their working weights are the global ones.

All methods that touch working weights run between two microbatches of the training thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from swarm.averaging.global_state import GlobalState
from swarm.averaging.layout import Layout


class Drift:
    """What a `local` run learns: the distance between working and global weights."""

    def __init__(self, layout: Layout, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._layout, self._parameters = layout, parameters

    def learnt(self, global_weights: torch.Tensor) -> torch.Tensor:
        """The pseudo-gradient G - w, fp32 [numel] on the CPU."""
        return global_weights - self._layout.flatten(self._parameters)

    def move(self, old: torch.Tensor, new: torch.Tensor) -> None:
        self._add(new - old)

    def absorb(self, values: torch.Tensor, tokens: int) -> None:
        self._add(values)

    def release(self, values: torch.Tensor, tokens: int) -> None:
        self._add(-values)

    def _add(self, change: torch.Tensor) -> None:
        with torch.no_grad():
            for name, values in self._layout.views(change):
                parameter = self._parameters[name]
                parameter.add_(values.to(parameter.device, parameter.dtype))


class Gradients:
    """What a `sync` run learns: the sum of gradients, each times its tokens, since the last commit."""

    def __init__(self, layout: Layout, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._layout, self._parameters = layout, parameters
        self._sum = torch.zeros(layout.numel)
        self._tokens = 0

    def add(self, gradients: Mapping[str, torch.Tensor], tokens: int) -> None:
        """`gradients`: of the mean loss over `tokens`."""
        self._sum += self._layout.flatten(gradients) * tokens
        self._tokens += tokens

    def learnt(self, global_weights: torch.Tensor) -> torch.Tensor:
        return self._sum / max(1, self._tokens)

    def move(self, old: torch.Tensor, new: torch.Tensor) -> None:
        with torch.no_grad():
            for name, values in self._layout.views(new):
                self._parameters[name].copy_(values)

    def absorb(self, values: torch.Tensor, tokens: int) -> None:
        self._tokens -= tokens
        self._sum = self._sum - values * tokens if self._tokens else torch.zeros_like(self._sum)

    def release(self, values: torch.Tensor, tokens: int) -> None:
        self._tokens += tokens
        self._sum = self._sum + values * tokens


@dataclass
class Contribution:
    version: int
    """that its round makes"""
    tokens: int
    values: torch.Tensor = field(repr=False)
    """d, fp32 [numel]"""
    offered: torch.Tensor = field(repr=False)
    """d + feedback, fp32 [numel]: what is encoded"""
    lost: torch.Tensor | None = field(default=None, repr=False)
    """offered minus what the encoded bytes say; the next feedback, once this is in a commit"""


@dataclass(frozen=True)
class _Applied:
    """How to take the newest commit back."""

    before: GlobalState
    contribution: Contribution | None
    feedback_before: torch.Tensor = field(repr=False)


class Ledger:
    def __init__(self, state: GlobalState, work: Drift | Gradients) -> None:
        self.state = state
        self.pending_tokens = 0
        """trained here and in no commit yet"""
        self._work = work
        self._feedback = torch.zeros_like(state.weights)
        self._contributions: dict[str, Contribution] = {}
        self._applied: _Applied | None = None

    @property
    def previous(self) -> GlobalState | None:
        return self._applied.before if self._applied else None

    def trained(self, tokens: int) -> None:
        self.pending_tokens += tokens

    def contribute(self, opening_id: str, version: int) -> Contribution:
        """Take a copy of what is pending. Nothing changes until a commit says that it was absorbed."""
        values = self._work.learnt(self.state.weights)
        contribution = Contribution(version, self.pending_tokens, values, values + self._feedback)
        self._contributions[opening_id] = contribution
        return contribution

    def withdraw(self, opening_id: str) -> None:
        """The contribution was never sent in full: nobody can commit it."""
        self._contributions.pop(opening_id, None)

    def apply(self, state: GlobalState, opening_id: str, *, included: bool) -> None:
        """Move on to `state`, made by the commit of `opening_id`; `included`: with this peer's contribution."""
        contribution = self._contributions.get(opening_id) if included else None
        applied = _Applied(self.state, contribution, self._feedback)
        self._work.move(self.state.weights, state.weights)
        if contribution is not None:
            self._work.absorb(contribution.values, contribution.tokens)
            self.pending_tokens -= contribution.tokens
            if contribution.lost is not None:
                self._feedback = contribution.lost
        self.state, self._applied = state, applied
        # openings of this version may still win over the applied commit; older ones are settled for good
        self._contributions = {
            key: other for key, other in self._contributions.items() if other.version >= state.version
        }

    def take_back(self) -> None:
        """Undo the newest commit, because a better one of the same version has turned up."""
        applied = self._applied
        assert applied is not None, "there is one version to take back, once"
        if applied.contribution is not None:
            self._work.release(applied.contribution.values, applied.contribution.tokens)
            self.pending_tokens += applied.contribution.tokens
        self._work.move(self.state.weights, applied.before.weights)
        self._feedback = applied.feedback_before
        self.state, self._applied = applied.before, None

    def adopt(self, state: GlobalState, *, absorbed: list[str], abandoned: str | None = None) -> None:
        """Jump to a downloaded state, keeping the drift. `absorbed`: own openings known to be in its history;
        `abandoned`: digest of a version known not to be, so that what its commit absorbed here is drift again."""
        if self._applied is not None and self.state.digest == abandoned:
            self.take_back()
        already = self._applied.contribution if self._applied else None
        self._work.move(self.state.weights, state.weights)
        for opening_id in absorbed:
            contribution = self._contributions.pop(opening_id, None)
            if contribution is not None and contribution is not already:
                self._work.absorb(contribution.values, contribution.tokens)
                self.pending_tokens -= contribution.tokens
                if contribution.lost is not None:
                    self._feedback = contribution.lost
        self._contributions.clear()
        self.state, self._applied = state, None

    def outstanding(self) -> dict[str, int]:
        """Openings that this peer contributed to and that may be in another history than its own: id -> version."""
        return {key: contribution.version for key, contribution in self._contributions.items()}
