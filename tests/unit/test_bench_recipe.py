"""The recipe benchmark's own arithmetic and documents; that it runs is seen with --quick."""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from bench import BENCHES
from benches import recipe
from local_swarm import LocalPeer, environment
from make_small_data import FOLDER, write

from swarm.asking.target import opened
from swarm.config import run_from_dict
from swarm.errors import SwarmError
from swarm.host.presets import preset_path
from swarm.train import run_source


@pytest.fixture
def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(preset_path(f"runs/{recipe.RUN_FILE}").read_text(encoding="utf-8"))
    return found


def evaluation(*rights: float, loss: float = 1.0) -> dict[str, Any]:
    names = ("p3", "ni", "cot")[: len(rights)]
    return {
        "tasks": [{"name": name, "questions": 10 * (place + 1), "quasi_exact_match": right}
                  for place, (name, right) in enumerate(zip(names, rights, strict=True))],
        "held_out": [{"source": "p3", "objective": how, "nats_per_token": loss} for how in ("prefix", "causal")],
    }


def peer(number: int, **progress: Any) -> LocalPeer:
    process: Any = None  # a peer that has ended: nothing is asked of its process
    found = LocalPeer(number, Path("home"), process)
    found.hear({"event": "progress", "tokens": 0, "swarm_tokens": 0, "loss": None, "bytes_sent": 0, **progress})
    return found


def test_it_is_one_of_the_benches_with_options_of_its_own() -> None:
    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    options = parser.parse_args(["--tokens", "1000"])
    assert BENCHES["recipe"] is recipe and options.tokens == 1000
    assert options.examples > 0 and options.sequences > 0 and options.limit > 60


def test_the_parts_are_two_whole_peers_and_two_halves_of_the_runs_fragments(document: dict[str, Any]) -> None:
    every = document["fragments"]
    parts = [tuple(map(int, part.split(":"))) for part in recipe.PARTS]
    assert parts.count((0, every)) == 2 and len(parts) == 4
    assert [part for part in parts if part != (0, every)] == [(0, every // 2), (every // 2, every)]


def test_a_run_of_other_length_keeps_the_shares_of_its_phases(document: dict[str, Any]) -> None:
    before, total = copy.deepcopy(document), document["train"]["total_tokens"]
    made = recipe.with_tokens(document, total // 10)
    assert document == before
    assert made["train"]["total_tokens"] == total // 10
    assert made["train"]["warmup_tokens"] == pytest.approx(document["train"]["warmup_tokens"] / 10, abs=1)
    assert made["phases"][0]["tokens"] == pytest.approx(document["phases"][0]["tokens"] / 10, abs=1)
    assert "tokens" not in made["phases"][-1]
    assert made["train"]["learning_rate"] == document["train"]["learning_rate"]
    assert recipe.with_tokens(document, total) == document
    assert run_from_dict(made, origin="test").train.total_tokens == total // 10


def test_the_ablation_differs_in_nothing_but_the_objectives(document: dict[str, Any]) -> None:
    made = recipe.causal_only(document)
    assert [phase["objective"] for phase in made["phases"]] == ["causal"] * len(document["phases"])
    assert document["phases"][-1]["objective"] == "prefix"  # the original is as it was
    for old, new in zip(document["phases"], made["phases"], strict=True):
        new["objective"] = old["objective"]
    assert made == document
    assert run_from_dict(recipe.causal_only(document), origin="test").seed == document["seed"]


def test_both_are_measured_under_what_either_ended_with(document: dict[str, Any]) -> None:
    assert recipe.objectives([document, recipe.causal_only(document)]) == ["prefix", "causal"]
    assert recipe.objectives([recipe.causal_only(document)] * 2) == ["causal"]


def test_the_start_is_the_runs_version_0_and_can_be_evaluated(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / FOLDER, examples=20, text_bytes=20_000)
    document["model"]["config"] |= {"n_embd": 16, "n_head": 2, "rotary_dim": 4}
    run = run_from_dict(document, origin="test")
    recipe.write_start(run, tmp_path / "start")
    with opened(tmp_path / "start", device="cpu", say=print) as target:
        digests = target.facts["digests"]
        assert target.tokens == 0 and target.manner.prefix
    assert digests == [state.digest for state in run_source.hold(run).states.values()]


def test_accuracy_counts_each_question_the_same() -> None:
    found = recipe.accuracies(evaluation(1.0, 0.25, 0.5))
    assert found == {"p3": 100.0, "ni": 25.0, "cot": 50.0, "all": 50.0}
    assert list(found)[-1] == "all"
    assert recipe.accuracies(evaluation(0.0)) == {"p3": 0.0, "all": 0.0}


def test_a_loss_is_found_by_source_and_objective() -> None:
    assert recipe.nats_per_token(evaluation(1.0, loss=0.5), ("p3", "prefix")) == 0.5
    missing = recipe.nats_per_token(evaluation(1.0), ("pile", "prefix"))
    assert missing != missing


def test_what_is_said_meanwhile_knows_peers_that_have_no_loss_yet() -> None:
    peers = [peer(0, swarm_tokens=12_000, loss=2.5), peer(1, swarm_tokens=9_000)]
    assert recipe.said(peers) == "12,000 tokens, losses 2.50, nan"


def test_the_outcome_sums_up_what_the_peers_said() -> None:
    peers = [
        peer(0, swarm_tokens=1_000, tokens=700, bytes_sent=5_000), peer(1, swarm_tokens=900, tokens=300, bytes_sent=10),
    ]
    for one in peers:
        one.hear({"event": "round", "fragment": 0, "version": 3, "digest": "aa"})
    peers[1].hear({"event": "warning", "text": "so it goes"})
    found = recipe.outcome(peers, seconds=4.0)
    assert found["tokens"] == 1_000 and found["tokens_per_s"] == 250 and found["rounds"] == 3
    assert found["trained"] == [700, 300] and found["bytes_sent"] == [5_000, 10]
    assert found["digests_agree"] and found["warnings"] == ["peer 1: so it goes"]
    peers[1].hear({"event": "round", "fragment": 0, "version": 3, "digest": "bb"})
    assert not recipe.outcome(peers, seconds=4.0)["digests_agree"]


def result() -> dict[str, Any]:
    def run(rights: tuple[float, ...], loss: float) -> dict[str, Any]:
        return {
            "tokens": 1_000_000, "seconds": 200.0, "tokens_per_s": 5_000, "rounds": 30, "digests_agree": True,
            "trained": [400_000, 400_000, 100_000, 100_000], "bytes_sent": [10_000_000] * 4, "left": [""] * 4,
            "warnings": [], "evaluation": evaluation(*rights, loss=loss),
        }

    return {
        "tokens": 1_000_000, "parameters": 2_000_000, "parts": list(recipe.PARTS), "ddp_bytes_per_token": 500.0,
        "start": evaluation(0.0, 0.0, 0.0, loss=5.75),
        "runs": {"recipe": run((0.9, 0.8, 0.7), 0.3), "causal only": run((0.4, 0.3, 0.2), 0.6)},
    }


def test_the_table_has_start_recipe_and_ablation_side_by_side() -> None:
    text = recipe.table(result())
    assert "| held out | start | recipe | causal only |" in text
    assert "| p3: right answers, % | 0.0 | 90.0 | 40.0 |" in text
    assert "| all: right answers, % | 0.0 | 76.7 | 26.7 |" in text
    assert "| p3: loss under prefix, nats a token | 5.750 | 0.300 | 0.600 |" in text
    assert "questions: p3 10, ni 20, cot 30" in text
    assert "| 0:2 | 10 MB, 100,000 | 10 MB, 100,000 |" in text


def test_the_table_holds_bytes_against_ddp_and_hides_no_warning() -> None:
    found = result()
    found["runs"]["recipe"] |= {"digests_agree": False, "warnings": ["peer 2: it rains"]}
    text = recipe.table(found)
    assert "a peer sent 10.0 bytes a token, 50.0 times less than the 500 of bf16 DDP" in text
    assert "recipe: 1,000,000 tokens in 200 s (5,000 a second), 30 rounds, digests DISAGREE" in text
    assert "causal only: 1,000,000 tokens in 200 s (5,000 a second), 30 rounds, all digests agree" in text
    assert "warning: peer 2: it rains" in text and text.count("warning") == 1
    json.dumps(found)


def test_what_is_started_in_another_folder_is_this_program(tmp_path: Path) -> None:
    text = recipe.output_of([sys.executable, "-c", "import os, swarm; print(swarm.__file__, os.getcwd())"], tmp_path,
                            timeout_s=60.0)
    file, folder = text.split()
    root = Path(__file__).resolve().parents[2]
    assert Path(file).parents[1] == root and Path(folder) == tmp_path
    assert environment()["PYTHONPATH"].split(os.pathsep)[0] == str(root)


def test_a_program_that_fails_or_takes_too_long_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(SwarmError, match="was not evaluated") as error:
        recipe.output_of([sys.executable, "-c", "raise SystemExit('there is no folder')"], tmp_path, timeout_s=60.0)
    assert "there is no folder" in error.value.why
    with pytest.raises(SwarmError, match="was not evaluated") as error:
        recipe.output_of([sys.executable, "-c", "input()"], tmp_path, timeout_s=0.01)
    assert "more than 0 s" in error.value.why and "--examples" in error.value.do
