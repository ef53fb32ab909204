"""What kind of model a run trains: its Hugging Face config, from the run config, a folder, or the hub.

Everything that can be wrong with one ends here in a ConfigError that says what to change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from swarm.config import RunConfig
from swarm.errors import ConfigError

INVALID = (
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ZeroDivisionError,
)
"""what transformers raises, from one place or another, for sizes that cannot be"""


def architecture(run: RunConfig) -> PreTrainedConfig:
    """The config of the run's model: what the run says, with what `transformers` adds by default.

    Raises ConfigError: no such folder or hub id, unknown model_type, sizes that cannot be, not a causal LM, quantised.
    """
    values, source = run.model.config, str(run.model.source)
    try:
        if values is None and is_folder(source):
            values = read_config(Path(source).expanduser())
        if values is None:
            # trust_remote_code=False also keeps transformers from asking on the terminal whether to run foreign code
            config = AutoConfig.from_pretrained(source, revision=run.model.revision, trust_remote_code=False)
        else:
            config = from_values(values)
    except OSError as error:
        raise hub_error(source, error) from None
    except INVALID as error:
        raise not_valid(error) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"model_type {config.model_type!r} is not a causal language model",
            why="a swarm trains models that predict the next token",
            do="use a decoder such as gptj, gpt_neox, llama or qwen3",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            "the model's weights are quantised", why="they cannot be trained", do="start from its original weights"
        )
    assert isinstance(config, PreTrainedConfig)
    return config


def from_values(values: dict[str, Any]) -> PreTrainedConfig:
    """The config that a config.json with these values stands for. Raises ConfigError."""
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**values)
    except INVALID as error:
        raise not_valid(error) from None
    return config


def is_folder(source: str) -> bool:
    """A folder here, as opposed to a hub id ("owner/name"). Raises ConfigError for a path that leads nowhere."""
    if Path(source).expanduser().is_dir():
        return True
    if source.startswith((".", "/", "~", "\\")) or source.count("/") > 1:
        raise ConfigError(
            f"no model folder {source}", why="it does not exist", do="check model.source in the run config, or --base"
        )
    return False


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder in Hugging Face layout; it has a model_type. Raises ConfigError."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}",
            why=str(error.strerror or error),
            do="a model folder holds config.json and model.safetensors",
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON", why=str(error), do="download the model again") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ConfigError(
            f"{path} names no model_type", why="it is not a model of `transformers`", do="use another folder"
        )
    return values


def match_folder(source: str, config: PreTrainedConfig) -> None:
    """Check that the weights in this folder are of the run's model, and set in `config` whether they are tied: the
    file's word and not the run's, since a tied file holds no head and the run's config is untied. Raises ConfigError.
    """
    stored = read_config(Path(source).expanduser())
    theirs = from_values(stored) if stored["model_type"] == config.model_type else None
    if theirs is None or theirs.num_hidden_layers != config.num_hidden_layers:
        layers = "" if theirs is None else f" with {theirs.num_hidden_layers} layers"
        raise ConfigError(
            f"the weights in {source} are of another model",
            why=f"they are {stored['model_type']}{layers}, the run trains {config.model_type}"
            f" with {config.num_hidden_layers}",
            do="use the folder that the run was made from",
        )
    config.tie_word_embeddings = theirs.tie_word_embeddings


def do_not_fit(source: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"the weights in {source} do not fit the run's model",
        why=f"{len(names)} tensors are missing or have another shape, the first is {min(names)}",
        do="use the folder that the run was made from",
    )


def not_valid(error: Exception) -> ConfigError:
    do = "check model_type and the sizes in model.config, or in the config.json of model.source"
    return ConfigError("the model config is not valid", why=one_line(error), do=do)


def hub_error(source: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot load the model {source!r}",
        why=one_line(error),
        do="check the id and revision, and that huggingface.co can be reached; or set model.source to a local folder",
    )


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
