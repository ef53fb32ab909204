"""One round of thousands of holders, by the product's own tree, sums and codec (swarm/averaging/groups.py), while some
of them die in the middle of it.

Time goes in legs: what is sent in one has arrived at its end, unless its sender or its receiver has died. Whoever dies
does so at a moment drawn from the whole round, in whatever role it has by then: what then happens is said in groups.py.
All parts of a group have the same contributors, so the arithmetic of all is done at
once; which part it is matters for who has died and who has sent how much.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from swarm.averaging import plan, robust
from swarm.averaging.groups import Group, Sum, grouped, in_turn, lines, sum_of_groups, sum_of_peers
from swarm.averaging.reduction import reduce_part
from swarm.config import AveragingConfig
from swarm.network import codec
from swarm.network.codec import BLOCK
from swarm.network.prefixes import MOST

PARTS = plan.MAX_PARTS
REPAIRS = 8
"""times that members of a group send those parts again whose owners have died"""
COPIES = 2
"""of a sum: its owner and who takes over"""
PART_BLOCKS = 256
"""of the fragment whose bytes are counted (4 million values); which shares come out does not depend on it"""
ALIKE = 0.3
"""of what a peer has learnt: what all have, over what only it has"""


@dataclass(frozen=True)
class Reduced:
    leg: int
    """after which all owners have their sums"""
    owners: list[str]
    sum: Sum
    contributors: list[str]


class Round:
    def __init__(self, num_peers: int, averaging: AveragingConfig, *, dying: float, num_blocks: int, seed: int) -> None:
        """`dying`: the share of peers that die in this round; `num_blocks`: of 256 values, that are really averaged."""
        dice = random.Random(seed)
        self._averaging, self._num_blocks = averaging, num_blocks
        self.peers = [f"peer-{seed}-{number}" for number in range(num_peers)]
        self.group = grouped(self.peers)
        self.dies_at = {p: dice.uniform(0, 2 * self.group.levels) for p in self.peers if dice.random() < dying}
        self.tokens = {peer_id: dice.randint(50, 150) for peer_id in self.peers}
        self._common = ALIKE * torch.randn(num_blocks * BLOCK, generator=torch.Generator().manual_seed(seed))
        self.sent_bytes: Counter[str] = Counter()
        self.repairs = 0

    def lives(self, peer_id: str, leg: float) -> bool:
        return self.dies_at.get(peer_id, math.inf) > leg

    def learnt(self, peer_id: str) -> torch.Tensor:
        """What a peer contributes, as its owners decode it: fp32 [numel], the same each time."""
        seed = int.from_bytes(hashlib.sha256(peer_id.encode()).digest()[:6], "big")
        own = torch.randn(self._common.numel(), generator=torch.Generator().manual_seed(seed))
        values = (self._common + own) * 1e-3 * math.sqrt(self.tokens[peer_id])
        return codec.decode(codec.encode(values, 0, self._averaging.bits), self._num_blocks, 0, self._averaging.bits)

    def play(self) -> dict[str, float]:
        """Figures of the round; those of a result only where there is one."""
        everybody = [peer_id for peer_id in self.peers if self.lives(peer_id, 1)]
        leaves = [group for group in self.group.walk() if not group.groups]
        reduced = self._reduce(self.group)
        figures = {
            "levels": self.group.levels, "groups": len(leaves), "repairs": self.repairs,
            "committed": int(reduced is not None),
        }
        if reduced is None:
            return figures
        results = self._results(reduced.sum)
        digests = self._hand_out(self.group, reduced.owners, results, reduced.leg)
        left = [peer_id for peer_id in self.peers if self.lives(peer_id, reduced.leg + self.group.levels)]
        exact = self._exact(reduced.contributors)
        butterfly = 2 * (PARTS - 1) * codec.encoded_bytes(0, PART_BLOCKS, self._averaging.bits)
        sent = [self.sent_bytes[peer_id] / butterfly for peer_id in everybody]
        return figures | {
            "legs": reduced.leg + self.group.levels,
            "contributed": len(reduced.contributors) / len(everybody),
            "counted_twice": len(reduced.contributors) - len(set(reduced.contributors)),
            "error": _distance(reduced.sum.mean.double().numpy(), exact),
            "told": len([peer_id for peer_id in left if peer_id in digests]) / max(1, len(left)),
            "truths": len(set(digests.values())),
            "sent_mean": float(np.mean(sent)), "sent_most": float(np.max(sent)),
        }

    # -- up -----------------------------------------------------------------------------------------------------------

    def _reduce(self, group: Group) -> Reduced | None:
        """None: the group is not in this round; what its peers have learnt stays with them."""
        return self._reduce_groups(group) if group.groups else self._reduce_peers(group)

    def _reduce_peers(self, group: Group) -> Reduced | None:
        mine, wanted = [""] * PARTS, list(range(PARTS))
        for leg in range(1 + REPAIRS):
            chosen = lines(group, PARTS, fragment=0, version=1, can=lambda peer_id, leg=leg: self.lives(peer_id, leg))
            contributors = [peer_id for peer_id in group.peers if self.lives(peer_id, leg + 1)]
            if not contributors:
                break
            for part in wanted:
                mine[part] = chosen[group.prefix][part][0]
            self._send_contributions(contributors, [mine[part] for part in wanted])
            wanted = [part for part in range(PARTS) if not self.lives(mine[part], leg + 2)]  # until they passed it on
            if not wanted:
                return Reduced(leg + 1, mine, self._sum(contributors), contributors)
            self.repairs += 1
        return None

    def _reduce_groups(self, group: Group) -> Reduced | None:
        below = {each.prefix: found for each in group.groups if (found := self._reduce(each)) is not None}
        if not below:
            return None
        leg, mine = max(found.leg for found in below.values()), []
        for part in range(PARTS):
            owners = [found.owners[part] for found in below.values()]
            able = in_turn([p for p in owners if self.lives(p, leg)] or owners, part + 1)[:COPIES]
            for owner in owners:
                self.sent_bytes[owner] += codec.encoded_bytes(0, PART_BLOCKS, 32) * len(set(able) - {owner})
            mine.append(next((p for p in able if self.lives(p, leg + 2)), ""))
            self.repairs += mine[-1] != able[0]
        if "" in mine:
            return None
        contributors = [peer_id for found in below.values() for peer_id in found.contributors]
        total = sum_of_groups(self._averaging, {prefix: found.sum for prefix, found in below.items()})
        return Reduced(leg + 1, mine, total, contributors)

    def _send_contributions(self, contributors: list[str], owners_of_parts: list[str]) -> None:
        size, own = codec.encoded_bytes(0, PART_BLOCKS, self._averaging.bits), Counter(owners_of_parts)
        for peer_id in contributors:
            self.sent_bytes[peer_id] += size * (len(owners_of_parts) - own[peer_id])

    def _sum(self, contributors: list[str]) -> Sum:
        values = {peer_id: self.learnt(peer_id) for peer_id in contributors}
        tokens = {peer_id: self.tokens[peer_id] for peer_id in contributors}
        verdict = robust.judge_for(self._averaging, values, tokens, plan.weights(tokens))
        return sum_of_peers(values, tokens, verdict)

    # -- down ---------------------------------------------------------------------------------------------------------

    def _results(self, total: Sum) -> list[bytes]:
        """Of every part, quantised once."""
        edges = [self._num_blocks * i // min(PARTS, self._num_blocks) * BLOCK for i in range(self._num_blocks + 1)]
        parts = [total.mean[start:end] for start, end in zip(edges, edges[1:], strict=False) if end > start]
        return [
            reduce_part({"sum": part}, {"sum": 1}, torch.zeros_like(part), num_fine=0, bits=self._averaging.bits)[0]
            for part in parts
        ]

    def _hand_out(self, group: Group, mine: list[str], results: list[bytes], leg: int) -> dict[str, str]:
        """Peer -> digest of the results that it has in the end. What an owner that has died by now should have passed
        on is fetched by hash, of anybody else who has it; that is counted for one of those."""
        size = codec.encoded_bytes(0, PART_BLOCKS, self._averaging.bits)
        if not group.groups:
            digest = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in results)).hexdigest()
            told = [peer_id for peer_id in group.peers if self.lives(peer_id, leg + 1)]
            stand_in = told[0] if told else ""
            for owner, parts in Counter(mine).items():
                giver = owner if self.lives(owner, leg + 1) else stand_in
                self.sent_bytes[giver] += size * parts * (len(told) - (owner in told))
            return dict.fromkeys(told, digest)
        found: dict[str, str] = {}
        for number, each in enumerate(group.groups):
            theirs = lines(each, PARTS, fragment=0, version=1, can=lambda p: self.lives(p, leg)).get(each.prefix)
            if theirs is None:
                continue
            for part, line in enumerate(theirs):
                giver = mine[part] if self.lives(mine[part], leg + 1) else mine[(part + number) % PARTS]
                self.sent_bytes[giver] += size * (line[0] != giver)
            found |= self._hand_out(each, [line[0] for line in theirs], list(results), leg + 1)
        return found

    def _exact(self, contributors: list[str]) -> np.ndarray[Any, Any]:
        """The mean by tokens, in fp64."""
        total = np.zeros(self._num_blocks * BLOCK)
        for peer_id in contributors:
            total += self.tokens[peer_id] * self.learnt(peer_id).double().numpy()
        return np.asarray(total / sum(self.tokens[peer_id] for peer_id in contributors))


def _distance(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Relative L2."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def moshpit(num_peers: int, *, dying: float, seed: int, numel: int = 512) -> dict[str, float]:
    """The same on a grid: groups along one axis after the other, each peer goes on with its group's weighted mean and
    weight, and who dies takes along what it has. `error`: the median peer's, against the mean of all who lived at the
    start; `spread`: how far peers are apart in the end."""
    dice = np.random.default_rng(seed)
    axes = next(axes for axes in (1, 2, 3, 4) if num_peers <= MOST**axes)
    side = next(side for side in range(1, MOST + 1) if side**axes >= num_peers)
    place = np.stack(np.unravel_index(dice.permutation(side**axes)[:num_peers], (side,) * axes))
    common = ALIKE * dice.standard_normal(numel)
    values = common + dice.standard_normal((num_peers, numel))
    weights = dice.integers(50, 151, num_peers).astype(float)
    dies_at = np.where(dice.random(num_peers) < dying, dice.uniform(0, axes, num_peers), np.inf)
    exact = np.average(values, axis=0, weights=weights)
    for axis in range(axes):
        alive = dies_at > axis + 0.5  # half of those that die in this leg have not yet sent anything
        lines = np.ravel_multi_index(tuple(np.delete(place, axis, axis=0)), (side,) * (axes - 1)) if axes > 1 else \
            np.zeros(num_peers, dtype=int)
        total, weight = np.zeros((side ** (axes - 1), numel)), np.zeros(side ** (axes - 1))
        np.add.at(total, lines[alive], values[alive] * weights[alive, None])
        np.add.at(weight, lines[alive], weights[alive])
        values[alive] = total[lines[alive]] / weight[lines[alive], None]
        weights[alive] = weight[lines[alive]]
    left = values[dies_at == np.inf]
    errors = np.linalg.norm(left - exact, axis=1) / np.linalg.norm(exact)
    truths = len(np.unique(np.round(left[:, 0], 9)))
    middle = left.mean(axis=0)
    spread = np.linalg.norm(left - middle, axis=1).mean() / np.linalg.norm(exact)
    return {"axes": axes, "error": float(np.median(errors)), "spread": float(spread), "truths": truths,
            "sent_mean": float(axes * (side - 1) / side)}
