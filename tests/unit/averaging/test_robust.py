"""How far a contribution is believed: honest swarms lose nothing, and no minority can carry the average away."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging import plan, robust
from swarm.averaging.reduction import combine
from swarm.averaging.robust import GROWTH_LIMIT, NORM_LIMIT, SCALE_LIMIT, Verdict, judge, judge_for
from swarm.config import AveragingConfig

N = 4096
some = settings(max_examples=25, derandomize=True, deadline=None)
counts, seeds = st.integers(4, 9), st.integers(0, 10**6)


def vector(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale


def drift(seed: int, *, agreement: float = 0.5, scale: float = 1.0) -> torch.Tensor:
    """As honest peers have: a direction that all share, and noise of their own. `agreement`: the cosine of two."""
    return (vector(-1) * agreement ** 0.5 + vector(seed) * (1 - agreement) ** 0.5) * scale


def swarm(count: int, **options: float) -> dict[str, torch.Tensor]:
    return {f"peer-{number}": drift(number, **options) for number in range(count)}


def verdict_of(
    values: dict[str, torch.Tensor], tokens: dict[str, int] | None = None, *, exact: bool = False
) -> Verdict:
    tokens = tokens or dict.fromkeys(values, 100)
    return judge(values, tokens, plan.weights(tokens), exact=exact)


def robust_mean(values: dict[str, torch.Tensor], tokens: dict[str, int] | None = None) -> torch.Tensor:
    return combine(values, tokens or dict.fromkeys(values, 100))


def mean(values: dict[str, torch.Tensor], tokens: dict[str, int] | None = None) -> torch.Tensor:
    shares = plan.weights(tokens or dict.fromkeys(values, 100))
    return sum(values[name].double() * share for name, share in shares.items()).float()  # type: ignore[union-attr]


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- honest swarms


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_are_averaged_exactly(count: int) -> None:
    values = {name: vector(seed, 10.0 ** seed) for seed, name in enumerate("ab"[:count])}
    tokens = dict(zip(values, (10, 30), strict=False))
    assert torch.allclose(robust_mean(values, tokens), mean(values, tokens), rtol=1e-6, atol=1e-6)
    assert verdict_of(values, tokens).kept == dict.fromkeys(values, 1.0)


@some
@given(st.integers(1, 9), seeds, st.lists(st.integers(1, 10**6), min_size=9, max_size=9))
def test_where_all_agree_it_is_what_they_say(count: int, seed: int, tokens: list[int]) -> None:
    values = {f"{number}": vector(seed) for number in range(count)}
    one = dict(zip(values, tokens[:1] * count, strict=True))
    assert error(robust_mean(values, one), vector(seed)) < 1e-5
    alike = {name: vector(seed) * math.sqrt(count) for name, count in zip(values, [100, 120, 90] * 3, strict=False)}
    theirs = dict(zip(alike, [100, 120, 90] * 3, strict=False))
    assert error(robust_mean(alike, theirs), mean(alike, theirs)) < 1e-5


@pytest.mark.parametrize("agreement", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("count", [3, 4, 8, 16])
def test_honest_peers_lose_next_to_nothing(count: int, agreement: float) -> None:
    values = swarm(count, agreement=agreement)
    assert error(robust_mean(values), mean(values)) < 0.02
    assert min(verdict_of(values).kept.values()) > 0.9


def test_a_fast_peer_loses_nothing_where_it_agrees() -> None:
    """Four times the tokens, and a drift of twice the length (all noise) and more (all signal would be four times)."""
    tokens = {"peer-0": 100, "peer-1": 100, "peer-2": 100, "peer-3": 400}
    for growth in (2.0, 2.9):
        values = swarm(4) | {"peer-3": drift(3, scale=growth)}
        assert error(robust_mean(values, tokens), mean(values, tokens)) < 0.02
    slow = {**tokens, "peer-3": 4}
    for growth in (0.2, 0.04):
        values = swarm(4) | {"peer-3": drift(3, scale=growth)}
        assert error(robust_mean(values, slow), mean(values, slow)) < 0.02


# --- attacks


@some
@given(counts, seeds, st.floats(0.1, 1e15), st.sampled_from([1, 100, 200]))
def test_moving_one_contribution_arbitrarily_far_moves_the_result_by_a_bounded_amount(
    count: int, seed: int, scale: float, claim: int
) -> None:
    values = swarm(count)
    clean = robust_mean(values)
    values["peer-0"] = vector(seed) * scale
    tokens = {**dict.fromkeys(values, 100), "peer-0": claim}
    longest = max(float(value.norm()) for name, value in values.items() if name != "peer-0")
    share = 2 / (count + 1)  # of a claim of twice the median
    moved = float((robust_mean(values, tokens) - clean).norm())
    assert moved <= longest * (share * NORM_LIMIT * math.sqrt(2) + 1.0)


def test_the_bound_holds_where_the_others_have_learnt_nothing() -> None:
    values = {name: torch.zeros(N) for name in "abc"} | {"liar": vector(0, 1e9)}
    assert torch.count_nonzero(robust_mean(values)) == 0


@pytest.mark.parametrize(("count", "liars"), [(4, 1), (5, 2), (8, 3), (16, 7)])
@pytest.mark.parametrize("factor", [-1000.0, -10.0, 1000.0, 1e20])
def test_crude_attacks_are_left_out_as_if_nobody_had_come(count: int, liars: int, factor: float) -> None:
    values = swarm(count)
    honest = {name: value for name, value in values.items() if int(name[5:]) >= liars}
    values |= {name: value * factor for name, value in values.items() if name not in honest}
    verdict = verdict_of(values)
    assert verdict.too_large == values.keys() - honest.keys()
    assert error(robust_mean(values), robust_mean(honest)) < 1e-5
    assert error(robust_mean(values), mean(honest)) < 0.05


@pytest.mark.parametrize("agreement", [0.1, 0.5])
@pytest.mark.parametrize(("count", "liars"), [(3, 1), (4, 1), (8, 3), (9, 4)])
@pytest.mark.parametrize("factor", [-7.0, -1.0, -0.2])
def test_what_is_turned_round_is_left_out_whatever_its_size(
    count: int, liars: int, factor: float, agreement: float
) -> None:
    values = swarm(count, agreement=agreement)
    honest = {name: value for name, value in values.items() if int(name[5:]) >= liars}
    values |= {name: value * factor for name, value in values.items() if name not in honest}
    kept = verdict_of(values).kept
    assert {name for name in values if kept[name] == 0} == values.keys() - honest.keys()
    assert error(robust_mean(values), mean(honest)) < 0.05 and not verdict_of(values).too_large


def test_of_two_halves_neither_is_left_out() -> None:
    values = swarm(4) | {f"peer-{number}": -drift(number) for number in range(2)}
    assert min(verdict_of(values).kept.values()) > 0.5
    assert float(robust_mean(values).norm()) < float(drift(0).norm())


def test_who_has_nothing_in_common_with_the_others_is_heard() -> None:
    """By chance half of such cosines are negative."""
    values = {f"{number}": vector(number) for number in range(8)}
    assert min(verdict_of(values).kept.values()) > 0.9


@pytest.mark.parametrize(("count", "liars"), [(4, 1), (8, 3)])
@pytest.mark.parametrize("together", [False, True])
def test_what_goes_elsewhere_is_brought_near_the_others(count: int, liars: int, together: bool) -> None:
    """At right angles to the truth, five times too long; each of them somewhere else, or all to the same place."""
    values = swarm(count)
    for number in range(liars):
        values[f"peer-{number}"] = 5 * vector(77 + (0 if together else number))
    honest = mean({name: value for name, value in values.items() if int(name[5:]) >= liars})
    assert error(robust_mean(values), honest) < 0.5 * error(mean(values), honest)
    assert error(robust_mean(values), honest) < (1.0 if together else 0.7)


def test_zeros_are_no_opinion() -> None:
    values = swarm(8) | {f"peer-{number}": torch.zeros(N) for number in range(3)}
    honest = {name: value for name, value in values.items() if int(name[5:]) >= 3}
    assert error(robust_mean(values), mean(honest)) < 0.05
    assert verdict_of(values).kept["peer-0"] == 0 and not verdict_of(values).too_large


def test_of_three_a_long_one_is_shortened_and_an_absurd_one_left_out() -> None:
    long = swarm(2) | {"liar": -3 * vector(9)}
    kept = verdict_of(long).kept
    assert kept["peer-0"] == kept["peer-1"] == 1.0 and kept["liar"] == pytest.approx(NORM_LIMIT / 3, rel=0.1)
    absurd = swarm(2) | {"liar": -100 * vector(9)}
    assert error(robust_mean(absurd), mean(swarm(2))) < 1e-5


def test_claimed_tokens_lengthen_a_contribution_by_no_more_than_their_root_and_twice() -> None:
    for claim, allowed in ((100, 1.0), (225, 1.5), (400, 2.0), (10**9, GROWTH_LIMIT)):
        tokens = {**dict.fromkeys(swarm(4), 100), "peer-0": claim}
        values = swarm(4) | {"peer-0": drift(0, scale=7 * claim**0.5 / 10)}
        kept = verdict_of(values, tokens).kept["peer-0"]
        assert kept == pytest.approx(NORM_LIMIT * allowed / (7 * claim**0.5 / 10), rel=0.1)


@some
@given(counts, seeds)
def test_names_and_their_order_make_no_difference(count: int, seed: int) -> None:
    values = swarm(count) | {"peer-0": vector(seed, 3.0)}
    tokens = {name: 50 + 10 * number for number, name in enumerate(values)}
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    renamed = {f"peer-{new}": values[f"peer-{old}"] for new, old in enumerate(order)}
    theirs = {f"peer-{new}": tokens[f"peer-{old}"] for new, old in enumerate(order)}
    assert error(robust_mean(renamed, theirs), robust_mean(values, tokens)) < 1e-5
    backwards = dict(reversed(values.items()))
    assert torch.equal(robust_mean(backwards, tokens), robust_mean(values, tokens)), "to the bit"


def test_it_is_the_same_in_one_stride_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    values = swarm(5) | {"peer-0": vector(7, 2.0)}
    whole = robust_mean(values)
    monkeypatch.setattr(robust, "STRIDE", 500)
    monkeypatch.setattr(robust, "MIN_STRIDE", 100)
    assert error(robust_mean(values), whole) < 1e-5


def test_what_fp32_cannot_square_is_left_out() -> None:
    values = swarm(4) | {"peer-0": torch.full((N,), 9e29)}
    assert verdict_of(values).too_large == {"peer-0"}
    everybody = {name: torch.full((N,), 9e29) for name in values}
    assert torch.count_nonzero(robust_mean(everybody)) == 0, "most send nonsense: nothing is learnt"
    tiny = swarm(4, scale=1e-18)
    assert error(robust_mean(tiny) * 1e18, mean(swarm(4))) < 0.02, "small is no reason"


# --- runs that want it otherwise


def test_a_sync_run_gets_the_exact_mean_without_accidents() -> None:
    """Mean gradients: the more tokens, the less noise; one without any gradient is an opinion."""
    values = {f"peer-{number}": vector(number, 1 / 10**number) for number in range(5)} | {"idle": torch.zeros(N)}
    tokens = {f"peer-{number}": 100 ** (number + 1) // 100 for number in range(5)} | {"idle": 100}
    verdict = verdict_of(values, tokens, exact=True)
    assert verdict.factors == pytest.approx(plan.weights(tokens), rel=1e-12) and verdict.centre is None
    values["peer-0"] *= 10 * SCALE_LIMIT
    left_out = verdict_of(values, tokens, exact=True)
    assert left_out.too_large == {"peer-0"} and left_out.factors["peer-0"] == 0.0
    assert sum(left_out.factors.values()) == pytest.approx(1.0)
    nothing = {name: torch.zeros(N) for name in "abc"} | {"d": vector(0)}
    assert verdict_of(nothing, exact=True).factors["d"] == pytest.approx(0.25)


def test_the_run_says_how() -> None:
    values, tokens = swarm(4) | {"peer-0": vector(0, 20.0)}, dict.fromkeys(swarm(4), 100)
    shares = plan.weights(tokens)
    believed = judge_for(AveragingConfig(robust=False), values, tokens, shares)
    assert believed.factors == shares and believed.centre is None
    assert judge_for(AveragingConfig(), values, tokens, shares).too_large == {"peer-0"}
    exact = judge_for(AveragingConfig(mode="sync", bits=32), swarm(4), tokens, shares)
    assert exact.factors == pytest.approx(shares) and exact.centre is None
