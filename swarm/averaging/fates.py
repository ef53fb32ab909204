"""What has become of a peer's own contributions in a history that it is about to move over to (I2).

The swarm was parted, or this peer missed some commits and what led to them is gone. It has the new history's head, and
walks back from there, commit by commit, until it comes to a digest of its own past: what is older is common to both.
On the way it sees which of its openings are in the new history. Of those that it thought settled, all others are lost
there, and must go into the drift again.

Whoever has been level with that history all the time can tell, be it a donor of the state or not; whoever has only
downloaded it cannot. Where everybody says that they cannot, what is left is taken to be common: better not counted than
counted twice. Where somebody did not answer, it is asked again for a while: a guess would lose tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from swarm.averaging.apply import Applier
from swarm.averaging.attestation import ASK_S
from swarm.averaging.context import Context
from swarm.averaging.messages import Commit
from swarm.averaging.results import COMMITS_AT_ONCE, Fates
from swarm.errors import BadMessage, NetworkError, PeerRefused, StateError
from swarm.network.records import Head


async def fates_in(
    context: Context, applier: Applier, head: Head, *, donors: Sequence[str], patient: bool = True
) -> Fates:
    """In the history that leads to `head`, which `donors` know. Raises StateError where somebody who may know did not
    answer; not `patient`: then that is taken for an answer."""
    outstanding, recent = applier.ledger.outstanding(), applier.ledger.recent()
    needed = [version for version in {*outstanding.values(), *recent.values()} if version <= head.version]
    commits: dict[int, Commit] = {}
    version, digest, can_tell = head.version, head.digest, True
    while can_tell and version >= min(needed, default=head.version + 1) and not applier.history.passes(version, digest):
        if version not in commits:
            here = Head(version=version, digest=digest, tokens=head.tokens)
            found = await _leading_to(context, applier, here, donors=donors, patient=patient)
            commits |= {commit.opening.version: commit for commit in found}
            can_tell = bool(found)
        if can_tell:
            version, digest = version - 1, commits[version].opening.base
    me = context.keypair.peer_id

    def has(opening_id: str, version: int) -> bool:
        commit = commits.get(version)
        return commit is not None and commit.opening.id == opening_id and commit.includes(me)

    return Fates(
        known=frozenset(recent),
        absorbed=tuple(key for key, made in outstanding.items() if made > version and has(key, made)),
        lost=tuple(key for key, made in recent.items() if made > version and not has(key, made)),
        common=version if applier.history.passes(version, digest) else None,
        commits=tuple(commits[number] for number in sorted(commits) if number > version),
    )


async def _leading_to(
    context: Context, applier: Applier, head: Head, *, donors: Sequence[str], patient: bool
) -> list[Commit]:
    """Commits of somebody's history, the last one the one that made `head`; empty: nobody has it any more. Raises
    StateError."""
    statuses = context.directory.alive()
    others = [peer_id for peer_id, status in statuses.items() if status.head(applier.fragment) is not None]
    silent = []
    for peer_id in dict.fromkeys([*donors, *others]):
        try:
            for since in (max(0, head.version - COMMITS_AT_ONCE), head.version - 1):  # many at once, or what there is
                found = [c for c in await applier.commits_of(peer_id, since=since) if c.opening.version <= head.version]
                if found and found[-1].opening.version == head.version:
                    asked = {"fragment": applier.fragment, "version": head.version, "digest": head.digest}
                    if (await context.ask(peer_id, "knows", asked, deadline_s=ASK_S)).get("known") is True:
                        return found
                    break  # its version of that number is another one
        except (PeerRefused, BadMessage):
            continue  # it does not hold the fragment, or is joining, or talks nonsense: more of that is no answer
        except NetworkError:
            silent.append(peer_id)
    if silent and patient:
        names = ", ".join(peer_id[-6:] for peer_id in silent)
        raise StateError(
            f"fragment {applier.fragment}: cannot tell yet what of this peer's is in version {head.version}",
            why=f"{names} did not answer", do="it is tried again",
        )
    return []
