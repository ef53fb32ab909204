"""What an owner of parts makes of its contributors: whose tokens it believes (pace.py), how much of what they have
learnt (robust.py), and what people should hear of it. Each thing is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from swarm.averaging import plan, robust
from swarm.averaging.messages import Commit
from swarm.averaging.pace import Paces
from swarm.averaging.robust import MIN_FOR_DIRECTION, Verdict
from swarm.config import AveragingConfig
from swarm.events import Event, Warning

LITTLE = 0.5
"""less of a contribution than this is worth a line in the log"""

log = logging.getLogger(__name__)


class Trust:
    """Of one fragment at one peer."""

    def __init__(self, averaging: AveragingConfig, *, fragment: int, emit: Callable[[Event], None]) -> None:
        self._fragment, self._emit = fragment, emit
        self._averaging = averaging
        self._doubts = averaging.robust and averaging.mode == "local"
        self._paces = Paces()
        self._said: set[str] = set()

    def believed(self, tokens: Mapping[str, int], *, version: int) -> dict[str, int]:
        """Of the tokens that each contributor to the round to `version` claims."""
        return self._paces.believed(tokens, version=version) if self._doubts else dict(tokens)

    def judge(
        self, contributions: Mapping[str, torch.Tensor], believed: Mapping[str, int], warmth: Mapping[str, float]
    ) -> Verdict:
        """How far each is believed; touches nothing, so that it may run in another thread. `warmth`: see
        `plan.weights`."""
        return robust.judge_for(self._averaging, contributions, believed, plan.weights(believed, warmth))

    def say(self, verdict: Verdict) -> None:
        """What is remarkable about it, to people: a warning of who is left out, a line in the log of the rest."""
        if self._doubts and len(verdict.kept) < MIN_FOR_DIRECTION:
            self._say_why_not(len(verdict.kept))
        for peer_id, kept in verdict.kept.items():
            if peer_id in verdict.too_large and self._is_news(f"left out {peer_id}"):
                self._emit(Warning(
                    f"what {peer_id[-6:]} contributes to fragment {self._fragment} is out of all proportion and is left"
                    " out; if it is yours, look at its loss and restart it"
                ))
            elif kept < LITTLE and peer_id not in verdict.too_large and self._is_news(f"cut down {peer_id}"):
                log.info(
                    "fragment %d: of what %s contributes only %.0f %% counts: the others have learnt something else",
                    self._fragment, peer_id[-6:], 100 * kept,
                )

    def settled(self, commit: Commit) -> None:
        """A commit was applied."""
        members = commit.opening.members
        tokens = {members[contributor.member]: contributor.tokens for contributor in commit.contributors}
        self._paces.saw(tokens, version=commit.opening.version)

    def _say_why_not(self, contributors: int) -> None:
        if contributors == MIN_FOR_DIRECTION - 1 and self._is_news("three"):
            log.info("fragment %d: three contributors: sizes are held against each other, directions not (that takes"
                     " four)", self._fragment)
        elif contributors == 2 and self._is_news("two"):
            log.info("fragment %d: two contributors: neither can be held against the other, and each is believed",
                     self._fragment)

    def _is_news(self, words: str) -> bool:
        if words in self._said or len(self._said) > 4 * plan.MAX_MEMBERS:
            return False
        self._said.add(words)
        return True
