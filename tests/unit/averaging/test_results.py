"""What a peer keeps of past rounds for those who are behind: bounded, and without a gap."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from swarm.averaging.messages import Commit
from swarm.averaging.results import KEPT_COMMITS, Fates, History, Results

MakeCommit = Callable[..., Commit]


def test_results_are_found_by_their_hash() -> None:
    results = Results()
    key = results.put(b"bytes")
    assert key == hashlib.sha256(b"bytes").hexdigest() == results.put(b"bytes")
    assert results.get(key) == b"bytes"
    assert results.get("0" * 64) is None and results.get("None") is None


def test_results_stay_within_their_bytes_and_lose_the_oldest_first() -> None:
    results = Results(kept_bytes=100)
    keys = [results.put(bytes([i]) * 30) for i in range(5)]
    assert [results.get(key) is not None for key in keys] == [False, False, True, True, True]
    for _ in range(10):
        results.put(bytes([4]) * 30)  # the same again takes no room
    assert results.get(keys[2]) is not None
    large = results.put(b"x" * 500)
    assert results.get(large) is not None, "the newest is kept, or nobody could gather it"
    assert all(results.get(key) is None for key in keys)


def test_history_leads_on_without_a_gap(signed_commit: MakeCommit) -> None:
    history = History()
    commits = {version: signed_commit(version=version) for version in (3, 4, 5, 7)}
    for version, commit in commits.items():
        history.add(commit, f"{version:064x}")
    assert history.since(2, limit=9) == [commits[3], commits[4], commits[5]]
    assert history.since(2, limit=2) == [commits[3], commits[4]]
    assert history.since(5, limit=9) == [] == history.since(0, limit=9) == history.since(7, limit=9)
    assert history.since(6, limit=9) == [commits[7]]
    assert history.commit(4) is commits[4] and history.commit(6) is None


def test_history_is_bounded_and_keeps_the_newest(signed_commit: MakeCommit) -> None:
    history = History()
    commit = signed_commit()
    for version in range(1, KEPT_COMMITS * 6):
        opening = commit.opening.model_copy(update={"version": version})
        history.add(commit.model_copy(update={"opening": opening}), f"{version:064x}")
    last = KEPT_COMMITS * 6 - 1
    assert len(history.since(last - KEPT_COMMITS, limit=10**6)) == KEPT_COMMITS
    assert history.since(last - KEPT_COMMITS - 1, limit=10**6) == []
    older = last - KEPT_COMMITS * 2
    assert history.knows(last, f"{last:064x}") and history.knows(older, f"{older:064x}")
    assert not history.knows(1, f"{1:064x}"), "digests are let go too, later"


def test_a_replaced_commit_is_forgotten(signed_commit: MakeCommit) -> None:
    """A peer attests only what is in its history now."""
    history = History()
    worse, better = signed_commit(nonce=1), signed_commit(nonce=2)
    history.add(worse, "a" * 64)
    assert history.knows(4, "a" * 64)
    history.add(better, "b" * 64)
    assert history.knows(4, "b" * 64) and not history.knows(4, "a" * 64)
    assert history.since(3, limit=9) == [better]


def test_after_a_jump_nothing_of_the_old_history_is_attested(signed_commit: MakeCommit) -> None:
    history = History()
    history.add(signed_commit(version=9), "a" * 64)
    history.move_over(Fates(), 8, "c" * 64)  # another history, fewer versions, more tokens
    assert history.knows(8, "c" * 64) and not history.knows(9, "a" * 64)
    assert history.since(8, limit=9) == [] and history.commit(9) is None


def test_what_is_common_to_both_is_still_attested_and_what_is_new_is_known(signed_commit: MakeCommit) -> None:
    history = History()
    for version in range(1, 7):
        history.add(signed_commit(version=version), f"{version}" * 64)
    new = tuple(signed_commit(version=version, base=base * 64, nonce=7) for version, base in ((4, "3"), (5, "a")))
    history.move_over(Fates(common=3, commits=new), 5, "b" * 64)
    assert history.knows(3, "3" * 64) and history.passes(4, "a" * 64) and history.knows(5, "b" * 64)
    assert not history.knows(4, "a" * 64), "what others say of the way there is not attested"
    assert not history.copy().knows(4, "a" * 64)
    assert not history.passes(4, "4" * 64) and not history.knows(6, "6" * 64) and history.commit(6) is None
    assert [commit.opening.version for commit in history.since(0, limit=9)] == [1, 2, 3, 4, 5]
    assert history.since(3, limit=9) == list(new)


def test_where_nobody_can_tell_what_is_common_only_the_new_is_attested(signed_commit: MakeCommit) -> None:
    history = History()
    history.add(signed_commit(version=1), "1" * 64)
    new = (signed_commit(version=3, base="2" * 64),)
    history.move_over(Fates(commits=new), 3, "3" * 64)
    assert not history.knows(1, "1" * 64) and history.knows(3, "3" * 64)
    assert history.since(2, limit=9) == list(new) and history.since(0, limit=9) == []
