"""Openings and commits: what is malformed or forged is refused, whoever carries it (I4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging.messages import Commit, Contributor, Invitation, Opening
from swarm.averaging.opener import MAX_MADDRS
from swarm.averaging.plan import MAX_MEMBERS
from swarm.errors import BadMessage
from swarm.network import frames
from swarm.network.keys import Keypair
from swarm.network.records import parse

MakeCommit = Callable[..., Commit]
NUM_BLOCKS, MAX_CLAIM = 5, 1000


def check(commit: Commit) -> None:
    commit.check(NUM_BLOCKS, max_claim=MAX_CLAIM)


def over_the_wire(commit: Commit) -> bytes:
    return json.dumps(commit.model_dump(), separators=(",", ":")).encode()


def received(data: bytes) -> Commit:
    """As a peer takes it: bounded JSON, strict schema, all signatures."""
    commit = parse(Commit, frames.parse_head(data))
    check(commit)
    return commit


def test_a_sound_commit_passes_and_survives_the_wire(signed_commit: MakeCommit, keys: list[Keypair]) -> None:
    for push_s in (7.25, 10.0, 1 / 3, 600.0):
        commit = signed_commit(push_s=push_s)
        again = received(over_the_wire(commit))
        assert again == commit and again.hash == commit.hash and again.opening.id == commit.opening.id
    assert commit.tokens == 150
    assert [commit.includes(key.peer_id) for key in keys[:4]] == [True, False, True, False]
    assert commit.opening.opener == keys[0].peer_id
    assert commit.opening.owner(commit.opening.parts[1]) == keys[1].peer_id


@pytest.mark.parametrize(("edges", "owners"), [
    ((0, 2, 4), (0, 1)), ((0, 2, 6), (0, 1)), ((1, 2, 5), (0, 1)), ((0, 0, 5), (0, 1)), ((0, 5, 5), (0, 1)),
    ((0, 4, 2, 5), (0, 1, 2)),
])
def test_parts_must_tile_the_fragment(
    signed_commit: MakeCommit, edges: tuple[int, ...], owners: tuple[int, ...]
) -> None:
    commit = signed_commit(edges=edges, owners=owners, contents=(b"x",) * len(owners))
    with pytest.raises(BadMessage, match="tile"):
        commit.opening.check(NUM_BLOCKS)
    with pytest.raises(BadMessage, match="tile"):
        check(commit)


def opening_with(commit: Commit, **changes: Any) -> Opening:
    return parse(Opening, {**commit.opening.model_dump(), **changes})


def test_gaps_and_overlaps_are_no_tiles(signed_commit: MakeCommit) -> None:
    for parts in ([(0, 2), (3, 5)], [(0, 3), (2, 5)], [(2, 5), (0, 2)], [(0, 5), (0, 5)]):
        listed = [{"start": start, "end": end, "owner": i} for i, (start, end) in enumerate(parts)]
        with pytest.raises(BadMessage, match="tile"):
            opening_with(signed_commit(), parts=listed).check(NUM_BLOCKS)


def test_members_are_named_once_and_owners_are_members(signed_commit: MakeCommit) -> None:
    with pytest.raises(BadMessage, match="twice"):
        check(signed_commit(members=(0, 1, 1)))
    part = {"start": 0, "end": NUM_BLOCKS, "owner": 3}
    with pytest.raises(BadMessage, match="owner is no member"):
        opening_with(signed_commit(), parts=[part]).check(NUM_BLOCKS)


@pytest.mark.parametrize("changes", [
    {"version": 0}, {"version": 2**40 + 1}, {"version": 4.0}, {"version": "4"}, {"version": True}, {"fragment": -1},
    {"fragment": 256}, {"base": "B" * 64}, {"base": "b" * 63}, {"base": "b" * 64 + "\n"}, {"members": []},
    {"members": ["x"]}, {"members": ["1" * 40] * (MAX_MEMBERS + 1)}, {"parts": []}, {"nonce": "0" * 15},
    {"nonce": "G" * 16}, {"push_s": 0.0}, {"push_s": -1.0}, {"push_s": 601.0}, {"push_s": float("nan")},
    {"push_s": float("inf")}, {"more": 1}, {"parts": [{"start": -1, "end": 5, "owner": 0}]},
    {"parts": [{"start": 0, "end": 5, "owner": MAX_MEMBERS}]}, {"parts": [{"start": 0, "end": 5}]},
    {"members": None}, {"parts": "none"},
])
def test_an_opening_that_does_not_fit_its_schema_is_refused(
    signed_commit: MakeCommit, changes: dict[str, Any]
) -> None:
    with pytest.raises(BadMessage, match="malformed Opening"):
        opening_with(signed_commit(), **changes)


@pytest.mark.parametrize("document", [None, [], "x", 3, {}, {"opening": {}}])
def test_a_commit_that_is_none_is_refused(document: Any) -> None:
    with pytest.raises(BadMessage, match="malformed Commit"):
        parse(Commit, document)


def test_contributors_are_members_and_named_once(signed_commit: MakeCommit) -> None:
    with pytest.raises(BadMessage, match="no member, or twice"):
        check(signed_commit(tokens={0: 5, 3: 5}))
    commit = signed_commit()
    doubled = commit.model_copy(update={"contributors": [*commit.contributors, commit.contributors[0]]})
    with pytest.raises(BadMessage, match="no member, or twice"):
        check(doubled)
    with pytest.raises(BadMessage, match="malformed"):
        parse(Contributor, {"member": 0, "tokens": 0})
    with pytest.raises(BadMessage, match="malformed"):
        parse(Contributor, {"member": 0, "tokens": True})
    with pytest.raises(BadMessage, match="malformed"):
        parse(Commit, {**commit.model_dump(), "contributors": []})


def test_a_contribution_of_too_many_tokens_is_refused(signed_commit: MakeCommit) -> None:
    check(signed_commit(tokens={1: MAX_CLAIM}))
    with pytest.raises(BadMessage, match="too many tokens"):
        check(signed_commit(tokens={0: 1, 1: MAX_CLAIM + 1}))


def test_each_part_has_its_result(signed_commit: MakeCommit) -> None:
    commit = signed_commit()
    for results in (commit.results[:1], [*commit.results, commit.results[0]]):
        with pytest.raises(BadMessage, match="result for each part"):
            check(commit.model_copy(update={"results": results}))


def test_forged_signatures_are_refused(signed_commit: MakeCommit) -> None:
    with pytest.raises(BadMessage, match="owner did not sign"):
        check(signed_commit(result_keys=(0, 0)))
    with pytest.raises(BadMessage, match="opener did not sign"):
        check(signed_commit(opener_key=1))
    commit = signed_commit()
    swapped = commit.model_copy(update={"results": commit.results[::-1]})
    with pytest.raises(BadMessage, match="owner did not sign"):
        check(swapped)
    both = signed_commit(owners=(0, 0))  # also where one member owns both parts
    with pytest.raises(BadMessage, match="owner did not sign"):
        check(both.model_copy(update={"results": both.results[::-1]}))


def test_signatures_of_another_round_cannot_be_used_again(signed_commit: MakeCommit) -> None:
    """Neither results nor the opener's word: both name the opening, and it names version, base and nonce."""
    commit = signed_commit()
    others = [
        signed_commit(nonce=1), signed_commit(version=5), signed_commit(base="c" * 64), signed_commit(fragment=2),
        signed_commit(tokens={0: 101, 2: 50}), signed_commit(tokens={0: 100}), signed_commit(push_s=7.5),
    ]
    for other in others:
        for field in ("opening", "contributors", "results", "signature"):
            if getattr(other, field) != getattr(commit, field):
                with pytest.raises(BadMessage):
                    check(commit.model_copy(update={field: getattr(other, field)}))
        check(other)


def test_an_owner_signs_who_contributed(signed_commit: MakeCommit) -> None:
    """The opener cannot leave one out, or give one more tokens, after the owners have reduced."""
    commit = signed_commit()
    for contributors in (commit.contributors[:1], [Contributor(member=0, tokens=101), commit.contributors[1]],
                         commit.contributors[::-1]):
        with pytest.raises(BadMessage, match="owner did not sign"):
            check(commit.model_copy(update={"contributors": contributors}))


@settings(max_examples=250, derandomize=True, deadline=None)
@given(data=st.data())
def test_no_bit_of_a_commit_can_be_flipped(data: st.DataObject) -> None:
    """Or it is the same commit still, said in another way (a digit beyond what a float can tell, 1e0 for 1E0)."""
    wire = FLIPPED["wire"]
    position = data.draw(st.integers(0, len(wire) * 8 - 1))
    flipped = bytearray(wire)
    flipped[position // 8] ^= 1 << position % 8
    try:
        commit = received(bytes(flipped))
    except BadMessage:
        return
    assert commit.hash == FLIPPED["hash"]


FLIPPED: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def commit_to_flip(signed_commit: MakeCommit) -> None:
    if not FLIPPED:
        commit = signed_commit(push_s=1 / 3)
        FLIPPED.update(wire=over_the_wire(commit), hash=commit.hash)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_of_a_stranger_are_no_commit(data: bytes) -> None:
    with pytest.raises(BadMessage):
        received(data)


def test_an_opening_id_names_everything_in_it(signed_commit: MakeCommit) -> None:
    opening = signed_commit().opening
    others = [
        opening_with(signed_commit(), **change) for change in (
            {"fragment": 2}, {"version": 5}, {"base": "c" * 64}, {"members": opening.members[::-1]},
            {"parts": [{"start": 0, "end": 5, "owner": 0}]}, {"nonce": "1" * 16}, {"push_s": 7.5},
        )
    ]
    assert len({opening.id, *(other.id for other in others)}) == 1 + len(others)


def test_the_largest_commit_fits_a_message(signed_commit: MakeCommit, keys: list[Keypair]) -> None:
    """64 members, 64 parts: it must still travel as a head of at most 64 KiB."""
    commit = signed_commit()
    many = commit.model_dump()
    many["opening"]["members"] = ["1" * 52] * MAX_MEMBERS
    many["opening"]["parts"] = [{"start": 2**40 - 1, "end": 2**40, "owner": 63}] * MAX_MEMBERS
    many["contributors"] = [{"member": 63, "tokens": 2**40}] * MAX_MEMBERS
    many["results"] = [many["results"][0]] * MAX_MEMBERS
    assert len(frames.pack_head({"m": "commit", "h": {"commit": many}, "n": 0})) < frames.MAX_HEAD_BYTES


def test_the_largest_invitation_fits_a_message(signed_commit: MakeCommit) -> None:
    opening = signed_commit().opening.model_dump()
    opening["parts"] = [{"start": 2**40 - 1, "end": 2**40, "owner": 63}] * MAX_MEMBERS
    opening["members"] = ["1" * 52] * MAX_MEMBERS
    contact = {"peer_id": "1" * 52, "maddrs": ["/ip6/" + "f" * 195] * MAX_MADDRS, "reach": "public"}
    invitation = parse(Invitation, {"opening": opening, "contacts": [contact] * MAX_MEMBERS}).model_dump()
    assert len(frames.pack_head({"m": "open", "h": invitation, "n": 0})) < frames.MAX_HEAD_BYTES
    with pytest.raises(BadMessage, match="malformed Invitation"):
        parse(Invitation, {"opening": opening, "contacts": [contact] * (MAX_MEMBERS + 1)})
