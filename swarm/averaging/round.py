"""The round protocol of one fragment: how its holders make version v + 1 out of version v (DESIGN 8).

    opener                     members                          owners of parts
    open ------------------->  copy the drift, encode
         <-- tokens
                               push part by part ------------->  check, keep; once all members have spoken of a
                                                                 part: weigh, add up, quantise once
         <------------------------------------------------------ result bytes and their signed hash, to all members
    commit (signed) -------->  apply the outer step to the result bytes, which are here by now

Four legs of the network where nobody fails. Where somebody stays silent or has died, the opener names who is left and
asks the owners for a result of just those (`reduce`). All parts or nothing: a contribution is in a commit only if every
owner has all of it, so it is in exactly one round or still in its peer's drift (I2). If an owner fails, the opener
tries again without it; if the opener fails, the next in rank opens. Every wait has a deadline from recent rounds (I3).
Training goes on through all of this.
"""

from __future__ import annotations

from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.member import Member
from swarm.averaging.messages import Commit
from swarm.averaging.opener import Opener


class FragmentRounds:
    """Rounds of one fragment at one peer: it is a member of all, opens some, and owns parts in most."""

    def __init__(self, context: Context, applier: Applier) -> None:
        self.member = Member(context, applier)
        self.opener = Opener(context, applier, self.member)
        self.member.on_opening, self.member.on_result = self.opener.give_way, self.opener.heard

    def settled(self, commit: Commit) -> None:
        """A commit was applied: end a round that it has overtaken."""
        self.opener.give_way(commit.opening.id)
        self.member.settled(commit)
