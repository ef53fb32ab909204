"""Rounds of more holders than one butterfly takes: groups of at most 64, groups of groups, and for each part one peer
at which all sums of the whole swarm meet.

Up to 64 holders are one group, and a round is what it always was. More are cut by the prefix tree of their places
(network/prefixes.py), without a coordinator. Each group reduces as ever, but does not quantise: for each part, its
owner passes the sum on, in fp32, to one of the owners of that part in the groups beside it, and so on up to the root,
where the part's result is quantised, once for everybody. The bytes come back the same way. With m to a group:

    leg 1          members -> owners of their group           each contribution, as ever
    leg 2          owners of groups -> owner of the part      4 bytes a value, twice, of one m-th of the fragment
    legs 3 and 4   back the same way                          the result's bytes, as ever

Two legs more for up to some 3,000 holders, four for all there will ever be. A peer sends 1.2 times what it would in one
butterfly, one that is a root as well up to 2.5 times (its contribution, its group's results, and those it is root of),
whatever the number of holders (all figures: `scripts/bench.py groups`, 64 to 10,000 of them).

Why not Moshpit's grid (https://arxiv.org/abs/2103.03239), groups formed anew each round on another axis, with one
truth agreed on by hash now and then: there peers end with averages of their own unless the grid is full and nobody is
ever missing (4,096 with 1 % that die: 21 results; 10,000: hundreds, 1 % apart), and those that are wrong at the
rendezvous take back what they have applied since. Here there is one result or none, and that exact to 1e-7. So equal
versions have equal digests (I1), after every round, and nothing needs to be re-established. The price is that a round
needs its roots, 64 peers at most of any number. So sums go to two: the owner, and the one that takes over if it dies.
An owner in a group of peers is replaced by another one, to whom its members send that part again; to try the whole
group again, or to leave it out, would lose much of a large round (of 10,000 with 5 % that die during it 59 %
contributed; so they are 96 %).

Faults are as ever: what is missing is not in the commit, and stays in its peer's drift (I2). A group counts with all
parts or not at all. Who is in it its `roster` says, a hash over its contributors and their tokens; the roster of groups
is a hash over theirs, and so on. A commit that names the root's is as short for 10,000 holders as for 65, and who
contributed proves it, to itself and to others, with its group's list and the 63 hashes beside it on each level.

Robust combination (robust.py) works in each group among peers, and once more among groups, by what a contributor of
each has learnt on average. So a group of nothing but liars, or an owner that lies for its group, is one voice of many
there, cut to size and direction like a peer's; whoever has learnt nothing like the others is a small part of its group
before. It does not protect from a root that lies: no more than today's part owner is audited.

Rounds do not use this yet: until they do, more than 64 holders take turns in rounds of 64 (`plan.invited`), with one
truth and nothing lost, at the price that everybody fetches the results of the others' rounds too.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from swarm.averaging import plan, robust
from swarm.averaging.reduction import combine
from swarm.averaging.robust import Verdict
from swarm.config import AveragingConfig
from swarm.network.prefixes import MOST, neighbourhoods, place


@dataclass(frozen=True)
class Group:
    """Peers that average, or groups whose sums do."""

    prefix: str
    """of the places of all who are in it"""
    peers: tuple[str, ...] = field(repr=False)
    """all of them, however deep, sorted"""
    groups: tuple[Group, ...] = ()
    """none: its members are its peers"""

    @property
    def levels(self) -> int:
        """A contribution and a result each go so many legs through the tree."""
        return 1 + max((group.levels for group in self.groups), default=0)

    def walk(self) -> Iterator[Group]:
        """Itself and all groups in it, the deepest first."""
        for group in self.groups:
            yield from group.walk()
        yield self


def grouped(peers: Collection[str], *, most: int = MOST, prefix: str = "") -> Group:
    """The tree of these holders: no group has more than `most` members. Everybody who knows of the same peers makes the
    same one; who knows only its neighbours makes its own part of it."""
    inside = sorted(peers)
    leaves = neighbourhoods(inside, prefix=prefix, most=most)
    if len(leaves) == 1:
        return Group(prefix, tuple(inside))
    if len(leaves) <= most:
        return Group(prefix, tuple(inside), tuple(Group(name, tuple(found)) for name, found in leaves.items()))
    depth = len(prefix) + most.bit_length() - 1
    heads: dict[str, list[str]] = {}
    for name, found in leaves.items():
        heads.setdefault(name[:depth], []).extend(found)
    if len(heads) == 1:
        return grouped(inside, most=most, prefix=name[:depth])
    groups = tuple(grouped(found, most=most, prefix=head) for head, found in heads.items())
    return Group(prefix, tuple(inside), groups)


def lines(
    group: Group, num_parts: int, *, fragment: int, version: int, can: Callable[[str], bool] = lambda peer_id: True
) -> dict[str, list[list[str]]]:
    """Prefix of each group in the tree -> for each part, who has its sum there: its owner, then those who would take
    over, in order. Of peers, whoever `can`, by rank and in turns; of groups, their own owners of that part in turns, so
    that nobody is a root of many parts. Groups in which nobody can are left out, and what is made of nothing else."""
    found: dict[str, list[list[str]]] = {}
    for each in group.walk():
        if each.groups:
            below = [found[child.prefix] for child in each.groups if child.prefix in found]
            parts = [[line[part][0] for line in below] for part in range(num_parts)]
        else:
            able = [p for p in plan.rank(each.peers, fragment=fragment, version=version) if can(p)]
            parts = [able] * num_parts
        if parts[0]:
            found[each.prefix] = [in_turn(parts[part], part + version) for part in range(num_parts)]
    return found


def in_turn(able: Sequence[str], number: int) -> list[str]:
    """The same ones, from another one on for each number."""
    first = number % len(able)
    return [*able[first:], *able[:first]]


@dataclass(frozen=True)
class Sum:
    """What the contributors of one group have to say of one part."""

    mean: torch.Tensor = field(repr=False)
    """fp32 [numel]"""
    tokens: float
    """that it weighs"""
    contributors: int
    roster: str
    """whose contributions these are; the same for all parts of a group"""


def sum_of_peers(
    contributions: Mapping[str, torch.Tensor], tokens: Mapping[str, int], verdict: Verdict, *,
    warmth: Mapping[str, float] | None = None,
) -> Sum:
    """Of a part's contributions, fp32 [numel] by peer id. `tokens`: what each is believed to have trained, `warmth`:
    for which part of them it counts (`plan.counted`); `verdict`: as in `reduction.combine`, which uses it up."""
    weight = math.fsum(plan.counted(tokens, warmth).values())
    return Sum(combine(contributions, tokens, verdict), weight, len(tokens), roster_of(tokens))


def sum_of_groups(averaging: AveragingConfig, sums: Mapping[str, Sum]) -> Sum:
    """Of a part's sums, by the prefix of the group that each is of."""
    shares, verdict = weights(sums), None
    if averaging.robust and len(sums) >= robust.MIN_FOR_NORM:
        means = {prefix: each.mean for prefix, each in sums.items()}
        exact = averaging.mode == "sync"
        verdict = robust.judge(means, _lengths(sums, exact=exact), shares, exact=exact)
    mean = combine(
        {prefix: each.mean for prefix, each in sums.items()}, {prefix: 1 for prefix in sums},
        verdict or robust.plain(shares),
    )
    return Sum(
        mean, math.fsum(each.tokens for each in sums.values()), sum(each.contributors for each in sums.values()),
        roster_of_groups({prefix: each.roster for prefix, each in sums.items()}),
    )


def weights(sums: Mapping[str, Sum]) -> dict[str, float]:
    """Share of each group in the average: by tokens, of which a contributor counts for no more than twice as many as in
    the usual group, so that nobody takes a round over by claiming them for others. They add up to 1."""
    usual = statistics.median(each.tokens / each.contributors for each in sums.values())
    cap = plan.WEIGHT_CAP * usual
    capped = {prefix: min(each.tokens, cap * each.contributors) for prefix, each in sorted(sums.items())}
    total = math.fsum(capped.values())
    return {prefix: count / total for prefix, count in capped.items()}


def same_roster(parts: Sequence[Sum]) -> bool:
    """Of one group's sums: all parts or nothing (I2)."""
    return len({(each.roster, each.contributors) for each in parts}) == 1


def roster_of(tokens: Mapping[str, int]) -> str:
    """Of peers: hash over who contributed how many tokens."""
    return _hash("peers", sorted(tokens.items()))


def roster_of_groups(rosters: Mapping[str, str]) -> str:
    return _hash("groups", sorted(rosters.items()))


def is_in(
    peer_id: str, group: Mapping[str, int], levels: Sequence[Mapping[str, str]], roster: str
) -> bool:
    """Is that peer among the contributors that a commit names by `roster`? `group`: those of its own group, with their
    tokens; `levels`: the rosters of the groups beside it, then of those beside the group of those, up to the root."""
    if peer_id not in group:
        return False
    known = roster_of(group)
    for rosters in levels:
        mine = [prefix for prefix in rosters if place(peer_id).startswith(prefix)]
        if len(mine) != 1 or rosters[mine[0]] != known:
            return False
        known = roster_of_groups(rosters)
    return known == roster


def _lengths(sums: Mapping[str, Sum], *, exact: bool) -> dict[str, int]:
    """Tokens of which the length of a mean speaks: of one contributor, over the root of their number. That is half-way
    between a mean of nothing but noise, whose length falls with the root of the number, and one of nothing but signal;
    groups differ by 4 in it, so neither is cut by what is a peer's due (`robust.NORM_LIMIT`)."""
    power = -0.5 if exact else 0.5
    return {
        prefix: max(1, round(each.tokens / each.contributors / each.contributors ** power))
        for prefix, each in sums.items()
    }


def _hash(kind: str, content: object) -> str:
    text = json.dumps([kind, content], separators=(",", ":"))
    return hashlib.sha256(f"swarm roster\0{text}".encode()).hexdigest()
