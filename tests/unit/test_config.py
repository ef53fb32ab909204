"""The run config: one spelling, one hash, and no key that means nothing."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.config import (
    LATER_AVERAGING,
    MAX_RUN_CONFIG_BYTES,
    AveragingConfig,
    DataConfig,
    ModelConfig,
    PeerConfig,
    PipelineConfig,
    RunConfig,
    TrainConfig,
    canonical_json,
    load_run,
    run_from_dict,
    run_from_json,
)
from swarm.errors import ConfigError

patient = settings(deadline=None)  # a busy machine is no failure
SMALLEST = {"name": "demo", "model": {"config": {"model_type": "gptj"}}, "data": {"stdlib": True}}


def changed(**parts):
    """SMALLEST with some keys replaced; `train__seed=1` is {"train": {"seed": 1}}."""
    document = json.loads(json.dumps(SMALLEST))
    for key, value in parts.items():
        *outer, last = key.split("__")
        place = document
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return document


def refused(document, origin="run.yaml"):
    with pytest.raises(ConfigError) as caught:
        run_from_dict(document, origin=origin)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- the hash


def test_what_is_said_as_it_is_anyway_makes_no_other_run():
    plain, said = (run_from_dict(changed(**parts), origin="test") for parts in ({}, {"pipeline__activation_bits": 8}))
    assert plain == said and plain.run_id == said.run_id
    four = run_from_dict(changed(pipeline__activation_bits=4), origin="test")
    assert json.loads(canonical_json(four))["pipeline"] == {"activation_bits": 4}
    assert run_from_json(canonical_json(four), run_id=four.run_id) == four != plain


def test_the_run_id_is_the_name_and_a_hash_of_everything():
    run = run_from_dict(SMALLEST, origin="test")
    name, _, digest = run.run_id.rpartition("-")
    assert name == "demo"
    assert len(digest) == 12 and set(digest) <= set("0123456789abcdef")


def test_the_hash_of_a_known_config_never_changes():
    """A peer of an older version must find the same run: a new field with a default breaks this, on purpose."""
    outer = {"outer_learning_rate": 0.7, "outer_momentum": 0.9}  # what it was where it was left open
    run = run_from_dict({**SMALLEST, "averaging": outer}, origin="test")
    document = dataclasses.asdict(
        RunConfig(
            name="demo", model=ModelConfig(config={"model_type": "gptj"}), data=DataConfig(stdlib=True),
            train=TrainConfig(betas=[0.9, 0.95]), averaging=AveragingConfig(**outer),
        )
    )  # fmt: skip
    assert document.pop("pipeline") == {"activation_bits": 8}, "came later: spelt only where it says anything"
    assert (document.pop("sources"), document.pop("phases")) == ({}, []), "so did these"
    assert document.pop("base_digests") == [] and document["model"].pop("lora") is None, "these as well"
    for key in LATER_AVERAGING:
        del document["averaging"][key]
    assert json.loads(canonical_json(run)) == document
    assert run.run_id == "demo-b252d456f4d8"
    assert canonical_json(run).isascii()
    assert b" " not in canonical_json(run)
    assert run_from_dict(SMALLEST, origin="test").run_id != run.run_id, "left open it is the number of rounds that says"


def test_the_order_and_spelling_of_the_yaml_do_not_matter():
    one = run_from_dict(yaml.safe_load("{name: d, data: {stdlib: yes}, model: {source: x}}"), origin="a")
    two = run_from_dict(yaml.safe_load("model:\n  source: x\nname: d\nseed: 0\ndata:\n  stdlib: true\n"), origin="b")
    assert one == two
    assert one.run_id == two.run_id


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"fragments": 5}, {"tokenizer": "gpt2"}, {"train__learning_rate": 0.002},
        {"averaging__bits": 8}, {"data__held_out_percent": 5}, {"model__config": {"model_type": "llama"}},
        {"pipeline__activation_bits": 4}, {"averaging__robust": False},
        {"initial_digests": ["0" * 64] * 4},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_change_makes_another_run(change):
    assert run_from_dict(changed(**change), origin="b").run_id != run_from_dict(SMALLEST, origin="a").run_id


def test_whole_numbers_pass_for_floats_and_make_the_same_run():
    one = run_from_dict(changed(train__clip_norm=1), origin="a")
    assert one.run_id == run_from_dict(changed(train__clip_norm=1.0), origin="b").run_id


runs = st.builds(
    RunConfig,
    name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,39}", fullmatch=True),
    model=st.builds(ModelConfig, source=st.text(max_size=20)),
    data=st.builds(DataConfig, files=st.lists(st.text(max_size=20), min_size=1, max_size=3)),
    seed=st.integers(0, 2**31 - 1),
    fragments=st.integers(1, 256),
    train=st.builds(TrainConfig, learning_rate=st.floats(1e-9, 10), betas=st.tuples(*[st.floats(0, 0.999)] * 2)),
    averaging=st.builds(AveragingConfig, bits=st.sampled_from([2, 4, 8, 32]), tokens_per_round=st.integers(1)),
    pipeline=st.builds(PipelineConfig, activation_bits=st.sampled_from([4, 8, 32])),
)


@patient
@given(run=runs)
def test_a_run_survives_the_network_and_yaml_with_the_same_id(run):
    assert run_from_json(canonical_json(run), run_id=run.run_id) == run
    again = run_from_dict(yaml.safe_load(yaml.safe_dump(json.loads(canonical_json(run)))), origin="yaml")
    assert again.run_id == run.run_id


# --- from the network


def test_a_tampered_run_config_is_told_from_the_real_one():
    run = run_from_dict(SMALLEST, origin="test")
    tampered = canonical_json(dataclasses.replace(run, seed=1))
    with pytest.raises(ConfigError, match="does not match its run_id") as caught:
        run_from_json(tampered, run_id=run.run_id)
    assert run.run_id in caught.value.why
    assert caught.value.do


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not JSON"), (b"{", "is not JSON"), (b"[" * 7_000, "is not JSON"), (b"\xff", "is not JSON"),
        (b"[]", "must be keys and values"), (b"null", "must be keys and values"), (b"{}", "missing key"),
        (b" " * (MAX_RUN_CONFIG_BYTES + 1), "too long"),
        (json.dumps({**SMALLEST, "seed": float("nan")}).encode(), "seed must be int"),
        (json.dumps(changed(train__learning_rate=float("inf"))).encode(), "learning_rate must be float"),
    ],
)  # fmt: skip
def test_nonsense_from_the_network_is_a_stated_error(text, said):
    with pytest.raises(ConfigError, match=said):
        run_from_json(text)


@patient
@given(st.binary(max_size=200))
def test_no_bytes_make_it_stumble(text):
    with pytest.raises(ConfigError):
        run_from_json(text)


@patient
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["train", "data", "bits"]), inner),
        max_leaves=8,
    )
)
def test_no_document_makes_it_stumble(value):
    for key in ("name", "model", "data", "train", "averaging", "seed", "initial_digests"):
        try:
            run_from_dict({**SMALLEST, key: value}, origin="test")
        except ConfigError as error:
            assert error.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type":"x","a":NaN}', '{"model_type":"x","a":1e999}', '{"model_type":"x","a":[-Infinity]}',
        '{"model_type":"x","a":"\\ud800"}', '{"model_type":"x","\\udfff":1}',
    ],
)  # fmt: skip
def test_what_json_cannot_spell_inside_the_model_is_a_stated_error(text):
    document = json.dumps(SMALLEST).replace('{"model_type": "gptj"}', text)
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        run_from_json(document.encode())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "x", 1: 2}, "must be text"), ({"model_type": "x", "a": {None: 2}}, "must be text"),
        ({"model_type": "x", "a": [{("b",): 2}]}, "must be text"), ({"model_type": "x", "a": {1, 2}}, "as JSON"),
        ({"model_type": "x", "a": b"x"}, "as JSON"), ({"model_type": "x", "a": float("nan")}, "as JSON"),
    ],
)  # fmt: skip
def test_a_model_config_is_plain_json(config, said):
    assert said in refused({**SMALLEST, "model": {"config": config}})


def test_numbers_beyond_all_bounds_are_stated_errors():
    assert "learning_rate must be float" in refused(changed(train__learning_rate=10**400))
    assert "name must be str" in refused({**SMALLEST, "name": 16**5000})
    assert "averaging.bits" in refused({**SMALLEST, "averaging": {"bits": 16**5000}})
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert "too deeply" in refused({**SMALLEST, "model": {"config": {"model_type": "x", "a": deep}}})


# --- what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sead": 1}, "unknown key 'sead'"),
        ({"train__learning_rat": 1}, "unknown key 'train.learning_rat'"),
        ({"seed": "1"}, "seed must be int"),
        ({"seed": True}, "seed must be int"),
        ({"seed": 1.5}, "seed must be int"),
        ({"seed": -1}, "seed must be 0"),
        ({"name": "Demo"}, "name must be 1-40"),
        ({"name": "../demo"}, "name must be 1-40"),
        ({"name": "x" * 41}, "name must be 1-40"),
        ({"name": 7}, "name must be str"),
        ({"train": 3}, "train must be keys and values"),
        ({"train__betas": [0.9]}, "train.betas must be"),
        ({"train__betas": [0.9, 1.0]}, "train.betas must be 0 to below 1"),
        ({"train__betas": ["a", 0.9]}, "train.betas must be float"),
        ({"train__learning_rate": 0}, "train.learning_rate must be over 0"),
        ({"train__sequence_length": 4}, "train.sequence_length"),
        ({"train__total_tokens": 0}, "total_tokens"),
        ({"train__weight_decay": -1}, "weight_decay"),
        ({"fragments": 0}, "fragments must be 1 to 256"),
        ({"model": {}}, "model needs config, source, or both"),
        ({"model__config": {}}, "model.config needs a model_type"),
        ({"model__config": [1]}, "model.config must be"),
        ({"data": {}}, "exactly one of stdlib, files and hub"),
        ({"data__hub": "x"}, "exactly one of stdlib, files and hub"),
        ({"data__files": "a.txt"}, "data.files must be"),
        ({"data__held_out_percent": 0}, "held_out_percent"),
        ({"averaging__bits": 3}, "averaging.bits must be 2, 4, 8 or 32"),
        ({"averaging__mode": "global"}, "averaging.mode must be local or sync"),
        ({"averaging__mode": "sync"}, "needs bits 32"),
        ({"pipeline__activation_bits": 2}, "pipeline.activation_bits must be 4, 8 or 32"),
        ({"pipeline__activation_bits": True}, "pipeline.activation_bits must be int"),
        ({"pipeline__bits": 8}, "unknown key 'pipeline.bits'"),
        (
            {"averaging__mode": "sync", "averaging__bits": 32, "pipeline__activation_bits": 4},
            "cannot have pipeline.activation_bits 4",
        ),
        ({"averaging__tokens_per_round": 0}, "tokens_per_round"),
        ({"averaging__max_round_s": 0}, "max_round_s"),
        ({"averaging__outer_momentum": 1}, "outer_momentum"),
        ({"averaging__outer_learning_rate": 0}, "outer_learning_rate must be over 0"),
        ({"averaging__first_round_tokens": 100}, "first_round_tokens and ramp_tokens go together"),
        ({"averaging__ramp_tokens": 100}, "first_round_tokens and ramp_tokens go together"),
        ({"averaging__first_round_tokens": -1, "averaging__ramp_tokens": 9}, "is negative"),
        ({"averaging__first_round_tokens": 10**6, "averaging__ramp_tokens": 9}, "at most tokens_per_round"),
        (
            {"averaging__mode": "sync", "averaging__bits": 32, "averaging__first_round_tokens": 5,
             "averaging__ramp_tokens": 9}, "first_round_tokens is for runs with mode local",
        ),
        ({"averaging__warm_steps": -1}, "warm_steps must be 0 to 10000"),
        ({"averaging__warm_steps": 0.5}, "averaging.warm_steps must be int"),
        ({"averaging__momentum_restart": 0}, "momentum_restart must be over 0"),
        ({"averaging__momentum_restart": 1.5}, "momentum_restart must be over 0"),
        ({"initial_digests": ["0" * 64]}, "one digest a fragment"),
        ({"initial_digests": ["x" * 64] * 4}, "SHA-256 in hex"),
        ({"tokenizer": "x" * 9000}, "too long for a DHT record"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_file_and_the_key(change, said):
    message = refused(changed(**change))
    assert said in message
    assert message.startswith("run.yaml: ")


@pytest.mark.parametrize("key", ["name", "model"])
def test_what_is_missing_is_named(key):
    assert f"missing key '{key}'" in refused({k: v for k, v in SMALLEST.items() if k != key})


def test_a_run_without_text_is_told_both_ways_to_name_it():
    assert "exactly one of data and sources" in refused({k: v for k, v in SMALLEST.items() if k != "data"})


def test_sync_is_exact_and_allowed_with_32_bits():
    run = run_from_dict(changed(averaging__mode="sync", averaging__bits=32), origin="test")
    assert run.averaging == AveragingConfig(mode="sync", bits=32)


POLICY = {"first_round_tokens": 4_000, "ramp_tokens": 10**6, "warm_steps": 0, "momentum_restart": 1.0}


def test_settings_that_came_later_are_spelt_only_where_they_say_something():
    """Runs from before keep their run_id, and so their peers."""
    plain = run_from_dict(SMALLEST, origin="test")
    assert not set(POLICY) & set(json.loads(canonical_json(plain))["averaging"])
    spelt = run_from_dict(changed(**{f"averaging__{key}": value for key, value in POLICY.items()}), origin="test")
    document = json.loads(canonical_json(spelt))
    assert {key: document["averaging"][key] for key in POLICY} == POLICY
    assert run_from_json(canonical_json(spelt), run_id=spelt.run_id) == spelt and spelt.run_id != plain.run_id
    said = run_from_dict(changed(averaging__warm_steps=40, averaging__momentum_restart=0.5), origin="test")
    assert said.run_id == plain.run_id, "the same run, however it is written"


# --- files


def test_a_run_is_read_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    assert load_run(path) == load_run(str(path)) == run_from_dict(SMALLEST, origin="test")


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not YAML"), ("", "must be keys and values"), ("name: demo", "missing key")]
)
def test_a_bad_file_is_named(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_run(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"name: \xff\xfe", "name: caf\u00e9".encode("latin-1"), b"name: 2024-13-45", b"[" * 5000, b"{[]: 1}"]
)
def test_a_file_that_is_not_utf8_or_no_document_is_named(tmp_path, data):
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="is not YAML") as caught:
        load_run(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the run config") as caught:
        load_run(tmp_path / "none.yaml")
    assert "No such file" in caught.value.why


def test_configs_cannot_be_changed():
    for config in (PeerConfig(), TrainConfig(), run_from_dict(SMALLEST, origin="test")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, "other")


# --- the peer's own


@pytest.mark.parametrize(("text", "span"), [("auto", None), ("0:1", (0, 1)), ("3:17", (3, 17)), ("0:256", (0, 256))])
def test_the_fragments_to_hold_are_a_span(text, span):
    assert PeerConfig(fragments=text).fragment_span == span


@pytest.mark.parametrize("text", ["", "2", "2:", ":2", "1:1", "2:1", "-1:2", "0:257", "a:b", "1:2:3", " 1:2", "1:2\n"])
def test_other_spans_are_refused(text):
    with pytest.raises(ValueError, match=r"neither auto|there are no fragments"):
        _ = PeerConfig(fragments=text).fragment_span


# --- adapters


LORA = {**SMALLEST, "model": {"config": {"model_type": "gptj"}, "lora": {"rank": 8, "targets": ["q_proj"]}}}


def test_adapters_are_spelt_where_they_are_used_and_only_there():
    plain, lora = (run_from_dict(document, origin="test") for document in (SMALLEST, LORA))
    assert b"lora" not in canonical_json(plain) and b"base_digests" not in canonical_json(plain)
    spelt = json.loads(canonical_json(lora))["model"]["lora"]
    assert spelt == {"rank": 8, "alpha": 32.0, "targets": ["q_proj"], "base": "nf4"}
    assert run_from_json(canonical_json(lora), run_id=lora.run_id) == lora and lora.run_id != plain.run_id
    named = dataclasses.replace(lora, base_digests=["0" * 32] * lora.fragments)
    assert run_from_json(canonical_json(named), run_id=named.run_id) == named and named.run_id != lora.run_id


@pytest.mark.parametrize(("lora", "said"), [
    ({"rank": 0}, "rank must be 1 to 1024"), ({"rank": 5000}, "rank must be"), ({"alpha": 0}, "alpha must be"),
    ({"base": "int3"}, "base must be one of nf4, bf16, fp32"), ({"targets": ["q proj"]}, "names of layers"),
    ({"targets": ["q", "q"]}, "twice"), ({"rank": "x"}, "must be int"),
    ({"ranks": 2}, "unknown key 'model.lora.ranks'"),
])
def test_adapters_that_cannot_be_are_refused(lora, said):
    with pytest.raises(ConfigError, match=said):
        run_from_dict({**SMALLEST, "model": {"config": {"model_type": "gptj"}, "lora": lora}}, origin="test")


@pytest.mark.parametrize("digests", [["0" * 32], ["0" * 31] * 4, ["x" * 32] * 4])
def test_digests_of_a_base_are_one_a_fragment(digests):
    with pytest.raises(ConfigError, match="base_digests"):
        run_from_dict({**LORA, "base_digests": digests}, origin="test")
    with pytest.raises(ConfigError, match="of runs with model"):
        run_from_dict({**SMALLEST, "base_digests": ["0" * 32] * 4}, origin="test")
