"""Groups of groups: small everywhere, exact, all parts or nothing; and what robust combination does there."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging import plan, robust
from swarm.averaging.groups import (
    Group,
    Sum,
    grouped,
    in_turn,
    is_in,
    lines,
    roster_of,
    roster_of_groups,
    same_roster,
    sum_of_groups,
    sum_of_peers,
    weights,
)
from swarm.config import AveragingConfig
from swarm.network.prefixes import place

PLAIN, ROBUST = AveragingConfig(robust=False), AveragingConfig(robust=True)


def names(count: int, seed: int = 0) -> list[str]:
    return [f"peer {seed} {number}" for number in range(count)]


# ---- the tree ----


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(2, 12), st.integers(0, 9))
def test_no_group_has_more_than_so_many_members_and_everybody_is_in_one(count: int, most: int, seed: int) -> None:
    peers = names(count, seed)
    tree = grouped(peers, most=most)
    leaves = [group for group in tree.walk() if not group.groups]
    assert sorted(peer for leaf in leaves for peer in leaf.peers) == sorted(peers) == list(tree.peers)
    for group in tree.walk():
        assert len(group.groups or group.peers) <= most
        assert all(place(peer).startswith(group.prefix) for peer in group.peers)
        assert sorted(p for each in group.groups for p in each.peers) == (list(group.peers) if group.groups else [])
        assert len(group.groups) != 1
    assert len({group.prefix for group in tree.walk()}) == len(list(tree.walk())), "a prefix names one group"
    assert grouped(reversed(peers), most=most) == tree


@pytest.mark.parametrize(("count", "levels"), [(1, 1), (64, 1), (65, 2), (1000, 2), (10_000, 3)])
def test_levels_grow_with_the_logarithm(count: int, levels: int) -> None:
    tree = grouped(names(count))
    assert tree.levels == levels
    assert list(tree.walk())[-1] is tree


def test_up_to_64_are_one_group_as_ever() -> None:
    peers = names(64)
    assert grouped(peers) == Group("", tuple(sorted(peers)))
    [(prefix, parts)] = lines(grouped(peers), 64, fragment=0, version=3).items()
    assert prefix == "" and Counter(line[0] for line in parts) == Counter(peers), "each owns one part of 64"


# ---- who has the sums ----


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(2, 9), st.integers(1, 9), st.integers(0, 5))
def test_sums_meet_at_an_owner_of_a_group_below(count: int, most: int, num_parts: int, version: int) -> None:
    tree = grouped(names(count), most=most)
    found = lines(tree, num_parts, fragment=1, version=version)
    assert set(found) == {group.prefix for group in tree.walk()}
    for group in tree.walk():
        for part, line in enumerate(found[group.prefix]):
            assert len(set(line)) == len(line) == len(group.groups or group.peers)
            assert set(line) <= set(group.peers)
            if group.groups:
                assert set(line) == {found[each.prefix][part][0] for each in group.groups}


def test_no_peer_is_root_of_many_parts_and_others_are_next_time() -> None:
    tree = grouped(names(1000))
    roots = [lines(tree, 64, fragment=0, version=version)[""] for version in (1, 2)]
    assert all(max(Counter(line[0] for line in parts).values()) <= 3 for parts in roots)
    first, second = ({line[0] for line in parts} for parts in roots)
    assert len(first & second) < 16


def test_who_cannot_owns_nothing_and_a_group_of_nothing_but_those_is_left_out() -> None:
    tree = grouped(names(100))
    one, other = tree.groups
    found = lines(tree, 4, fragment=0, version=1, can=lambda peer_id: peer_id in one.peers[:2])
    assert set(found) == {"", one.prefix}
    assert all(set(line) == {line[0]} <= set(one.peers[:2]) for line in found[""])
    assert lines(tree, 4, fragment=0, version=1, can=lambda peer_id: False) == {}
    assert other.prefix not in found


def test_in_turn_begins_elsewhere_each_time() -> None:
    assert [in_turn("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


# ---- sums ----


def contributions(peers: list[str], numel: int = 64, alike: float = 1.0) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(len(peers))
    common = torch.randn(numel, generator=dice) * alike
    return {peer: common + torch.randn(numel, generator=dice) for peer in peers}


def summed(
    tree: Group, values: dict[str, torch.Tensor], tokens: dict[str, int], averaging: AveragingConfig = PLAIN
) -> Sum:
    """As the owners of one part do."""
    if tree.groups:
        return sum_of_groups(averaging, {each.prefix: summed(each, values, tokens, averaging) for each in tree.groups})
    mine = {peer: tokens[peer] for peer in tree.peers}
    heard = {peer: values[peer] for peer in tree.peers}
    return sum_of_peers(heard, mine, robust.judge_for(averaging, heard, mine, plan.weights(mine)))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 120), st.integers(2, 9), st.integers(0, 9))
def test_a_sum_of_sums_is_the_mean_of_all_by_tokens(count: int, most: int, seed: int) -> None:
    peers = names(count, seed)
    values = contributions(peers)
    tokens = {peer: 100 + number % 50 for number, peer in enumerate(peers)}  # nobody is over the cap
    total = summed(grouped(peers, most=most), values, tokens)
    exact = sum(values[peer].double() * tokens[peer] for peer in peers) / sum(tokens.values())
    assert torch.allclose(total.mean.double(), exact, atol=1e-6)
    assert total.tokens == sum(tokens.values()) and total.contributors == count


def test_warmth_counts_in_the_weight_of_a_group() -> None:
    peers = names(4)
    values, tokens = contributions(peers), dict.fromkeys(peers, 100)
    warmth = {peers[0]: 0.5}
    shares = plan.weights(tokens, warmth)
    found = sum_of_peers(values, tokens, robust.plain(shares), warmth=warmth)
    assert found.tokens == 350
    assert torch.allclose(found.mean, sum(values[peer] * shares[peer] for peer in peers), atol=1e-6)


def a_sum(tokens: float, contributors: int, mean: torch.Tensor | None = None, roster: str = "r") -> Sum:
    return Sum(torch.zeros(4) if mean is None else mean, tokens, contributors, roster)


def test_a_group_that_claims_tokens_does_not_take_the_round_over() -> None:
    sums = {"00": a_sum(4000, 40), "01": a_sum(4000, 40), "1": a_sum(10**12, 40)}
    assert weights(sums) == pytest.approx({"00": 0.25, "01": 0.25, "1": 0.5})
    few = {"00": a_sum(4000, 40), "01": a_sum(100, 1)}
    assert weights(few) == pytest.approx({"00": 40 / 41, "01": 1 / 41}), "a small group weighs what it is"


def test_an_honest_swarm_loses_little_by_robust_combination() -> None:
    peers = names(300)
    values, tokens = contributions(peers, numel=512, alike=0.5), dict.fromkeys(peers, 100)
    tree = grouped(peers)
    plain, cut = summed(tree, values, tokens).mean, summed(tree, values, tokens, ROBUST).mean
    assert float((plain - cut).norm() / plain.norm()) < 0.15
    assert float(torch.cosine_similarity(plain, cut, dim=0)) > 0.99


def test_a_group_of_nothing_but_liars_is_one_small_voice() -> None:
    peers = names(300)
    values, tokens = contributions(peers, numel=512, alike=0.5), dict.fromkeys(peers, 100)
    tree = grouped(peers)
    honest = summed(tree, values, tokens).mean
    liars = tree.groups[0].peers
    lied = {peer: -10 * each if peer in liars else each for peer, each in values.items()}
    assert float(torch.cosine_similarity(summed(tree, lied, tokens).mean, honest, dim=0)) < 0, "plain: it wins"
    heard = summed(tree, lied, tokens, ROBUST).mean
    assert float(torch.cosine_similarity(heard, honest, dim=0)) > 0.97
    assert 0.5 < float(heard.norm() / honest.norm()) < 1.2


def test_groups_of_different_size_are_not_cut_for_that() -> None:
    """16 and 64 contributors of nothing but noise: the smaller group's mean is twice as long."""
    dice = torch.Generator().manual_seed(0)
    common = torch.randn(4096, generator=dice)

    def mean_of(count: int) -> Sum:
        return a_sum(100 * count, count, common * 0.2 + torch.randn(4096, generator=dice) / count**0.5)

    sums = {"000": mean_of(16), "001": mean_of(64), "01": mean_of(40), "1": mean_of(40)}
    shares = weights(sums)
    plain = sum(shares[prefix] * each.mean for prefix, each in sums.items())
    found = sum_of_groups(ROBUST, sums).mean
    assert float(torch.cosine_similarity(plain, found, dim=0)) > 0.97
    assert float(found.norm() / plain.norm()) > 0.85


def test_mean_gradients_of_sync_runs_stay_exact() -> None:
    run = dataclasses.replace(ROBUST, mode="sync", bits=32)
    sums = {str(bits): a_sum(100, 10, torch.full((8,), float(bits))) for bits in (1, 2, 3)}
    assert torch.allclose(sum_of_groups(run, sums).mean, torch.full((8,), 2.0))


# ---- rosters ----


def test_one_roster_for_all_parts() -> None:
    assert same_roster([a_sum(1, 2), a_sum(5, 2)])
    assert not same_roster([a_sum(1, 2), a_sum(1, 2, roster="other")])
    assert not same_roster([a_sum(1, 2), a_sum(1, 3)])


def test_who_contributed_can_prove_it_and_nobody_else() -> None:
    peers = names(300)
    tokens = {peer: 100 + number for number, peer in enumerate(peers)}
    tree = grouped(peers, most=8)
    root = summed(tree, contributions(peers, numel=4), tokens).roster

    def proof(group: Group, peer: str) -> tuple[dict[str, int], list[dict[str, str]]]:
        if not group.groups:
            return {each: tokens[each] for each in group.peers}, []
        mine = next(each for each in group.groups if peer in each.peers)
        leaf, levels = proof(mine, peer)
        return leaf, [*levels, {each.prefix: summed(each, contributions(peers, numel=4), tokens).roster
                                for each in group.groups}]

    for peer in (peers[0], peers[150]):
        leaf, levels = proof(tree, peer)
        assert 1 <= len(levels) < tree.levels
        assert is_in(peer, leaf, levels, root)
        assert not is_in("somebody else", leaf, levels, root)
        assert not is_in(peer, {**leaf, peer: 10**6}, levels, root), "nor with other tokens"
        assert not is_in(peer, leaf, levels[:-1], root)
        other = next(p for p in peers if p not in leaf)
        assert not is_in(other, {**leaf, other: 1}, levels, root)
    assert is_in("a", {"a": 1}, [], roster_of({"a": 1})) and not is_in("b", {"a": 1}, [], roster_of({"a": 1}))


def test_rosters_do_not_depend_on_order_and_kinds_do_not_mix() -> None:
    assert roster_of({"a": 1, "b": 2}) == roster_of({"b": 2, "a": 1}) != roster_of({"a": 2, "b": 1})
    assert roster_of({}) != roster_of_groups({})
