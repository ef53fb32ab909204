"""Weights are found wherever a peer keeps them: its home, a run's folder, one checkpoint. Else an error that helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.asking.states import Weights, from_folder, from_home
from swarm.errors import ConfigError, HomeError, StateError
from swarm.events import Contributors, Warning
from swarm.monitor.journal import Journal
from tests.unit.asking.support import make_home, make_weights, moved


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def home(found: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_home(folder, found)
    return folder


def digests(found: Weights) -> list[str]:
    return [state.digest for state in found.states]


@pytest.mark.parametrize("place", ["", "runs/{run}", "runs/{run}/checkpoints", "runs/{run}/checkpoints/000001"])
def test_each_folder_leads_to_the_same_weights(found: Weights, home: Path, place: str) -> None:
    folder = home / place.format(run=found.run.run_id)
    notes: list[str] = []
    again = from_folder(folder, say=notes.append)
    assert digests(again) == digests(found) and again.run == found.run and notes == []
    assert again.tokens == 1234, "of the fragment that has fewest"


def test_the_newest_is_taken_and_an_older_one_can_be_named(found: Weights, tmp_path: Path) -> None:
    run_folder = make_home(tmp_path, found)
    later = Weights(found.run, found.held, [moved(state, tokens=9999) for state in found.states])
    make_home(tmp_path, later)
    assert from_folder(tmp_path, say=print).tokens == 9999
    assert from_folder(run_folder / "checkpoints" / "000001", say=print).tokens == 1234
    assert from_home(tmp_path, run_id=found.run.run_id, say=print).tokens == 9999


def test_loading_sets_the_model_to_the_states(found: Weights, home: Path) -> None:
    again = from_folder(home, say=print)
    parameters = dict(again.load().model.named_parameters())
    seen = set()
    for state in found.states:
        for name, values in again.held.layouts[state.fragment].views(state.weights):
            assert torch.equal(parameters[name], values.view_as(parameters[name]))
            seen.add(name)
    assert seen == parameters.keys()


def test_a_damaged_checkpoint_is_passed_over_with_a_word(found: Weights, tmp_path: Path) -> None:
    run_folder = make_home(tmp_path, found)
    make_home(tmp_path, found)
    newest = run_folder / "checkpoints" / "000002"
    (newest / "fragment-001.safetensors").write_bytes(b"rubbish")
    notes: list[str] = []
    assert digests(from_folder(tmp_path, say=notes.append)) == digests(found)
    assert "000002 is damaged" in notes[0]
    with pytest.raises(StateError, match="cannot be used") as caught:
        from_folder(newest, say=print)
    assert "hash" in caught.value.why


def test_a_part_of_a_model_is_not_enough(found: Weights, tmp_path: Path) -> None:
    make_home(tmp_path, found, fragments=1)
    with pytest.raises(StateError, match="not the whole model") as caught:
        from_folder(tmp_path, say=print)
    assert "1 of its 2 fragments" in caught.value.why and "--initial-peers" in caught.value.do


def test_without_a_checkpoint(found: Weights, tmp_path: Path) -> None:
    run_folder = make_home(tmp_path, found)
    for file in (run_folder / "checkpoints" / "000001").iterdir():
        file.unlink()
    (run_folder / "checkpoints" / "000001").rmdir()
    with pytest.raises(StateError, match="no checkpoint"):
        from_folder(tmp_path, say=print)


def test_whoever_gave_a_name_is_remembered_by_the_journal(found: Weights, tmp_path: Path) -> None:
    run_folder = make_home(tmp_path, found)
    assert from_folder(tmp_path, say=print).names == [], "there is no journal"
    journal = Journal(run_folder, warn=print)
    for event in (Contributors(["Grace"]), Warning('"contributors" of old'), Contributors(["Ada", "Grace"])):
        journal(event)
    journal.close()
    with journal.path.open("a") as file:
        file.write('{"event": "contributors"}\n{"event": "contributors", "names": 3}\nhalf "contributors" a li')
    assert from_folder(tmp_path, say=print).names == ["Ada", "Grace"]
    assert from_folder(run_folder / "checkpoints" / "000001", say=print).names == ["Ada", "Grace"]


def test_places_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match="no home folder"):
        from_folder(tmp_path / "nowhere", say=print)
    with pytest.raises(HomeError, match="there is no run"):
        from_folder(tmp_path, say=print)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="missing key"):
        from_folder(tmp_path, say=print)
