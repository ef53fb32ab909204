"""What a peer holds of a run: all fragments, or some, each under its index in the run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from swarm.averaging.global_state import GlobalState
from swarm.config import AveragingConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from swarm.train.run_source import Held, hold, load_states, matches_start


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


def stage_of(held: Held, first: int, end: int) -> Held:
    """The same, as a peer with the stage [first, end) has it."""
    indices = range(first, end)
    layouts, states = {i: held.layouts[i] for i in indices}, {i: held.states[i] for i in indices}
    return Held(held.model, held.fragments[first:end], layouts, states)


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
    assert matches_start(odd, stage_of(held, 1, 3)) == {1: True, 2: False}
    assert matches_start(odd, stage_of(held, 3, 4)) == {3: True}, "not compared with the first one's"


@pytest.mark.parametrize(("first", "end"), [(0, 4), (1, 3), (3, 4)])
def test_states_go_into_the_fragments_that_they_are_of(run: RunConfig, first: int, end: int) -> None:
    held = hold(run)
    before = {name: values.detach().clone() for name, values in held.model.named_parameters()}
    stage = stage_of(held, first, end)
    load_states(stage, [moved(state) for state in stage.states.values()])
    inside = {slot.name for index in range(first, end) for slot in held.layouts[index].slots}
    for name, values in held.model.named_parameters():
        assert torch.equal(values, before[name] + 1.0 if name in inside else before[name]), name


def test_some_of_the_fragments_held_may_be_loaded(run: RunConfig) -> None:
    held = hold(run)
    before = held.layouts[0].flatten(dict(held.model.named_parameters()))
    load_states(held, [moved(held.states[2])])
    parameters = dict(held.model.named_parameters())
    assert torch.equal(held.layouts[0].flatten(parameters), before)
    assert not torch.equal(held.layouts[2].flatten(parameters), held.states[2].weights)
