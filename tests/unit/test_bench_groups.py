"""`bench.py groups` in small: one truth whoever dies, exact means, nobody counted twice, bounded bytes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from swarm.config import AveragingConfig
from swarm.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench
from benches import groups as bench_groups
from benches.groups_world import Round, moshpit

PLAIN = AveragingConfig(robust=False)


def played(count: int, dying: float, seed: int = 0, averaging: AveragingConfig = PLAIN) -> dict[str, float]:
    return Round(count, averaging, dying=dying, num_blocks=1, seed=seed).play()


def test_one_butterfly_of_64_sends_what_it_should() -> None:
    figures = played(64, 0.0)
    assert (figures["levels"], figures["groups"], figures["legs"]) == (1, 1, 2)
    assert figures["sent_mean"] == figures["sent_most"] == pytest.approx(1.0)
    assert figures["contributed"] == figures["told"] == figures["truths"] == 1


@pytest.mark.parametrize("count", [65, 300, 600])
def test_without_deaths_all_contribute_and_the_mean_is_exact(count: int) -> None:
    figures = played(count, 0.0)
    assert (figures["levels"], figures["legs"], figures["repairs"]) == (2, 4, 0)
    assert figures["contributed"] == figures["told"] == figures["truths"] == 1 and figures["counted_twice"] == 0
    assert figures["error"] < 1e-6
    assert 1 < figures["sent_mean"] < 1.3 and figures["sent_most"] < 3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dying", [0.05, 0.2])
def test_whoever_dies_there_is_one_truth_and_most_contribute(dying: float, seed: int) -> None:
    figures = played(300, dying, seed)
    assert figures["committed"] == figures["truths"] == figures["told"] == 1 and figures["counted_twice"] == 0
    assert figures["contributed"] > 1 - 1.5 * dying and figures["error"] < 1e-3
    assert figures["repairs"] > 0 and figures["sent_mean"] < 1.5


@pytest.mark.parametrize("seed", range(6))
def test_where_all_die_there_is_one_result_or_none(seed: int) -> None:
    figures = played(70, 1.0, seed)
    assert figures.get("truths", 0) <= 1 and figures.get("counted_twice", 0) == 0
    assert figures["committed"] == int("truths" in figures)


def test_a_robust_mean_of_honest_peers_is_near_the_exact_one() -> None:
    assert played(200, 0.0, averaging=AveragingConfig(robust=True))["error"] < 0.2


def test_moshpit_is_exact_on_a_full_grid_and_parts_where_peers_are_missing() -> None:
    full, missing = moshpit(16 * 16, dying=0.0, seed=0), moshpit(16 * 16, dying=0.1, seed=0)
    assert full["axes"] == 2 and full["error"] < 1e-9 and full["truths"] == 1
    assert missing["truths"] > 5 and missing["error"] > 1e-3 < missing["spread"]


def test_its_table_and_what_it_refuses(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.json"
    words = ["groups", "--quick", "--peers", "70", "--dying", "0", "5", "--blocks", "1", "--out", str(out)]
    assert bench.main(words) == 0 and out.exists()
    said = capsys.readouterr().out
    assert "| 70 | 0 | 2 | 4 | 1." in said and "| 70 | 5 | 2 |" in said
    for wrong in (["--peers", "0"], ["--dying", "100"], ["--seeds", "0"]):
        assert bench.main(["groups", *wrong]) == 2
        assert "--peers" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        bench_groups.measure(argparse.Namespace(peers=[1], dying=[-1.0], blocks=1, seeds=1, quick=True))
