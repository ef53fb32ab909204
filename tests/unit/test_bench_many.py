"""`bench.py many`: what its figures are made of. Real peers: tests/swarm/test_many.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench
from benches import many


def peer(number: int, **more: Any) -> dict[str, Any]:
    return {
        "number": number, "known": 1, "version": 2, "digest": "a", "tokens": 300, "pending": 50, "trained": 200,
        "bytes_sent": 10,
    } | more


def a_round(version: int, at: float, **more: Any) -> dict[str, Any]:
    return {"version": version, "at": at, "digest": "a", "contributors": 2, "seconds": 1.0, "tokens": 1} | more


def test_nothing_is_lost_where_all_adds_up() -> None:
    rounds = [
        [a_round(1, 5.0, contributors=1), a_round(2, 12.0), a_round(3, 20.0, seconds=4.0)],
        [a_round(2, 12.5, seconds=2.0), a_round(3, 20.0)],
    ]
    found = many.summary([peer(0), peer(1)], rounds, since=10.0)
    assert (found["rounds"], found["whole_rounds"]) == (2, 2), "the first one was before all had met"
    assert found["round_s"]["values"] == [2.0, 4.0], "a round takes as long as at the slowest peer"
    assert (found["trained_tokens"], found["committed_tokens"], found["pending_tokens"]) == (400, 300, 100)
    assert found["lost_tokens"] == found["left_behind"] == 0 and found["heads"] == found["truths_of_a_version"] == 1


def test_what_is_wrong_is_seen() -> None:
    peers = [peer(0), peer(1, version=1, digest="b", trained=250)]
    rounds = [[a_round(1, 11.0)], [a_round(1, 11.0, digest="c", contributors=1)]]
    found = many.summary(peers, rounds, since=10.0)
    assert found["lost_tokens"] == 50 and found["left_behind"] == 1
    assert found["heads"] == 2 and found["truths_of_a_version"] == 2
    assert many.summary(peers, [[], []], since=0.0)["contributors"] is None


def test_its_table_has_no_figures_where_there_was_no_round() -> None:
    found = many.summary([peer(0), peer(1)], [[], []], since=0.0)
    more = {
        "peers": 2, "met_s": 3.0, "least_known": 1, "bytes_sent_per_peer_s": 2500.0, "cores": 0.5, "memory_bytes": 4e9
    }
    assert "| 2 | 3 | 0 | 0 |  |  | 0 | 0 | 1 | 1 | 2.5 | 0.50 | 4.0 |" in many.table(found | more)


@pytest.mark.parametrize("words", [["--peers", "1"], ["--processes", "0"], ["--round-s", "0"], ["--seconds", "-1"]])
def test_what_cannot_be_measured_is_refused_at_once(words: list[str], tmp_path: Path, capsys: Any) -> None:
    assert bench.main(["many", *words, "--out", str(tmp_path / "out.json")]) == 2
    assert "--peers must be at least 2" in capsys.readouterr().err
