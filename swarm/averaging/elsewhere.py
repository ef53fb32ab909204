"""How far the swarm is with the fragments that this peer does not hold, by the word of those who do.

Tokens are counted by fragment. The learning rate and the end of a run follow the fragment that has fewest, so a peer
that holds only some of them must hear of the others. One holder's word is not enough where there are two: it could end
everybody's run (I4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from swarm.network.records import Status


def said_tokens(statuses: Iterable[Status]) -> dict[int, int]:
    """Fragment -> tokens in committed rounds that two holders of it say to have reached, or the only one. What nobody
    holds is left out."""
    said: dict[int, list[int]] = {}
    for status in statuses:
        for fragment, head in status.held().items():
            said[fragment] = sorted([head.tokens, *said.get(fragment, [])])[-2:]
    return {fragment: tokens[0] for fragment, tokens in sorted(said.items())}


class Elsewhere:
    """Remembers what was said of fragments whose holders are all gone for now: the run has not gone back to its start.
    Read from any thread."""

    def __init__(self, num_fragments: int) -> None:
        self._num_fragments = num_fragments
        self._tokens: dict[int, int] = {}

    def heard(self, statuses: Iterable[Status]) -> None:
        """`statuses`: of everybody else who is alive."""
        said = said_tokens(statuses)
        known = {fragment: tokens for fragment, tokens in said.items() if fragment < self._num_fragments}
        self._tokens = {**self._tokens, **known}

    def let_go(self, fragment: int, tokens: int) -> None:
        """This peer has held it until now."""
        self._tokens = {**self._tokens, fragment: tokens}

    def swarm_tokens(self, own: Mapping[int, int]) -> int:
        """Tokens of the fragment that has fewest, of those that anybody has spoken of. `own`: fragment -> tokens of
        those that this peer holds, for which its own books count."""
        return min({**self._tokens, **own}.values(), default=0)
