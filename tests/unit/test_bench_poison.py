"""`bench.py poison` at its smallest: poisoners lie in what they contribute and nowhere else, and the table says what it
costs."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

from swarm.config import RunConfig, load_run
from tests.swarm.support import write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches import poison


def small(tmp_path: Path, *, robust: bool = True) -> RunConfig:
    run = load_run(write_run(tmp_path, train={"total_tokens": 1_500}, averaging={"tokens_per_round": 500}))
    return dataclasses.replace(run, averaging=dataclasses.replace(run.averaging, robust=robust))


def swarm(run: RunConfig, attack: str, *, num_peers: int = 4, num_poisoners: int = 1) -> poison.PoisonedSwarm:
    tokens = torch.randint(0, 256, (4_000,), generator=torch.Generator().manual_seed(0))
    found = poison.PoisonedSwarm(
        run, num_peers=num_peers, tokens=tokens, attack=attack, num_poisoners=num_poisoners
    )
    while found.tokens < run.train.total_tokens:
        found.step()
    found.finish()
    return found


def test_all_follow_the_same_rounds_whatever_some_contribute(tmp_path: Path) -> None:
    run = small(tmp_path)
    ends = {}
    for attack in (poison.CLEAN, "x -10", poison.UNHEARD):
        found = swarm(run, attack)
        for fragment in range(run.fragments):
            states = [peer.ledgers[fragment].state for peer in found.peers]
            assert len({state.digest for state in states}) == 1 and states[0].version >= 2
        ends[attack] = states[0]
    assert len({state.digest for state in ends.values()}) == 3, "each attack comes to something else"
    assert ends[poison.UNHEARD].tokens < ends["x -10"].tokens == ends[poison.CLEAN].tokens


def test_what_is_refused_for_its_size_does_as_much_harm_as_what_is_not_heard(tmp_path: Path) -> None:
    """The weights are those of a swarm without it, but for the noise of the codec and the tokens it claims."""
    run = small(tmp_path)
    start = poison.Simulation(run, num_peers=1, tokens=torch.zeros(4_000, dtype=torch.long)).peers[0].ledgers[1].state
    ends = {
        attack: swarm(run, attack).peers[0].ledgers[1].state.weights - start.weights
        for attack in ("x 1000", poison.UNHEARD, poison.CLEAN)
    }
    plain = swarm(small(tmp_path, robust=False), "x 1000").peers[0].ledgers[1].state.weights - start.weights
    assert float(ends["x 1000"].norm()) < 2 * float(ends[poison.CLEAN].norm())
    assert float(plain.norm()) > 20 * float(ends[poison.CLEAN].norm())


def test_attacks_are_what_they_are_called() -> None:
    honest = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([3.0, -2.5, 0.0]), torch.tensor([2.0, -1.5, 0.0])]
    own = torch.tensor([1.0, -1.0, 2.0])
    assert torch.equal(poison.ATTACKS["x -10"](own, honest), -10 * own)
    assert torch.equal(poison.ATTACKS["x -1"](own, honest), -own)
    assert torch.equal(poison.ATTACKS["zeros"](own, honest), torch.zeros(3))
    assert torch.equal(poison.ATTACKS["subtle"](own, honest), torch.tensor([1.0, -1.5, 0.0])), "one deviation back"


def test_the_baseline_is_the_plain_mean_of_honest_peers() -> None:
    assert poison.cases(["zeros"], only_robust=False) == [
        ("none", False), ("none", True), ("zeros", True), ("zeros", False)
    ]
    assert poison.cases(["zeros"], only_robust=True) == [("none", False), ("none", True), ("zeros", True)]


def test_it_measures_and_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(poison, "QUICK_TOKENS", 2_000)
    monkeypatch.setattr(poison, "QUICK_SEQUENCES", 4)
    options = argparse.Namespace(
        run=str(write_run(tmp_path, averaging={"tokens_per_round": 32_000})), quick=True, swarms=["4:1"], seeds=3,
        tokens=10**9, attacks=["x -10"], tokens_per_round=600, only_robust=False,
    )
    result = poison.measure(options)
    assert result["tokens"] == 2_000 and result["seeds"] == 1 and result["tokens_per_round"] == 600
    assert [(row["attack"], row["robust"], row["poisoners"]) for row in result["rows"]] == [
        ("none", False, 0), ("none", True, 0), ("x -10", True, 1), ("x -10", False, 1)
    ]
    assert result["rows"][0]["gap_percent"] == [0.0]
    defended, plain = (result["rows"][place]["gap_percent"][0] for place in (2, 3))
    assert abs(defended) < 20 and (plain is None or plain > defended), "a plain mean goes backwards"
    lines = poison.table(result).splitlines()
    assert len(lines) == 2 + 4 + 2 and lines[2].startswith("| 0 of 4 | none | plain mean |")


def test_a_run_that_was_destroyed_is_no_number() -> None:
    row = poison.row((8, 3, "x 1000", False), [2.0, math.inf], [1.9, 2.0])
    assert row["losses"] == [2.0, None] and row["gap_percent"] == [5.263, None]
    text = poison.table({"rows": [row], "tokens": 10, "tokens_per_round": 5})
    assert "| 3 of 8 | x 1000 | plain mean | 2.0000, destroyed | +5.26, destroyed |" in text


@pytest.mark.parametrize("text", ["", "4", "4:", "4:4", "a:b", "100:1", "-1:0"])
def test_nonsense_is_no_swarm(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 4:1"):
        poison.swarm_of(text)
