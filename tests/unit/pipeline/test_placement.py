"""Where newcomers go, when peers move, and that they do it one at a time, with snapshots that differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from swarm.errors import ConfigError
from swarm.pipeline.placement import (
    CLAIM_S,
    HEAL_S,
    MAX_ROUND_S,
    PATIENCE_S,
    PEERS_PER_MOVER,
    REST_S,
    ROUND_S,
    Act,
    Decision,
    Memory,
    choose_stage,
    decide,
    round_s,
)
from swarm.pipeline.snapshot import NO_STAGE, Claim, Fragments, Holder, Snapshot, Stage, options_of

EIGHT = Fragments((1,) * 8, (1.0,) * 8)
LATE_S = 10_000.0


def holder(name: str, stage: Stage, *, speed: float = 1.0) -> Holder:
    return Holder(name, stage, stage, stage[1] - stage[0], speed)


def snapshot(*holders: Holder, fragments: Fragments = EIGHT) -> Snapshot:
    return Snapshot(holders, fragments)


def joiner(name: str = "new", *, room: int, speed: float = 1.0) -> Holder:
    return Holder(name, NO_STAGE, NO_STAGE, room, speed)


# ---- where a newcomer goes ----


def test_the_first_peer_takes_what_fits_and_the_next_ones_what_is_left() -> None:
    first = joiner("a", room=4)
    stage = choose_stage(snapshot(), first)
    assert stage[1] - stage[0] == 4
    known = [replace(first, target=stage)]
    for name in "bc":
        one = joiner(name, room=4)
        known.append(replace(one, target=choose_stage(snapshot(*known), one)))
    held = {fragment for one in known for fragment in range(*one.target)}
    assert held == set(range(8))


def test_who_fits_everything_takes_everything() -> None:
    assert choose_stage(snapshot(holder("a", (0, 4))), joiner(room=100)) == (0, 8)


def test_it_goes_where_rate_is_lowest() -> None:
    known = snapshot(holder("a", (0, 4), speed=8), holder("b", (4, 8), speed=2), holder("c", (0, 8), speed=1))
    assert choose_stage(known, joiner(room=4)) == (4, 8)


def test_fragments_on_one_peer_are_worth_a_second_holder() -> None:
    """All rates are equal: two halves of 4, one by one peer, the other by two."""
    known = snapshot(holder("a", (0, 4), speed=4), holder("b", (4, 8), speed=2), holder("c", (4, 8), speed=2))
    assert choose_stage(known, joiner(room=4, speed=0.5)) == (0, 4)


def test_a_gap_comes_first_however_poor_the_rest_is() -> None:
    known = snapshot(holder("a", (0, 3), speed=0.01), holder("b", (3, 7), speed=9))
    stage = choose_stage(known, joiner(room=2, speed=0.1))
    assert stage == (6, 8)


def test_equal_choices_differ_by_peer_and_are_the_same_each_time() -> None:
    chosen = {name: choose_stage(snapshot(), joiner(name, room=2)) for name in "abcdefghijkl"}
    assert chosen == {name: choose_stage(snapshot(), joiner(name, room=2)) for name in "abcdefghijkl"}
    assert len(set(chosen.values())) > 2


def test_the_order_of_entries_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    holders = [holder(str(i), (i % 5, i % 5 + 3), speed=float(rng.uniform(1, 9))) for i in range(9)]
    assert choose_stage(snapshot(*holders), joiner(room=2)) == choose_stage(snapshot(*holders[::-1]), joiner(room=2))


def test_fragments_of_different_sizes_fill_memory_as_they_fit() -> None:
    """The first holds the embedding, the last the head."""
    uneven = Fragments((30, 10, 10, 10, 25), (1.0, 1.0, 1.0, 1.0, 2.0))
    assert options_of(40, uneven).tolist() == [[0, 2], [1, 4], [3, 5]]
    assert options_of(20, uneven).tolist() == [[1, 3], [2, 4]]
    assert options_of(85, uneven).tolist() == [[0, 5]]
    known = snapshot(holder("a", (0, 4)), fragments=uneven)
    assert choose_stage(known, joiner(room=40)) == (3, 5)


def test_work_counts_not_the_number_of_fragments() -> None:
    heavy_end = Fragments((1,) * 4, (1.0, 1.0, 1.0, 5.0))
    known = snapshot(holder("a", (0, 2), speed=2), holder("b", (2, 4), speed=2), fragments=heavy_end)
    assert choose_stage(known, joiner(room=1)) == (3, 4)


def test_who_fits_nothing_is_told_what_to_do() -> None:
    with pytest.raises(ConfigError, match="can hold no part of it") as raised:
        choose_stage(Snapshot([], Fragments((5_000_000, 4_000_000), (1.0, 1.0))), joiner(room=3_000_000))
    assert "4 MB" in raised.value.why and "more memory" in raised.value.do


@pytest.mark.parametrize("sizes, work", [((), ()), ((1,), (1.0, 1.0)), ((0,), (1.0,)), ((1,), (0.0,))])
def test_fragments_make_sense_or_are_refused(sizes: tuple[int, ...], work: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Fragments(sizes, work)


# ---- whether it moves ----

CROWDED = [holder(f"crowd-{i}", (0, 4), speed=2) for i in range(5)]
LEAN = holder("lean", (4, 8), speed=1)
ME = CROWDED[0]


def asked(known: Snapshot, me: Holder, memory: Memory, now_s: float) -> Decision:
    return decide(known, me, memory, now_s=now_s, load_s=10.0)


def test_a_move_is_wanted_twice_then_claimed_then_done() -> None:
    known = snapshot(*CROWDED, LEAN)
    first = asked(known, ME, Memory(), LATE_S)
    assert first.act is Act.STAY and first.memory.wanted == (4, 8)
    soon = asked(known, ME, first.memory, LATE_S + ROUND_S - 1)
    assert soon.act is Act.STAY and soon.claim is None
    second = asked(known, ME, soon.memory, LATE_S + ROUND_S)
    assert second.act is Act.CLAIM and second.claim is not None and second.claim.stage == (4, 8)
    assert second.claim.gain > 1 and not second.claim.heals
    waits = asked(known, ME, second.memory, LATE_S + ROUND_S + CLAIM_S - 1)
    assert waits.act is Act.CLAIM
    goes = asked(known, ME, waits.memory, LATE_S + ROUND_S + CLAIM_S)
    assert goes.act is Act.GO and goes.claim == second.claim
    assert goes.memory == Memory(moved_at_s=LATE_S + ROUND_S + CLAIM_S, looked_at_s=LATE_S + ROUND_S + CLAIM_S)


def test_another_target_in_the_next_round_starts_again() -> None:
    first = asked(snapshot(*CROWDED, LEAN), ME, Memory(), LATE_S)
    other = snapshot(*CROWDED, holder("lean", (4, 6), speed=1), holder("rich", (6, 8), speed=50))
    second = asked(other, ME, first.memory, LATE_S + ROUND_S)
    assert second.act is Act.STAY and second.memory.wanted != (4, 8)


def test_nobody_moves_in_a_balanced_swarm() -> None:
    halves = [holder(f"{side}{i}", (side, side + 4), speed=2) for side in (0, 4) for i in range(3)]
    memory = Memory()
    for minute in range(5):
        decision = asked(snapshot(*halves), halves[0], memory, LATE_S + minute * ROUND_S)
        assert decision.act is Act.STAY and decision.memory.wanted is None
        memory = decision.memory


def test_a_peer_that_has_just_moved_rests() -> None:
    memory = Memory(moved_at_s=LATE_S)
    decision = asked(snapshot(*CROWDED, LEAN), ME, memory, LATE_S + REST_S - 1)
    assert decision.act is Act.STAY and decision.memory.wanted is None
    assert asked(snapshot(*CROWDED, LEAN), ME, memory, LATE_S + REST_S).memory.wanted == (4, 8)


def test_a_slow_line_keeps_a_peer_where_it_is() -> None:
    known = snapshot(*CROWDED, LEAN)
    assert decide(known, ME, Memory(), now_s=LATE_S, load_s=10.0).memory.wanted == (4, 8)
    assert decide(known, ME, Memory(), now_s=LATE_S, load_s=1e5).memory.wanted is None


def test_who_holds_everything_never_moves() -> None:
    whole = holder("whole", (0, 8), speed=3)
    assert asked(snapshot(whole, holder("a", (0, 2))), whole, Memory(), LATE_S) == Decision(
        Act.STAY, Memory(looked_at_s=LATE_S)
    )


def test_a_better_claim_goes_first_and_an_equal_one_by_hash() -> None:
    memory = Memory(wanted=(4, 8))
    mine = asked(snapshot(*CROWDED, LEAN), ME, memory, LATE_S).claim
    assert mine is not None
    better = replace(CROWDED[1], claim=replace(mine, gain=mine.gain + 1))
    yields = asked(snapshot(ME, better, *CROWDED[2:], LEAN), ME, memory, LATE_S)
    assert yields.act is Act.STAY and yields.claim is None and yields.memory.ahead == (("crowd-1", LATE_S),)
    worse = replace(CROWDED[1], claim=replace(mine, gain=mine.gain / 2))
    assert asked(snapshot(ME, worse, *CROWDED[2:], LEAN), ME, memory, LATE_S).act is Act.CLAIM
    acts = set()
    for one, other in ((0, 1), (1, 0)):
        known = snapshot(replace(CROWDED[other], claim=mine), *(c for c in CROWDED if c != CROWDED[other]), LEAN)
        acts.add(asked(known, CROWDED[one], memory, LATE_S).act)
    assert acts == {Act.STAY, Act.CLAIM}


def test_a_claim_that_is_never_carried_out_does_not_hold_up_the_swarm() -> None:
    boast = replace(CROWDED[1], claim=Claim((4, 8), 1e9))
    known = snapshot(ME, boast, *CROWDED[2:], LEAN)
    memory, now_s, act = Memory(), LATE_S, Act.STAY
    while act is not Act.GO and now_s < LATE_S + 20 * ROUND_S:
        decision = asked(known, ME, memory, now_s)
        memory, act, now_s = decision.memory, decision.act, now_s + 5
    assert act is Act.GO and now_s > LATE_S + PATIENCE_S


def test_patience_with_one_is_not_impatience_with_another() -> None:
    memory = Memory(wanted=(4, 8), ahead=(("crowd-1", LATE_S - PATIENCE_S),))
    boasts = [replace(crowd, claim=Claim((4, 8), 1e9)) for crowd in CROWDED[1:3]]
    assert asked(snapshot(ME, boasts[0], *CROWDED[2:], LEAN), ME, memory, LATE_S).act is Act.CLAIM
    yields = asked(snapshot(ME, *boasts, *CROWDED[3:], LEAN), ME, memory, LATE_S)
    assert yields.act is Act.STAY and yields.memory.ahead == (("crowd-1", LATE_S - PATIENCE_S), ("crowd-2", LATE_S))


def test_a_claim_is_withdrawn_when_somebody_else_was_faster() -> None:
    claiming = Memory(claim=Claim((4, 8), 2.0), claimed_at_s=LATE_S)
    filled = snapshot(*CROWDED, LEAN, holder("fast", (4, 8), speed=9), holder("too", (4, 8), speed=9))
    decision = asked(filled, ME, claiming, LATE_S + CLAIM_S)
    assert decision.act is Act.STAY and decision.claim is None and decision.memory.claim is None


def test_rounds_get_longer_in_large_swarms_up_to_a_limit() -> None:
    assert [round_s(count) for count in (1, 256, 512, 10**6)] == [ROUND_S, ROUND_S, 2 * ROUND_S, MAX_ROUND_S]


def test_large_swarms_have_several_movers_at_a_time() -> None:
    crowd = [holder(f"crowd-{i}", (0, 4), speed=2) for i in range(PEERS_PER_MOVER)]
    crowd[1] = replace(crowd[1], claim=Claim((4, 8), 1e9))
    known = snapshot(*crowd, LEAN)
    assert asked(known, crowd[0], Memory(wanted=(4, 8)), LATE_S).act is Act.CLAIM


# ---- gaps ----


def test_a_gap_needs_no_rounds_and_no_rest() -> None:
    known = snapshot(*CROWDED)  # 4 to 8 have nobody
    memory = Memory(moved_at_s=LATE_S - 1, looked_at_s=LATE_S - 1)
    claims = asked(known, ME, memory, LATE_S)
    assert claims.act is Act.CLAIM and claims.claim is not None
    assert claims.claim.heals and claims.claim.stage == (4, 8)
    assert asked(known, ME, claims.memory, LATE_S + HEAL_S).act is Act.GO


def test_a_gap_is_more_than_any_gain() -> None:
    boast = replace(CROWDED[1], claim=Claim((0, 4), 1e9))
    assert asked(snapshot(ME, boast, *CROWDED[2:]), ME, Memory(), LATE_S).act is Act.CLAIM


def test_a_gap_that_somebody_is_loading_is_no_gap() -> None:
    loading = Holder("loads", (0, 4), (4, 8), 4, 1.0)
    decision = asked(snapshot(*CROWDED, loading), ME, Memory(looked_at_s=LATE_S), LATE_S)
    assert decision.act is Act.STAY and decision.claim is None


def test_nobody_tears_one_gap_to_mend_another() -> None:
    alone = holder("alone", (0, 4))
    assert asked(snapshot(alone), alone, Memory(), LATE_S).act is Act.STAY


def test_part_of_a_gap_is_better_than_none() -> None:
    small = holder("small", (0, 2))
    claim = asked(snapshot(*CROWDED, small), small, Memory(), LATE_S).claim
    assert claim is not None and claim.heals and claim.stage[0] >= 4 and claim.stage[1] - claim.stage[0] == 2


# ---- all together, each with its own late view ----


@dataclass
class Simulated:
    """A few peers who see each other's entries `late_s` late, each asked every second."""

    holders: dict[str, Holder]
    late_s: int = 3

    def run(self, seconds: int) -> list[tuple[int, str, Claim]]:
        memories = {name: Memory(looked_at_s=0.0) for name in self.holders}
        history = [dict(self.holders)]
        moves = []
        for second in range(seconds):
            seen = history[max(0, len(history) - 1 - self.late_s)]
            known = Snapshot(seen.values(), EIGHT)
            for name, me in list(self.holders.items()):
                decision = decide(known, me, memories[name], now_s=float(second), load_s=5.0)
                memories[name] = decision.memory
                if decision.act is Act.GO:
                    assert decision.claim is not None
                    moves.append((second, name, decision.claim))
                    stage = decision.claim.stage
                    self.holders[name] = replace(me, target=stage, serving=stage, claim=None)
                else:
                    self.holders[name] = replace(me, claim=decision.claim)
            history.append(dict(self.holders))
        return moves


def named(holders: Iterable[Holder]) -> dict[str, Holder]:
    return {one.peer_id: one for one in holders}


def test_of_all_who_see_a_gap_exactly_one_goes_and_within_seconds() -> None:
    moves = Simulated(named(CROWDED)).run(40)
    assert len(moves) == 1
    second, _, claim = moves[0]
    assert claim.heals and claim.stage == (4, 8) and second <= 3 * HEAL_S


def test_two_gaps_are_healed_by_two() -> None:
    small = [holder(f"small-{i}", (0, 2), speed=2) for i in range(4)] + [holder("mid", (2, 6))]
    swarm = Simulated(named([*small, replace(small[0], peer_id="late")][:5] + [holder("x", (2, 5))]))
    moves = swarm.run(60)
    held = {fragment for one in swarm.holders.values() for fragment in range(*one.target)}
    assert held == set(range(8)) and 1 <= len(moves) <= 3


def test_a_crowd_spreads_one_after_the_other_and_then_rests() -> None:
    crowd = [holder(f"crowd-{i}", (0, 4), speed=2) for i in range(6)] + [holder("lean", (4, 8), speed=1)]
    swarm = Simulated(named(crowd))
    moves = swarm.run(1500)
    seconds = [second for second, _, _ in moves]
    assert 2 <= len(moves) <= 3
    assert all(later - earlier >= CLAIM_S for earlier, later in zip(seconds, seconds[1:], strict=False))
    last = [one for one in swarm.holders.values() if one.target == (4, 8)]
    assert 3 <= len(last) <= 4
