"""What a peer that holds some fragments makes of what others say: whether it may join, and whether it may leave."""

from __future__ import annotations

import pytest

from swarm.network.records import Head, Spare, Status
from swarm.train.arrival import covers
from swarm.train.handover import needs_us, spares_need_us


def head(tokens: int | None) -> Head | None:
    return None if tokens is None else Head(version=1, digest="a" * 64, tokens=tokens)


def status(*tokens: int | None, leaving: bool = False, pending: tuple[int, ...] | None = None) -> Status:
    return Status(
        run_id="demo-0123456789ab", name="x", role="trainer", heads=[head(t) for t in tokens], leaving=leaving,
        pending=list(pending or (0,) * len(tokens)),
    )


@pytest.mark.parametrize(("statuses", "enough"), [
    ([], False), ([status()], False), ([status(1, 1, 1)], True), ([status(1, 1, None)], False),
    ([status(1, None, None), status(None, 1, 1)], True), ([status(1, 1, None), status(1, 1, None)], False),
    ([status(None, None, None)], False), ([status(1, 1)], False), ([status(1, 1, 1, 1)], True),
])
def test_a_newcomer_waits_until_it_has_heard_of_every_fragment(statuses: list[Status], enough: bool) -> None:
    assert covers(statuses, 3) is enough


def ours(*tokens: int | None) -> list[Head | None]:
    return [head(t) for t in tokens]


@pytest.mark.parametrize(("theirs", "needed"), [
    (status(10, 20), False), (status(9, 20), True), (status(10, 19), True), (status(11, 20), False),
    (status(11, 20, leaving=True), True), (status(10, 20, leaving=True), False),
    (status(10, 20, leaving=True, pending=(0, 5)), True), (status(10, 20, pending=(0, 5)), False), (status(), False),
])
def test_a_whole_peer_stays_for_those_who_lack_or_finish_something(theirs: Status, needed: bool) -> None:
    assert needs_us(theirs, ours(10, 20)) is needed


@pytest.mark.parametrize(("theirs", "needed"), [
    (status(None, 5), False), (status(9, 5), True), (status(9, None), True), (status(10, None), False),
    (status(None, 99, leaving=True, pending=(0, 7)), False), (status(10, 99, leaving=True, pending=(0, 7)), False),
    (status(10, 5, leaving=True, pending=(3, 0)), True), (status(None, None), False),
])
def test_fragments_that_either_does_not_hold_keep_nobody(theirs: Status, needed: bool) -> None:
    assert needs_us(theirs, ours(10, None)) is needed


def with_spare(tokens: int, *heads: int | None, leaving: bool = False) -> Status:
    """Of fragment 0."""
    spare = head(tokens)
    assert spare is not None
    return status(*heads, leaving=leaving).model_copy(update={"spares": [Spare(fragment=0, head=spare)]})


@pytest.mark.parametrize(("others", "needed"), [
    ([with_spare(9, None, 20)], True),
    ([with_spare(10, None, 20)], False),
    ([with_spare(9, None, 20), with_spare(10, None, 20)], False),
    ([with_spare(9, None, 20), status(7, None)], False),
    ([with_spare(9, None, 20), status(10, None, leaving=True)], True),
    ([with_spare(9, None, 20, leaving=True)], False),
    ([status(None, 20)], False),
    ([], False),
], ids=[
    "an old copy", "the newest", "one of two", "another holder", "who leaves too", "a keeper that leaves", "no copy",
    "nobody",
])
def test_the_last_holder_stays_until_somebody_has_the_newest_copy(others: list[Status], needed: bool) -> None:
    assert spares_need_us(others, ours(10, None)) is needed


def test_no_copy_is_waited_for_of_what_this_peer_does_not_hold() -> None:
    assert not spares_need_us([with_spare(9, None, 20)], ours(None, 20)) and not spares_need_us(
        [with_spare(9, None, 20)], []
    )
