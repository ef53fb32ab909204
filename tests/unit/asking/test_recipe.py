"""A run of GPT-JT's shape: what its last phase taught decides how it is asked, wherever its weights are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import evaluate
from swarm.asking import release
from swarm.asking.answerer import chooser, encode, write
from swarm.asking.at_hand import AtHand
from swarm.asking.held_out import held_out, losses
from swarm.asking.states import Weights
from swarm.asking.target import opened
from swarm.data.tokenizer import byte_tokenizer
from tests.unit.asking.support import make_home, make_weights, recipe

PROMPT = "a or c? "


@pytest.fixture(scope="module", params=["prefix", "ul2r", "causal"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp(request.param)
    return make_weights(folder, tokens=3000, **recipe(folder, last=request.param))


@pytest.fixture(scope="module")
def export(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    release.write(weights, folder)
    return folder


def last(weights: Weights) -> str:
    return weights.run.phases[-1].objective


def test_it_is_asked_as_its_last_phase_taught(weights: Weights, export: Path, tmp_path: Path) -> None:
    make_home(tmp_path, weights)
    written = []
    for place in (tmp_path, export):
        with opened(place, device="cpu", say=print) as target:
            assert target.manner.prefix is (last(weights) != "causal")
            assert target.manner.mark == ((257,) if last(weights) == "ul2r" else ())
            ids = encode(target.tokenizer, PROMPT)
            written.append(
                list(write(target.answerer, ids, target.manner, choose=chooser(target.manner), max_tokens=12))
            )
    assert written[0] == written[1] and max(written[0]) < 257, "a tokenizer that names the marks changes nothing"


@torch.no_grad()
def test_what_the_card_says_works_with_plain_transformers(weights: Weights, export: Path) -> None:
    """The example in the card is run as it stands, but for the folder and the length."""
    card = (export / "README.md").read_text()
    code = card.split("```python\n")[1].split("\n```")[0]
    code = code.replace('folder = "."', f"folder = {str(export)!r}").replace("max_new_tokens=30", "max_new_tokens=12")
    code = code.replace("Is it positive? I love this! Answer:", PROMPT).replace("print(", "found = (")
    names: dict[str, Any] = {}
    exec(code, names)
    with opened(export, device="cpu", say=print) as target:
        ids = encode(target.tokenizer, PROMPT)
        how = chooser(target.manner)
        wanted = list(write(target.answerer, ids, target.manner, choose=how, max_tokens=12))
    plain: list[int] = names["model"].generate(
        names["ids"], max_new_tokens=12, do_sample=False, suppress_tokens=list(range(257, 300))
    )[0].tolist()
    found = plain[len(names["ids"][0]):]
    assert (found[:-1] if found[-1] == 256 else found) == wanted
    assert isinstance(names["found"], str) and ("is_causal" in code) is (last(weights) != "causal")


def test_the_tokenizer_that_goes_out_names_the_marks(export: Path) -> None:
    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(export)
    assert tokenizer.convert_tokens_to_ids("[S2S]") == 257 and len(tokenizer) == 300
    assert AutoModelForCausalLM.from_pretrained(export).config.vocab_size == 300
    assert tokenizer(PROMPT)["input_ids"] == list(PROMPT.encode())


def test_the_card_has_tokens_by_phase(weights: Weights, export: Path) -> None:
    card = (export / "README.md").read_text()
    for row in ("| 1 | ul2r | pile | 1,000 |", f"| 2 | {last(weights)} | p3 | 500 |", "| pile | 1,500 |"):
        assert row in card
    assert "[S2S]" not in card and ("prefix-lm" in card) is (last(weights) != "causal")


def test_loss_of_each_source_under_each_objective(weights: Weights) -> None:
    run, tokenizer = weights.run, byte_tokenizer()
    batches = held_out(run, tokenizer, vocabulary=300, sequences=6)
    objectives = list(dict.fromkeys(["ul2r", last(weights)]))
    assert set(batches) == {(source, objective) for objective in objectives for source in ("pile", "p3")}
    found = losses(AtHand(weights.load().model), tokenizer, batches)
    assert all(4 < loss.nats_per_token < 9 and loss.targets > 5 for loss in found)
    one = held_out(run, tokenizer, vocabulary=300, objectives=["causal"], sequences=2)
    assert set(one) == {("pile", "causal"), ("p3", "causal")}


def test_the_command_asks_tasks_and_objectives(
    weights: Weights, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--device", "cpu", "--json", "--sequences", "2", "--tasks", "--examples", "4", "--objectives", "prefix"]
    assert evaluate.main([str(export), *how]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(loss["source"], loss["objective"]) for loss in found["held_out"]} == {("pile", "prefix"), ("p3", "prefix")}
    (score,) = found["tasks"]
    assert score["name"] == "p3" and score["questions"] == 4 and 0 <= score["quasi_exact_match"] <= 1


def test_a_run_of_plain_text_has_no_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_home(tmp_path / "home", make_weights(tmp_path / "run"))
    assert evaluate.main([str(tmp_path / "home"), "--device", "cpu", "--no-held-out", "--tasks"]) == 2
    assert "no held-out examples of tasks" in capsys.readouterr().err
