"""What chains say: malformed words and paths that are none are refused (I4)."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.errors import BadMessage
from swarm.network import frames
from swarm.network.records import parse
from swarm.pipeline.messages import Gradient, Hop, Microbatch, Verdicts, below

A, B, C = "A" * 20, "B" * 20, "C" * 20
GOOD: dict[str, Any] = {"origin": A, "number": 7, "start": 1, "sequences": 2, "length": 16}


def hops(*spans: tuple[str, int, int]) -> list[Hop]:
    return [Hop(peer_id=peer_id, start=start, end=end) for peer_id, start, end in spans]


def test_a_microbatch_is_named_by_origin_number_and_where_it_enters() -> None:
    microbatch = parse(Microbatch, GOOD)
    assert microbatch.key == (A, 7, 1) and microbatch.tokens == 32
    assert microbatch.model_copy(update={"start": 2}).key == (A, 7, 2)


def test_sequences_may_be_cut_into_segments() -> None:
    assert parse(Microbatch, GOOD).segments == 0
    assert [parse(Microbatch, GOOD | {"segments": count}).segments for count in (2, 3, 32)] == [2, 3, 32]


def test_the_largest_request_fits_into_a_head() -> None:
    path = hops(*((A[:1] * 52, index, index + 1) for index in range(256)))
    size = {"sequences": 4096, "length": 2**20, "segments": 2**32}
    asked = Microbatch(**{**GOOD, **size, "known": path})
    assert parse(Microbatch, frames.parse_head(frames.pack_head(asked.model_dump()))) == asked


def test_a_guest_may_ask_what_follows_one_token() -> None:
    microbatch = parse(Microbatch, GOOD | {"length": 1, "train": False, "logits": 1})
    assert microbatch.tokens == 2 and microbatch.logits == 1


@pytest.mark.parametrize("change", [
    {"origin": "me"}, {"number": -1}, {"number": 1.5}, {"start": 256}, {"sequences": 0}, {"sequences": 4097},
    {"length": 1}, {"length": 2**20 + 1}, {"bits": 3}, {"bits": 5}, {"back_bits": 16},
    {"logits": 1}, {"logits": -1}, {"logits": 1025, "train": False}, {"length": 1, "train": False},
    {"length": 0, "logits": 1, "train": False}, {"logits": True, "train": False},
    {"segments": 1}, {"segments": 33}, {"segments": -2}, {"segments": 2.0}, {"segments": None}, {"segments": [2]},
    {"segments": 2**33, "sequences": 4096, "length": 2**20},
    {"bits": 64}, {"version": -1}, {"more": 1}, {"train": 1},
    {"known": [{"peer_id": B, "start": 0}]}, {"known": None},
])
def test_a_malformed_microbatch_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage, match="malformed Microbatch"):
        parse(Microbatch, GOOD | change)


def test_a_path_begins_with_who_answers_and_leads_to_the_end() -> None:
    asked = parse(Microbatch, GOOD)
    Gradient(loss=1.0, path=hops((B, 1, 2), (C, 2, 4))).check(asked, B, 4)
    Gradient(loss=1.0, path=hops((B, 1, 4))).check(asked, B, 4)


@pytest.mark.parametrize("path", [
    [(C, 1, 2), (B, 2, 4)], [(B, 1, 2)], [(B, 1, 2), (C, 3, 4)], [(B, 0, 4)], [(B, 2, 4)], [(B, 1, 3), (C, 2, 4)],
    [(B, 1, 2), (C, 2, 2), (C, 2, 4)], [(B, 1, 5)],
])
def test_a_path_with_gaps_or_overlaps_or_of_somebody_else_is_none(path: list[tuple[str, int, int]]) -> None:
    with pytest.raises(BadMessage, match="path"):
        Gradient(loss=1.0, path=hops(*path)).check(parse(Microbatch, GOOD), B, 4)


@pytest.mark.parametrize(
    "change", [{"loss": float("nan")}, {"loss": -1.0}, {"path": []}, {"queue": -1}, {"inside_s": 1e9}]
)
def test_a_malformed_answer_is_refused(change: dict[str, Any]) -> None:
    good = Gradient(loss=1.0, path=hops((B, 1, 4))).model_dump()
    with pytest.raises(BadMessage, match="malformed Gradient"):
        parse(Gradient, good | change)


def test_verdicts_come_in_bounded_numbers() -> None:
    verdict = {"number": 1, "start": 0, "end": 2}
    assert len(parse(Verdicts, {"verdicts": [verdict] * 256}).verdicts) == 256
    for wrong in ([], [verdict] * 257, [verdict | {"end": 0}], [verdict | {"more": 1}]):
        with pytest.raises(BadMessage, match="malformed Verdicts"):
            parse(Verdicts, {"verdicts": wrong})


def test_the_rest_of_a_path_begins_at_a_boundary() -> None:
    path = hops((A, 0, 1), (B, 1, 3), (C, 3, 4))
    assert below(path, 1) == path[1:] and below(path, 3) == path[2:]
    assert below(path, 2) == [] and below(path, 4) == [] and below([], 0) == []
