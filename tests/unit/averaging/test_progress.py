"""How many tokens the others have for the next round: statuses, the time since, and what commits took off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging.messages import Commit
from swarm.averaging.progress import MAX_EXTRAPOLATION_S, Progress
from swarm.network.keys import Keypair

MakeCommit = Callable[..., Commit]
BASE, NEW = "b" * 64, "n" * 64


def heard(
    progress: Progress, peer_id: str, *, pending: int = 100, version: int = 3, digest: str = BASE, speed: float = 0.0,
    leaving: bool = False, now: float = 0.0,
) -> None:
    progress.heard(
        peer_id, version=version, digest=digest, pending=pending, tokens_per_s=speed, leaving=leaving, now=now
    )


def test_between_statuses_a_peer_goes_on_at_its_speed() -> None:
    progress = Progress()
    heard(progress, "a", pending=100, speed=50.0, now=10.0)
    assert progress.pending(["a"], now=10.0) == {"a": 100.0}
    assert progress.pending(["a"], now=12.0) == {"a": 200.0}
    longest = 100 + 50 * MAX_EXTRAPOLATION_S
    assert progress.pending(["a"], now=1e6) == {"a": longest}, "but not for ever: it may be dead"
    assert progress.pending(["a"], now=5.0) == {"a": 100.0}, "a clock that went back takes nothing off"
    heard(progress, "a", pending=130, speed=50.0, now=11.0)
    assert progress.pending(["a"], now=11.0) == {"a": 130.0}, "a status says it better"
    assert progress.pending(["nobody"], now=0.0) == {}


def test_a_commit_takes_off_what_it_absorbed(signed_commit: MakeCommit, keys: list[Keypair]) -> None:
    commit = signed_commit(tokens={0: 100, 2: 50})  # version 4, members 0, 1 and 2
    a, b, c, outsider = (key.peer_id for key in keys[:4])
    progress = Progress()
    for peer_id, pending in ((a, 130), (b, 70), (c, 30), (outsider, 90)):
        heard(progress, peer_id, pending=pending, speed=10.0, now=0.0)
    progress.committed(commit, NEW, now=1.0)
    assert progress.pending([a, b, c, outsider], now=1.0) == {a: 40.0, b: 80.0, c: 0.0, outsider: 100.0}
    assert sorted(progress.at(NEW, [a, b, c, outsider])) == sorted([a, b, c])
    assert progress.at(BASE, [a, b, c, outsider]) == [outsider], "it was not in that round"
    assert progress.pending([a], now=2.0) == {a: 50.0}


def test_a_status_from_before_the_commit_is_ignored(signed_commit: MakeCommit, keys: list[Keypair]) -> None:
    """Or the tokens of the last round would be counted for the next one too, and open it at once."""
    a = keys[0].peer_id
    progress = Progress()
    heard(progress, a, pending=100)
    progress.committed(signed_commit(), NEW, now=1.0)
    heard(progress, a, pending=100, version=3, digest=BASE, now=1.1)
    assert progress.pending([a], now=1.1)[a] == 0 and progress.at(NEW, [a]) == [a]
    heard(progress, a, pending=5, version=4, digest=NEW, now=1.2)
    assert progress.pending([a], now=1.2)[a] == 5


def test_a_commit_of_another_version_changes_nothing(signed_commit: MakeCommit, keys: list[Keypair]) -> None:
    a = keys[0].peer_id
    progress = Progress()
    heard(progress, a, pending=100, version=9, digest="9" * 64)
    progress.committed(signed_commit(), NEW, now=1.0)
    assert progress.pending([a], now=1.0) == {a: 100.0} and progress.at("9" * 64, [a]) == [a]


def test_who_leaves_has_stopped_training(keys: list[Keypair]) -> None:
    progress = Progress()
    heard(progress, "a", pending=10, speed=1000.0, leaving=True)
    assert progress.pending(["a"], now=2.0) == {"a": 10.0}
    assert progress.leaving(["a", "b"])
    heard(progress, "a", pending=0, leaving=True)
    assert not progress.leaving(["a"]), "it has nothing left to wait for"
    heard(progress, "a", pending=10)
    assert not progress.leaving(["a"])


def test_who_does_not_hold_the_fragment_is_neither_asked_nor_kept() -> None:
    progress = Progress()
    heard(progress, "a")
    heard(progress, "b")
    assert progress.at(BASE, ["b", "unknown"]) == ["b"]
    progress.forget("a")
    progress.forget("unknown")
    assert progress.at(BASE, ["a", "b"]) == ["b"] and progress.pending(["a", "b"], now=0.0) == {"b": 100.0}
    heard(progress, "a", version=5, digest=NEW)
    progress.forget("a")
    heard(progress, "a", version=3, now=0.1)
    assert progress.at(BASE, ["a"]) == ["a"], "it holds it again, from where it is now"


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.integers(0, 10**9), st.floats(0, 1e9), st.floats(0, 100), st.floats(0, 100))
def test_an_estimate_never_shrinks_by_itself_and_is_bounded(
    pending: int, speed: float, one: float, two: float
) -> None:
    progress = Progress()
    heard(progress, "a", pending=pending, speed=speed)
    early, late = (progress.pending(["a"], now=now)["a"] for now in sorted((one, two)))
    assert pending <= early <= late <= pending + speed * MAX_EXTRAPOLATION_S


@pytest.mark.parametrize("tokens", [50, 100, 500])
def test_what_is_left_is_never_negative(signed_commit: MakeCommit, keys: list[Keypair], tokens: int) -> None:
    progress = Progress()
    heard(progress, keys[0].peer_id, pending=100)
    progress.committed(signed_commit(tokens={0: tokens}), NEW, now=0.0)
    assert progress.pending([keys[0].peer_id], now=0.0) == {keys[0].peer_id: max(0.0, 100.0 - tokens)}
