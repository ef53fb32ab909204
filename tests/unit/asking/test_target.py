"""What TARGET may be: an export, any Hugging Face folder, a home, a checkpoint; all answer alike, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swarm.asking import release
from swarm.asking.answerer import chooser, encode, write
from swarm.asking.states import Weights
from swarm.asking.target import Target, opened, run_of_export
from swarm.errors import ConfigError, JoinError
from swarm.model.export import RUN_FILE
from tests.unit.asking.support import make_home, make_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def places(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("places")
    run_folder = make_home(folder / "home", weights)
    release.write(weights, folder / "export")
    yield {"home": folder / "home", "checkpoint": run_folder / "checkpoints" / "000001", "export": folder / "export"}


def answers(target: Target) -> list[int]:
    ids = encode(target.tokenizer, "17. The quick")
    return list(write(target.answerer, ids, target.manner, choose=chooser(target.manner), max_tokens=12))


def test_all_places_answer_alike(weights: Weights, places: dict[str, Path]) -> None:
    found, logits = {}, []
    for name, place in places.items():
        with opened(place, device="cpu", say=print) as target:
            found[name] = answers(target)
            logits.append(target.answerer.next_logits([84, 104, 101]))
            assert target.run == weights.run and target.vocabulary == 300
            assert (target.manner.sequence_length, target.manner.end, target.manner.num_tokens) == (32, 256, 257)
            assert not target.manner.prefix and target.manner.mark == ()
            assert target.facts["run_id"] == weights.run.run_id and json.dumps(target.facts)
            assert (target.folder is not None) == (name == "export")
    assert found["home"] == found["checkpoint"] == found["export"] and len(found["home"]) == 12
    assert all(torch.equal(one, logits[0]) for one in logits)


def test_a_checkpoint_says_what_it_is(weights: Weights, places: dict[str, Path]) -> None:
    with opened(places["home"], run_id=weights.run.run_id, say=print) as target:
        assert target.tokens == 1234 and "1,234 tokens" in target.what
        assert target.facts["digests"] == [state.digest for state in weights.states]


def test_a_model_of_somebody_else_has_no_run(places: dict[str, Path], tmp_path: Path) -> None:
    for file in places["export"].iterdir():
        if file.name != RUN_FILE:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with opened(tmp_path, device="cpu", say=print) as target:
        assert target.run is None and run_of_export(tmp_path) is None
        assert target.manner.sequence_length == 128, "its positions are all that is known"
        assert len(answers(target)) == 12


def test_a_run_config_that_is_none(places: dict[str, Path], tmp_path: Path) -> None:
    for file in places["export"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / RUN_FILE).write_text("[]")
    with pytest.raises(ConfigError), opened(tmp_path, device="cpu", say=print):
        pass


@pytest.mark.parametrize(("problem", "says"), [
    ("nowhere", "there is no folder"), ("not a model", "cannot load the model"),
    ("no tokenizer", "cannot load the model"), ("device", "cannot be used"),
])
def test_what_is_wrong_is_said(places: dict[str, Path], tmp_path: Path, problem: str, says: str) -> None:
    folder, device = tmp_path, "cpu"
    if problem == "nowhere":
        folder = tmp_path / "x"
    elif problem == "not a model":
        (tmp_path / "config.json").write_text('{"model_type": "gptj"}')
    elif problem == "no tokenizer":
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((places["export"] / name).read_bytes())
    else:
        folder, device = places["export"], "cuda:77"
    with pytest.raises(ConfigError, match=says) as caught, opened(folder, device=device, say=print):
        pass
    assert caught.value.why and caught.value.do


def test_a_swarm_that_is_not_there() -> None:
    nobody = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    with pytest.raises(JoinError), opened(None, initial_peers=[nobody], join_timeout_s=0.5, say=print):
        pass
