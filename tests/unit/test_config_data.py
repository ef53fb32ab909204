"""Sources and phases of a run: what they say, what is refused and how, and which phase the swarm is in."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.config import DataConfig, PhaseConfig, SourceConfig, canonical_json, run_from_dict, run_from_json
from swarm.errors import ConfigError

RUN = """
name: mix
model: {config: {model_type: gptj}}
train: {total_tokens: 1000}
sources:
  pile: {files: [pile/*.jsonl.zst]}
  p3: {format: p3, hub: some/p3, revision: refs/convert/parquet, streaming: true}
  ni: {format: natural-instructions, files: [natural-instructions], shots: 2}
phases:
  - {tokens: 700, objective: ul2, mixture: {pile: 1}}
  - {objective: prefix, mixture: {pile: 55, p3: 20, ni: 25}}
"""


def run_of(**changes):
    """RUN with some keys replaced; `sources__p3__shots=1`, `phases__0__tokens=5`; a value of None deletes."""
    document = yaml.safe_load(RUN)
    for key, value in changes.items():
        *outer, last = (int(part) if part.isdigit() else part for part in key.split("__"))
        place = document
        for part in outer:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return run_from_dict(document, origin="mix.yaml")


def test_a_run_with_sources_and_phases():
    run = run_of()
    assert run.data is None
    assert run.named_sources() == run.sources
    assert run.sources["p3"].streaming and run.sources["p3"].shots == 4
    first, last = run.all_phases()
    assert first == PhaseConfig(tokens=700, objective="ul2", mixture={"pile": 1.0})
    assert last.tokens is None and last.mixture == {"pile": 0.55, "p3": 0.2, "ni": 0.25}


def test_only_what_is_said_is_spelt():
    """So that keys that come later do not rename the runs from before."""
    document = json.loads(canonical_json(run_of()))
    assert document["sources"]["pile"] == {"files": ["pile/*.jsonl.zst"]}
    assert document["phases"][1] == {"objective": "prefix", "mixture": {"pile": 55.0, "p3": 20.0, "ni": 25.0}}
    assert "data" not in document
    run = run_of()
    assert run_from_json(canonical_json(run), run_id=run.run_id) == run
    assert run_of(sources__ni__split="train").run_id == run.run_id, "what is so anyway makes no other run"
    assert run_of(sources__ni__shots=3).run_id != run.run_id
    assert run_of(phases__1__mixture__pile=56).run_id != run.run_id
    outer = {"outer_learning_rate": 0.7, "outer_momentum": 0.9}  # what they were where they were left open
    said = run_of(averaging=outer)
    assert said.run_id == "mix-b30ce7642780", "pinned: peers of two versions must find the same run"


def test_a_run_with_one_text_has_one_source_and_one_phase():
    run = run_from_dict(
        {"name": "d", "model": {"source": "x"}, "data": {"hub": "a/b", "text_field": "body", "held_out_percent": 3}},
        origin="d.yaml",
    )
    assert run.named_sources() == {"data": SourceConfig(hub="a/b", text_field="body", held_out_percent=3.0)}
    assert run.all_phases() == [PhaseConfig(mixture={"data": 1.0})]
    assert run.phase_at(0) == run.phase_at(10**12) == 0


def test_the_one_text_may_be_learnt_in_phases():
    phases = [{"tokens": 10, "objective": "ul2r"}, {}]
    document = {"name": "d", "model": {"source": "x"}, "data": {"stdlib": True}, "phases": phases}
    run = run_from_dict(document, origin="d.yaml")
    assert [phase.objective for phase in run.all_phases()] == ["ul2r", "causal"]
    assert all(phase.mixture == {"data": 1.0} for phase in run.all_phases())


def test_a_mixture_that_is_not_given_is_even():
    run = run_of(phases__0__mixture=None)
    assert run.all_phases()[0].mixture == dict.fromkeys(("pile", "p3", "ni"), 1 / 3)


@pytest.mark.parametrize(
    ("tokens", "phase"), [(0, 0), (699, 0), (700, 1), (999, 1), (1000, 1), (10**9, 1)]
)  # fmt: skip
def test_phases_follow_each_other_by_swarm_tokens(tokens, phase):
    assert run_of().phase_at(tokens) == phase
    assert run_of(phases__1__tokens=300).phase_at(tokens) == phase


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6), tokens=st.integers(0, 400))
def test_each_token_is_in_the_phase_that_holds_it(lengths, tokens):
    document = {
        "name": "d", "model": {"source": "x"}, "data": {"stdlib": True}, "train": {"total_tokens": sum(lengths)},
        "phases": [{"tokens": length} for length in lengths],
    }  # fmt: skip
    run = run_from_dict(document, origin="d.yaml")
    everyone = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert run.phase_at(tokens) == (everyone[tokens] if tokens < sum(lengths) else len(lengths) - 1)


REFUSED = [
    ({"sources__p3__format": "p4"}, ["sources.p3.format", "natural-instructions", "'p4'"]),
    ({"sources__pile__stdlib": True}, ["sources.pile.stdlib excludes files and hub"]),
    ({"sources__p3__hub": None}, ["sources.p3 needs stdlib, files or hub"]),
    ({"sources__p3__shots": -1}, ["sources.p3.shots"]),
    ({"sources__p3__shots": 65}, ["sources.p3.shots must be 0 to 64"]),
    ({"sources__p3__shots": "two"}, ["sources.p3.shots must be int", "'two'"]),
    ({"sources__p3__held_out_percent": 0}, ["sources.p3.held_out_percent"]),
    ({"sources__p3__shot": 1}, ["unknown key 'sources.p3.shot'", "shots"]),
    ({"sources__P3": {"hub": "x"}}, ["a name in sources", "'P3'"]),
    ({"sources__code": {"stdlib": True, "format": "p3"}}, ["sources.code.stdlib"]),
    ({"sources__code": {"stdlib": True, "streaming": True}}, ["sources.code.stdlib"]),
    ({"sources__code": {"stdlib": True}}, ["sources.code: no phase mixes it"]),
    ({"sources__code": 3}, ["sources.code must be keys and values"]),
    ({"sources": ["a"]}, ["sources must be dict"]),
    ({"sources": {3: {"stdlib": True}}}, ["every key in sources must be text"]),
    ({"data": {"stdlib": True}}, ["exactly one of data and sources"]),
    ({"phases__0__objective": "ul3"}, ["phases[0].objective", "ul2r", "'ul3'"]),
    ({"phases__0__mixture": {"pil": 1}}, ["phases[0].mixture names no source", "'pil'", "pile, p3, ni"]),
    ({"phases__0__mixture": {"pile": 0}}, ["phases[0].mixture", "over 0"]),
    ({"phases__0__mixture": {"pile": "much"}}, ["phases[0].mixture.pile must be float", "'much'"]),
    ({"phases__0__tokens": 0}, ["phases[0].tokens"]),
    ({"phases__0__tokens": None}, ["phases[0].tokens is missing"]),
    ({"phases__0__tokens": 1000}, ["phases[1] never begins", "train.total_tokens is 1000"]),
    ({"phases__1__tokens": 200}, ["do not add up to train.total_tokens", "900 and 1000"]),
    ({"phases__1__token": 200}, ["unknown key 'phases[1].token'", "tokens"]),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_cannot_be_is_refused_by_the_name_of_its_key(changes, says):
    with pytest.raises(ConfigError) as caught:
        run_of(**changes)
    text = str(caught.value)
    assert text.startswith("mix.yaml: ")
    assert all(part in text for part in says), text


def test_every_key_of_data_is_one_of_a_source_too():
    assert {f.name for f in dataclasses.fields(DataConfig)} <= {f.name for f in dataclasses.fields(SourceConfig)}
