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

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from swarm.averaging.global_state import GlobalState
from swarm.averaging.layout import Layout
from swarm.averaging.packed import Packed
from swarm.host.keep import AMPLE, Keep
from swarm.model import working

BeforeWrite = Callable[[], None]
"""called before working weights are written to"""


class Drift:
    """What a `local` run learns: the distance between working and global weights."""

    def __init__(
        self, layout: Layout, parameters: Mapping[str, torch.nn.Parameter],
        before_write: BeforeWrite = lambda: None,
    ) -> None:
        self._layout, self._parameters, self._before_write = layout, parameters, before_write

    def learnt(self, global_weights: torch.Tensor) -> torch.Tensor:
        """The pseudo-gradient G - w, fp32 [numel] on the CPU."""
        working = self._layout.flatten(self._parameters)
        return torch.sub(global_weights, working, out=working)

    def move(self, old: torch.Tensor, new: torch.Tensor) -> None:
        before = dict(self._layout.views(old))
        self._add((name, values - before[name]) for name, values in self._layout.views(new))

    def absorb(self, values: torch.Tensor, tokens: int) -> None:
        self._add(self._layout.views(values))

    def release(self, values: torch.Tensor, tokens: int) -> None:
        self._add((name, -view) for name, view in self._layout.views(values))

    def _add(self, changes: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._before_write()
        with torch.no_grad():  # rounding of bfloat16 weights is drift, and so comes into the next round
            for name, values in changes:
                working.add(self._parameters[name], values)


class Gradients:
    """What a `sync` run learns: the sum of gradients, each times its tokens, since the last commit."""

    def __init__(
        self, layout: Layout, parameters: Mapping[str, torch.nn.Parameter],
        before_write: BeforeWrite = lambda: None,
    ) -> None:
        self._layout, self._parameters, self._before_write = layout, parameters, before_write
        self._sum = torch.zeros(layout.numel)
        self._tokens = 0

    def add(self, gradients: Mapping[str, torch.Tensor], tokens: int) -> None:
        """`gradients`: of the mean loss over `tokens`."""
        self._sum += self._layout.flatten(gradients) * tokens
        self._tokens += tokens

    def learnt(self, global_weights: torch.Tensor) -> torch.Tensor:
        return self._sum / max(1, self._tokens)

    def move(self, old: torch.Tensor, new: torch.Tensor) -> None:
        self._before_write()
        with torch.no_grad():
            for name, values in self._layout.views(new):
                self._parameters[name].copy_(values)

    def absorb(self, values: torch.Tensor, tokens: int) -> None:
        self._tokens -= tokens
        self._sum = self._sum - values * tokens if self._tokens else torch.zeros_like(self._sum)

    def release(self, values: torch.Tensor, tokens: int) -> None:
        self._tokens += tokens
        self._sum = self._sum + values * tokens


class Untrained:
    """Nothing: a spare copy follows its fragment's rounds, and there are no working weights."""

    def learnt(self, global_weights: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(global_weights)

    def move(self, old: torch.Tensor, new: torch.Tensor) -> None:
        pass

    def absorb(self, values: torch.Tensor, tokens: int) -> None:
        pass

    def release(self, values: torch.Tensor, tokens: int) -> None:
        pass


@dataclass
class Contribution:
    version: int
    """that its round makes"""
    tokens: int
    values: torch.Tensor = field(repr=False)
    """d, fp32 [numel]"""
    offered: torch.Tensor = field(repr=False)
    """d + feedback, fp32 [numel]: what is encoded; empty from then on"""
    lost: Packed | None = field(default=None, repr=False)
    """offered minus what the encoded bytes say; the next feedback, once this is in a commit"""
    recall: Callable[[], torch.Tensor] | None = field(default=None, repr=False)
    """decodes again what was sent, fp32 [numel]; the bytes are an eighth of the values"""


@dataclass(frozen=True)
class _Sent:
    """A contribution whose fate another history may see otherwise; kept for a while, in case the swarm goes on
    there."""

    opening_id: str
    version: int
    tokens: int
    recall: Callable[[], torch.Tensor]


def _sent(opening_id: str, contribution: Contribution) -> list[_Sent]:
    """None where it was not sent: nobody can have committed it."""
    recall = contribution.recall
    return [_Sent(opening_id, contribution.version, contribution.tokens, recall)] if recall is not None else []


@dataclass(frozen=True)
class _Applied:
    """How to take the newest commit back."""

    opening_id: str
    before: GlobalState
    contribution: Contribution | None
    feedback_before: Packed | None = field(repr=False)


class Ledger:
    def __init__(
        self, state: GlobalState, work: Drift | Gradients | Untrained, keep: Keep = AMPLE
    ) -> None:
        self.state = state
        self.pending_tokens = 0
        """trained here and in no commit yet"""
        self._work = work
        self._keep = keep
        self._feedback: Packed | None = None
        """None: nothing is lost"""
        self._contributions: dict[str, Contribution] = {}
        self._applied: _Applied | None = None
        kept = keep.own(state.weights.numel())
        self._absorbed: deque[_Sent] = deque(maxlen=kept)
        """in commits of our history"""
        self._passed_over: deque[_Sent] = deque(maxlen=kept)
        """to openings that came to nothing in our history; the others may have committed them after we were cut off"""

    @property
    def previous(self) -> GlobalState | None:
        return self._applied.before if self._applied else None

    def trained(self, tokens: int) -> None:
        self.pending_tokens += tokens

    def contribute(self, opening_id: str, version: int, *, max_tokens: int = 2**40) -> Contribution:
        """Take a copy of what is pending. Nothing changes until a commit says that it was absorbed. Tokens over
        `max_tokens`, the most that one contribution may claim, are claimed in the next."""
        values = self._work.learnt(self.state.weights)
        offered = values.clone() if self._feedback is None else self._feedback.read().add_(values)
        contribution = Contribution(version, min(self.pending_tokens, max_tokens), values, offered)
        self._contributions[opening_id] = contribution
        return contribution

    def withdraw(self, opening_id: str) -> None:
        """The contribution was never sent in full: nobody can commit it."""
        self._contributions.pop(opening_id, None)

    def apply(self, state: GlobalState, opening_id: str, *, included: bool) -> None:
        """Move on to `state`, made by the commit of `opening_id`; `included`: with this peer's contribution."""
        contribution = self._contribution_to(opening_id) if included else None
        applied = _Applied(opening_id, self.state, contribution, self._feedback)
        self._work.move(self.state.weights, state.weights)
        if contribution is not None:
            self._work.absorb(contribution.values, contribution.tokens)
            self.pending_tokens -= contribution.tokens
            if contribution.lost is not None:
                self._feedback = contribution.lost
            self._absorbed.extend(_sent(opening_id, contribution))
        self.state, self._applied = state, applied if self._keep.previous else None
        # openings of this version may still win over the applied commit, older ones only with a history of their own
        oldest = state.version if self._keep.previous else state.version + 1
        absorbed = {sent.opening_id for sent in self._absorbed}
        for key, other in list(self._contributions.items()):
            if other.version < oldest:
                del self._contributions[key]
                if key not in absorbed:
                    self._passed_over.extend(_sent(key, other))

    def _contribution_to(self, opening_id: str) -> Contribution | None:
        """Also to one that was passed over: a peer may come back to a history that it has left."""
        for old in [old for old in self._passed_over if old.opening_id == opening_id]:
            self._passed_over.remove(old)
            self._contributions[opening_id] = Contribution(
                old.version, old.tokens, old.recall(), torch.zeros(0), recall=old.recall
            )
        return self._contributions.get(opening_id)

    def take_back(self) -> None:
        """Undo the newest commit, because a better one of the same version has turned up."""
        applied = self._applied
        assert applied is not None, "there is one version to take back, once"
        if applied.contribution is not None:
            self._work.release(applied.contribution.values, applied.contribution.tokens)
            self.pending_tokens += applied.contribution.tokens
            if self._absorbed and self._absorbed[-1].opening_id == applied.opening_id:
                self._absorbed.pop()
        self._work.move(self.state.weights, applied.before.weights)
        self._feedback = applied.feedback_before
        self.state, self._applied = applied.before, None

    def adopt(self, state: GlobalState, *, absorbed: Sequence[str], lost: Sequence[str] = ()) -> None:
        """Move to a downloaded state, keep the drift. Of this peer's own openings, `absorbed`: of unknown fate, those
        that are in its history after all; `lost`: those that are in ours but not in its history (the swarm was parted,
        and the other side had trained more). What was lost goes back into the drift, and so into the next round."""
        if self._applied is not None and self._applied.opening_id in lost:
            self.take_back()  # the newest one can be undone exactly, its feedback too
        already = self._applied.contribution if self._applied else None
        self._work.move(self.state.weights, state.weights)
        newly, again = [], [old for old in self._absorbed if old.opening_id in lost]
        for opening_id in absorbed:
            contribution = self._contributions.get(opening_id)
            if contribution is not None and contribution is not already:
                self._work.absorb(contribution.values, contribution.tokens)
                self.pending_tokens -= contribution.tokens
                if contribution.lost is not None:
                    self._feedback = contribution.lost
                newly += _sent(opening_id, contribution)
        for old in self._passed_over:
            if old.opening_id in absorbed:
                self._work.absorb(old.recall(), old.tokens)
                self.pending_tokens -= old.tokens
                newly.append(old)
        for old in again:
            self._work.release(old.recall(), old.tokens)
            self.pending_tokens += old.tokens
        # the swarm may yet go on in a third history, or in the one that we leave
        settled = [*(old for old in self._absorbed if old not in again), *newly]
        names = {old.opening_id for old in settled}
        open_still = [*again, *(sent for item in self._contributions.items() for sent in _sent(*item))]
        passed_over = {old.opening_id: old for old in [*self._passed_over, *open_still] if old.opening_id not in names}
        self._contributions.clear()
        self._absorbed.clear()
        self._passed_over.clear()
        self._absorbed.extend(settled)
        self._passed_over.extend(passed_over.values())
        self.state, self._applied = state, None

    def recent(self) -> dict[str, int]:
        """Openings whose commits lately moved this peer: id -> version, those with a contribution of its own."""
        recent = {old.opening_id: old.version for old in self._absorbed}
        if self._applied is not None and self._applied.contribution is not None:
            recent[self._applied.opening_id] = self.state.version
        return recent

    def outstanding(self) -> dict[str, int]:
        """Openings that this peer contributed to and that may be in another history than its own: id -> version."""
        passed_over = {old.opening_id: old.version for old in self._passed_over}
        return passed_over | {key: contribution.version for key, contribution in self._contributions.items()}
