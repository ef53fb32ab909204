"""What a peer holds of a run: all fragments, or some, each under its index in the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from swarm.averaging.global_state import GlobalState
from swarm.config import AveragingConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from swarm.errors import ConfigError
from swarm.train.run_source import hold, load_states, matches_start, new_run


@pytest.fixture
def run() -> RunConfig:
    """Four blocks in four fragments."""
    config = {
        "model_type": "gptj", "n_layer": 4, "n_embd": 16, "n_head": 2, "rotary_dim": 8, "n_positions": 32,
        "vocab_size": 257,
    }
    return RunConfig(
        name="test", model=ModelConfig(config=config), fragments=4, data=DataConfig(stdlib=True),
        train=TrainConfig(total_tokens=1000), averaging=AveragingConfig(),
    )


def moved(state: GlobalState) -> GlobalState:
    return dataclasses.replace(state, version=3, tokens=30, weights=state.weights + 1.0)


def test_a_whole_holder_has_each_fragment_under_its_index(run: RunConfig) -> None:
    held = hold(run)
    assert list(held.layouts) == list(held.states) == [fragment.index for fragment in held.fragments] == [0, 1, 2, 3]
    parameters = dict(held.model.named_parameters())
    for index, state in held.states.items():
        assert (state.fragment, state.version, state.tokens) == (index, 0, 0)
        for name, values in held.layouts[index].views(state.weights):
            assert torch.equal(values, parameters[name])


def test_two_machines_draw_the_same_start(run: RunConfig) -> None:
    assert [s.digest for s in hold(run).states.values()] == [s.digest for s in hold(run).states.values()]


def test_the_start_is_compared_fragment_by_fragment(run: RunConfig) -> None:
    held = hold(run)
    assert matches_start(run, held) == dict.fromkeys(range(4), True), "a run that names none"
    digests = [held.states[index].digest for index in range(4)]
    odd = dataclasses.replace(run, initial_digests=[*digests[:2], "0" * 64, digests[3]])
    assert matches_start(odd, held) == {0: True, 1: True, 2: False, 3: True}
    assert matches_start(odd, hold(run, part=(1, 3))) == {1: True, 2: False}
    assert matches_start(odd, hold(run, part=(3, 4))) == {3: True}, "not compared with the first one's"


@pytest.mark.parametrize(("first", "end"), [(0, 4), (1, 3), (3, 4)])
def test_states_go_into_the_fragments_that_they_are_of(run: RunConfig, first: int, end: int) -> None:
    whole = dict(hold(run).model.named_parameters())
    part = hold(run, part=(first, end))
    assert list(part.states) == list(part.layouts) == list(range(first, end))
    assert all(torch.equal(values, whole[name]) for name, values in part.stage.held()), "drawn as in the whole model"
    load_states(part, [moved(state) for state in part.states.values()])
    names = {slot.name for layout in part.layouts.values() for slot in layout.slots}
    assert names == {name for name, _ in part.stage.held()}
    assert all(torch.equal(values, whole[name] + 1.0) for name, values in part.stage.held())


def test_some_of_the_fragments_held_may_be_loaded(run: RunConfig) -> None:
    held = hold(run)
    before = held.layouts[0].flatten(dict(held.model.named_parameters()))
    load_states(held, [moved(held.states[2])])
    parameters = dict(held.model.named_parameters())
    assert torch.equal(held.layouts[0].flatten(parameters), before)
    assert not torch.equal(held.layouts[2].flatten(parameters), held.states[2].weights)


def test_a_start_of_parts_names_the_digests_of_the_whole(run: RunConfig, tmp_path: Path) -> None:
    """Whoever starts a run need not be able to hold it."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({
        "name": "test", "fragments": 4, "model": {"config": run.model.config}, "data": {"stdlib": True},
    }))
    whole, _ = new_run(str(file))
    parts, held = new_run(str(file), choose=lambda run: (1, 2))
    assert parts.initial_digests == whole.initial_digests and parts.run_id == whole.run_id
    assert list(held.states) == [1]


def test_fragments_that_the_run_lacks_are_named(run: RunConfig) -> None:
    with pytest.raises(ConfigError, match="no fragments 3:5") as caught:
        hold(run, part=(3, 5))
    assert "the run has 4" in caught.value.why


def test_weights_in_a_folder_need_a_start_that_holds_all(tmp_path: Path, run: RunConfig) -> None:
    hold(run).model.save_pretrained(tmp_path / "model")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({
        "name": "test", "fragments": 4, "model": {"source": str(tmp_path / "model")}, "data": {"stdlib": True},
    }))
    with pytest.raises(ConfigError, match="started by a peer that holds all"):
        new_run(str(file), choose=lambda run: (0, 2))
    assert list(new_run(str(file), choose=lambda run: (0, 4))[1].states) == [0, 1, 2, 3]
