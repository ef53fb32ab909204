"""A run of adapters on an nf4 base: exported, evaluated and talked to, with the base where the peer had it, where
`--base` says, or nowhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm import chat, evaluate
from swarm.asking import states
from swarm.asking.states import Weights
from swarm.asking.target import opened
from swarm.errors import ConfigError
from swarm.model.lora import Adapted, is_adapted
from swarm.train import run_source
from tests.unit.asking.support import adapted, make_home, make_weights

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))  # as it is for a script that runs

import export

IDS = torch.tensor([[84, 104, 101, 32]])
auto: Any = AutoModelForCausalLM


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base") / "model"


@pytest.fixture(scope="module")
def weights(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("run"), **adapted(base))


@pytest.fixture(scope="module")
def home(weights: Weights, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a peer that was started with --base."""
    folder = tmp_path_factory.mktemp("home")
    run_source.remember_base(weights.run, make_home(folder, weights), str(base))
    return folder


@pytest.fixture
def bare(weights: Weights, tmp_path: Path) -> Path:
    """Of a peer that nobody told where the base is."""
    make_home(tmp_path / "bare", weights)
    return tmp_path / "bare"


@torch.no_grad()
def test_the_export_is_plain_and_answers_as_the_adapted_model(home: Path, weights: Weights, tmp_path: Path) -> None:
    assert export.main([str(tmp_path / "model"), "--home", str(home), "--json"]) == 0
    model = auto.from_pretrained(tmp_path / "model")
    assert not is_adapted(model) and "lora" not in " ".join(dict(model.named_parameters()))
    trained = weights.load().model
    assert any(isinstance(module, Adapted) for module in trained.modules())
    wanted = trained.eval()(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(state.digest in card for state in weights.states)
    assert "Adapters of rank 2 on a frozen base (nf4)" in card


def test_a_home_is_asked_and_says_what_its_export_says(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(tmp_path / "model"), "--home", str(home)]) == 0
    capsys.readouterr()
    losses, texts = [], []
    for place in (home, tmp_path / "model"):
        assert evaluate.main([str(place), "--device", "cpu", "--sequences", "4", "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["nats_per_token"])
        how = ["--prompt", "The quick", "--temperature", "0", "--max-tokens", "6", "--json"]
        assert chat.main([str(place), "--device", "cpu", *how]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and 4 < losses[0] < 8
    assert texts[0] == texts[1]


def test_where_the_peer_had_none_the_base_is_given(
    bare: Path, base: Path, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "model")
    assert export.main([out, "--home", str(bare)]) == 2
    said = capsys.readouterr().err
    assert "frozen base of fragment 0 is not the one" in said and "--base DIR" in said
    assert not Path(out).exists()
    assert export.main([out, "--home", str(bare), "--base", str(base)]) == 0
    assert evaluate.main([str(bare), "--base", str(base), "--device", "cpu", "--sequences", "2"]) == 0
    assert chat.main([str(bare), "--base", str(base), "--device", "cpu", "--prompt", "a", "--max-tokens", "2"]) == 0
    run_folder = bare / "runs" / weights.run.run_id
    assert not (run_folder / "base.txt").exists(), "who asks writes nothing into a peer's home"
    for place in (run_folder, run_folder / "checkpoints" / "000001"):
        found = states.from_folder(place, base=str(base), say=print)
        assert found.held.base_digests == dict(enumerate(weights.run.base_digests))


def test_a_base_that_is_none(home: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="there is no folder") as caught:
        states.from_folder(home, base=str(tmp_path / "nowhere"), say=print)
    assert "--base" in caught.value.why and caught.value.do
    other = make_weights(tmp_path / "run", name="whole")
    make_home(tmp_path / "whole", other)
    with pytest.raises(ConfigError, match="--base is not for this run"):
        states.from_folder(tmp_path / "whole", base=str(base), say=print)
    with pytest.raises(ConfigError, match="--base is for a home"), opened(base, base=str(base), say=print):
        pass
    for program in (evaluate, chat):
        with pytest.raises(SystemExit):
            program.main(["--base", str(base), "--initial-peers", "/ip4/1.2.3.4/tcp/1/p2p/x"])
        assert "a live swarm has its own" in capsys.readouterr().err
