"""Run config -> model: real Hugging Face models of three families, tiny, on the CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.config import DataConfig, ModelConfig, RunConfig, run_from_json
from swarm.config import canonical_json as as_json
from swarm.data.tokenizer import byte_tokenizer
from swarm.errors import ConfigError
from swarm.model.build import BYTES_VOCABULARY, build_model, resolve

FAMILIES: dict[str, dict[str, Any]] = {
    "gptj": {"n_layer": 3, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 64, "vocab_size": 260},
    "gpt_neox": {
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 260,
    },
    "llama": {
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "vocab_size": 260,
    },
}
TOKENS = torch.arange(40).reshape(2, 20)


def family(name: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": name, "bos_token_id": 256, "eos_token_id": 256, **FAMILIES[name], **changes}


def run_with(config: dict[str, Any] | None = None, source: Path | str | None = None, **more: Any) -> RunConfig:
    model = ModelConfig(config=config, source=None if source is None else str(source))
    return RunConfig(name="test", model=model, data=DataConfig(stdlib=True), fragments=2, **more)


def reference(config: dict[str, Any]) -> Any:
    """What transformers itself makes of it, with random biases too, so that nothing is zero by luck."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    training = model.training
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    model.train(training)
    return result


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_model_is_ready_to_train(name: str) -> None:
    model = build_model(run_with(family(name)))
    assert model.training
    assert model.config.use_cache is False
    assert model.config.tie_word_embeddings is False
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_half_precision_config_still_trains_in_fp32() -> None:
    model = build_model(run_with(family("llama", torch_dtype="bfloat16")))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_dropout_is_the_configs() -> None:
    model = build_model(run_with(family("gptj", resid_pdrop=0.0, embd_pdrop=0.25, attn_pdrop=0.0)))
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.0, 0.25}


def test_random_start_follows_from_the_seed_alone() -> None:
    run = run_with(family("gptj"), seed=7)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = weights(build_model(run))
    assert torch.equal(torch.get_rng_state(), state), "the global random state was touched"
    torch.manual_seed(2)
    two = weights(build_model(run))
    other = weights(build_model(dataclasses.replace(run, seed=8)))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_from_a_folder_and_the_head_is_untied(name: str, tied: bool, tmp_path: Path) -> None:
    original = reference(family(name, tie_word_embeddings=tied))
    assert (original.lm_head.weight is original.get_input_embeddings().weight) is tied
    original.save_pretrained(tmp_path)

    for run, weights_from in (
        (run_with(source=tmp_path), None),
        (resolve(run_with(source=tmp_path)), str(tmp_path)),
        (run_with(family(name)), str(tmp_path)),
    ):
        model = build_model(run, weights_from=weights_from)
        assert torch.equal(logits(model), logits(original))
        assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
        assert "lm_head.weight" in dict(model.named_parameters())


def test_head_of_a_tied_random_start_starts_as_the_embedding() -> None:
    tied = build_model(run_with(family("llama", tie_word_embeddings=True)))
    assert torch.equal(tied.lm_head.weight, tied.get_input_embeddings().weight)
    before = tied.get_input_embeddings().weight.detach().clone()
    with torch.no_grad():
        tied.lm_head.weight.add_(1.0)
    assert torch.equal(tied.get_input_embeddings().weight, before), "training the head must not train the embedding"


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    original = reference(family("gpt_neox"))
    original.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(build_model(run_with(source=tmp_path))), logits(original))


@pytest.mark.parametrize("name", FAMILIES)
def test_resolved_run_needs_no_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    reference(family(name, tie_word_embeddings=True)).save_pretrained(folder)
    run = resolve(run_with(source=folder))
    (folder / "config.json").unlink()

    config = run.model.config
    assert run.model.source is None and config is not None
    assert config["tie_word_embeddings"] is False
    assert not {"transformers_version", "_name_or_path", "torch_dtype", "dtype"} & set(config)
    assert str(tmp_path) not in as_json(run).decode()
    joined = run_from_json(as_json(run), run_id=run.run_id)  # what a joiner gets
    ours, theirs = weights(build_model(run)), weights(build_model(joined))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_resolve_leaves_configs_and_hub_ids_alone() -> None:
    for run in (run_with(family("gptj")), run_with(source="EleutherAI/gpt-j-6b")):
        assert resolve(run) is run


def test_resolve_is_idempotent(tmp_path: Path) -> None:
    reference(family("gptj")).save_pretrained(tmp_path)
    once = resolve(run_with(source=tmp_path))
    assert resolve(once) == once


def test_resolve_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "rope_theta": Infinity}')
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        resolve(run_with(source=tmp_path))


def test_resolve_refuses_a_config_too_long_for_a_record(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "labels": "x" * 9000}))
    with pytest.raises(ConfigError, match="too long"):
        resolve(run_with(source=tmp_path))


def test_vocabulary_must_fit_the_tokenizer() -> None:
    assert len(byte_tokenizer()) == BYTES_VOCABULARY
    build_model(run_with(family("gptj", vocab_size=257)))
    with pytest.raises(ConfigError, match="smaller than the tokenizer") as caught:
        build_model(run_with(family("gptj", vocab_size=256, bos_token_id=0, eos_token_id=0)))
    assert "256" in str(caught.value) and "257" in str(caught.value)
    with pytest.raises(ConfigError, match="smaller than the tokenizer"):
        build_model(run_with(family("gptj")), tokenizer_size=261)


@pytest.mark.parametrize("use", ["build", "resolve", "weights_from"])
def test_folder_without_config(use: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        if use == "build":
            build_model(run_with(source=tmp_path))
        elif use == "resolve":
            resolve(run_with(source=tmp_path))
        else:
            build_model(run_with(family("gptj")), weights_from=str(tmp_path))


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"model_type": 3}'])
def test_folder_with_a_broken_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve(run_with(source=tmp_path))


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(family("gptj")))
    with pytest.raises(ConfigError, match="cannot load the model"):
        build_model(run_with(source=tmp_path))


def test_path_that_leads_nowhere_is_no_hub_id(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "./none", "~/none/at/all"):
        with pytest.raises(ConfigError, match="no model folder"):
            build_model(run_with(source=path))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "no-such-model"}, "not valid"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"model_type": "vit"}, "not a causal language model"),
        (family("gptj", n_embd=15), "not valid"),
        (family("llama", hidden_size="wide"), "not valid"),
        (family("llama", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "quantised"),
    ],
)
def test_configs_that_cannot_be(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        build_model(run_with(config))
    assert caught.value.why and caught.value.do


def test_bidirectional_model_is_refused_unless_it_is_a_decoder() -> None:
    bert = {
        "model_type": "bert",
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 260,
    }
    with pytest.raises(ConfigError, match="not a causal language model"):
        build_model(run_with(bert))
    build_model(run_with({**bert, "is_decoder": True}))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # fail at once instead of retrying
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot load the model 'nobody/nothing'") as caught:
        build_model(run_with(source="nobody/nothing"))
    assert "huggingface.co" in caught.value.do


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_layer": 2}, "another model"),
        ({"n_layer": 4}, "another model"),
        ({"n_embd": 32}, "do not fit"),
        ({"vocab_size": 300}, "do not fit"),
    ],
)
def test_weights_of_another_shape_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    """transformers would go on with random numbers in their place, and a swarm would average them in."""
    reference(family("gptj", **changes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=says):
        build_model(run_with(family("gptj")), weights_from=str(tmp_path))


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    reference(family("llama")).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="llama"):
        build_model(run_with(family("gptj")), weights_from=str(tmp_path))


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    model = reference(family("gptj"))
    state = {name: tensor for name, tensor in model.state_dict().items() if "h.1.mlp.fc_in.weight" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match="do not fit") as caught:
        build_model(run_with(source=tmp_path))
    assert "h.1.mlp.fc_in.weight" in caught.value.why


def test_broken_weights_file(tmp_path: Path) -> None:
    reference(family("gptj")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot load"):
        build_model(run_with(source=tmp_path))
