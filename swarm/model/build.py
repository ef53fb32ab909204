"""Run config -> a Hugging Face causal language model, in fp32 on the CPU, ready to train.

`resolve` first turns a run that names a folder of this machine into one that any joiner can build: the folder's
config.json moves into the run config; the weights then travel from peer to peer, checked by `initial_digests`.
The head is always untied from the embedding: they may lie in different fragments, on different peers (DESIGN 6).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from swarm.config import RunConfig
from swarm.errors import ConfigError
from swarm.model.architecture import (
    INVALID,
    architecture,
    do_not_fit,
    hub_error,
    is_folder,
    match_folder,
    one_line,
    read_config,
)
from swarm.model.draw import draw
from swarm.model.fragments import embedding_rows
from swarm.model.skeleton import allocate, never_set, ready_to_train, skeleton_of, tensors, untie

_auto: Any = AutoModelForCausalLM  # its methods have no types

BYTES_VOCABULARY = 257
"""of the tokenizer "bytes": `swarm.data.tokenizer` makes it (siblings cannot import each other; a test compares)"""

NOISE = frozenset(
    {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "_attn_implementation"}
)
"""keys of config.json that say where a file came from or how it was run, not what the model is"""


Model: TypeAlias = PreTrainedModel
"""what the other folders call it: only swarm.model and swarm.data know transformers"""


def resolve(run: RunConfig) -> RunConfig:
    """`run` as it can be published: no path of this machine in `model`.

    A local folder in `model.source` becomes `model.config`, with the head untied; a hub id or a config stays as it is.
    The caller keeps the folder for `build_model(weights_from=...)` and fills in `initial_digests`.
    Raises ConfigError: no such folder, no config.json in it, a config too long for a DHT record.
    """
    source = run.model.source
    if source is None or not is_folder(source):
        return run
    config = {key: value for key, value in read_config(Path(source).expanduser()).items() if key not in NOISE}
    config["tie_word_embeddings"] = False
    model = dataclasses.replace(run.model, config=config, source=None, revision=None)
    return dataclasses.replace(run, model=model)


def build_model(
    run: RunConfig,
    *,
    weights_from: str | None = None,
    tokenizer_size: int | None = None,
) -> PreTrainedModel:
    """The run's model on the CPU: fp32, train mode, no cache, head untied (the logits are those of the tied model).

    Weights: from `weights_from` (a folder in Hugging Face layout with the run's architecture), else from
    `model.source`, else random from `run.seed` (torch's own random state is left alone).
    `tokenizer_size`: len(tokenizer), to check that the model has a row for each token; known for "bytes".
    Raises ConfigError: folder or hub id that cannot be read, unknown model_type, not a causal LM, quantised weights,
    weights that are missing or of another shape, vocabulary smaller than the tokenizer's.
    """
    source = weights_from or run.model.source
    config = architecture(run)
    if source is None:
        model = _initialise(config, run.seed)
    else:
        model = _load(source, config, revision=None if weights_from else run.model.revision)
    untie(model)
    ready_to_train(model)
    if getattr(config, "is_decoder", None) is False:
        call: Any = model
        check_causal(lambda ids: call(input_ids=ids).logits, model)
        model.train()
    check_vocabulary(model, run, tokenizer_size)
    return model


def check_vocabulary(model: PreTrainedModel, run: RunConfig, tokenizer_size: int | None) -> None:
    """Raises ConfigError where the tokenizer has more tokens than the model. It may be on the meta device."""
    needed = tokenizer_size or (BYTES_VOCABULARY if run.tokenizer == "bytes" else 0)
    rows = embedding_rows(model)
    if rows < needed:
        raise ConfigError(
            "the model's vocabulary is smaller than the tokenizer's",
            why=f"vocab_size is {rows}, the tokenizer {run.tokenizer!r} has {needed} tokens",
            do=f"set vocab_size to {needed} or more in model.config, or use the model's own tokenizer",
        )


def _initialise(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    model, tied = skeleton_of(copy.deepcopy(config))
    filled = allocate(model)
    draw(model, seed)
    if never_set(model, filled):
        return _construct(config, seed)
    if tied is not None:
        values = dict(tensors(model))
        with torch.no_grad():
            values[tied[0]].copy_(values[tied[1]])
    return model


def _construct(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """For the few families (openai-gpt, apertus) that leave some values as their constructors set them: only the whole
    model can be made."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = _auto.from_config(config, dtype=torch.float32)
    return model


def _load(source: str, config: PreTrainedConfig, *, revision: str | None) -> PreTrainedModel:
    folder = is_folder(source)
    path = str(Path(source).expanduser()) if folder else source
    if folder:
        match_folder(source, config)
    try:
        model, info = _auto.from_pretrained(
            path,
            config=config,
            revision=revision or "main",
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
        )
    except OSError as error:
        raise hub_error(source, error) from None
    except (*INVALID, SafetensorError) as error:
        raise ConfigError(f"cannot load the weights of {source}", why=one_line(error), do="check the files") from None
    # without this check transformers goes on with random numbers where a tensor is missing or has another shape
    wrong = sorted(
        {*info["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])}
    )
    if wrong:
        raise do_not_fit(source, wrong)
    assert isinstance(model, PreTrainedModel)
    return model


def check_causal(
    call: Callable[[torch.Tensor], torch.Tensor], model: PreTrainedModel, hidden_size: int | None = None
) -> None:
    """BERT and its like look ahead unless is_decoder is set. Training them would look splendid.

    `call`: token ids [2, 2], or hidden states [2, 2, hidden_size], to values for each token. Leaves `model` in eval
    mode. Raises ConfigError where the first token sees the second.
    """
    model.train(False)
    inputs = torch.tensor([[1, 2], [1, 3]])
    if hidden_size is not None:
        inputs = torch.sin(inputs[..., None] * torch.arange(1, hidden_size + 1))  # any values, the first ones equal
    with torch.no_grad():
        found = call(inputs)[:, 0]
    if not torch.allclose(found[0], found[1], atol=1e-4):
        raise ConfigError(
            f"this {model.config.model_type} model is not a causal language model",
            why="its first token sees the second one",
            do="set is_decoder: true in model.config, or use a decoder such as gptj or llama",
        )
