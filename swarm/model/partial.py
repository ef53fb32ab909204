"""Building only what a peer holds: consecutive blocks, with what belongs before or after them, and nothing else.

The whole model is made without memory (`skeleton.py`), the tensors that the stage holds become real, read from a
checkpoint (`weights.py`) or drawn from the run's seed (`draw.py`), and the rest is cut off (`stage.py`). Bit for bit
what `build_model` gives for those blocks.

Of the 121 families of FAMILIES.md, openai-gpt, apertus and (with a head of its own) data2vec-text cannot start from
random weights in parts: the library sets some of their values only where it makes the whole model. Checkpoints of all
can be read in parts. One differs from `build_model`: transformers' loader sets the padding row of youtu's embedding to
zero, whatever the file says.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from swarm.config import RunConfig
from swarm.errors import ConfigError
from swarm.model.architecture import architecture, is_folder, match_folder
from swarm.model.build import check_causal, check_vocabulary
from swarm.model.draw import draw
from swarm.model.lora import adapt
from swarm.model.skeleton import Skeleton, adopt, allocate, never_set, put, skeleton, skeleton_of, tensors
from swarm.model.stage import Stage
from swarm.model.weights import Checkpoint, read


def build_stage(
    run: RunConfig, blocks: tuple[int, int], *, weights_from: str | None = None, tokenizer_size: int | None = None
) -> Stage:
    """Blocks [first, one past the last) of the run's model on the CPU: fp32, train mode, no cache, head untied.

    Weights, `tokenizer_size` and errors as in `build_model`; besides, ConfigError where there are no such blocks, and
    for the few families whose parts cannot be made by themselves. Needs memory for what the stage holds (and its
    conversions); the last stage of a model with a tied head also, for a moment, for the embedding. With a frozen base
    (`lora.py`): block by block, so that there is never more than one in fp32.
    """
    if run.model.lora is None:
        return _build(run, blocks, weights_from=weights_from, tokenizer_size=tokenizer_size)
    values: dict[str, torch.Tensor] = {}
    first, end = blocks
    for block in range(first, max(end, first + 1)):
        part = _build(run, (block, block + 1), weights_from=weights_from, tokenizer_size=tokenizer_size)
        adapt(part.model, run.model.lora, run.seed)
        values |= dict(tensors(part.model))
    return join_stages(run, blocks, values)


def _build(
    run: RunConfig, blocks: tuple[int, int], *, weights_from: str | None, tokenizer_size: int | None
) -> Stage:
    """Without adapters."""
    source = weights_from or run.model.source
    config = architecture(run)
    if source is not None and is_folder(source):
        match_folder(source, config)
    whole = skeleton_of(config)
    check_vocabulary(whole.model, run, tokenizer_size)
    held = {name for name, _ in tensors(Stage(copy.deepcopy(whole.model), *blocks).model)}
    if source is None:
        _draw(whole, held, run.seed)
    else:
        checkpoint = Checkpoint(source, revision=None if weights_from else run.model.revision)
        put(whole.model, read(checkpoint, whole.model, held, tied=whole.tied))
        _complete(whole, held, run.seed)
    stage = Stage(whole.model, *blocks)
    if getattr(config, "is_decoder", None) is False:
        check_causal(stage, stage.model, _hidden_size(whole) if not stage.is_first else None)
    stage.train()
    return stage


def join_stages(run: RunConfig, blocks: tuple[int, int], values: Mapping[str, torch.Tensor]) -> Stage:
    """Blocks [first, one past the last) made of parameters and buffers that are here already, by their names in the
    whole model: those of several stages. They are shared, not copied. Raises KeyError where some are missing."""
    whole = skeleton(run)
    adopt(whole, values)
    stage = Stage(whole, *blocks)
    missing = [name for name, tensor in tensors(stage.model) if tensor.is_meta]
    if missing:
        raise KeyError(f"{missing[0]} is not here")
    stage.train()
    return stage


def _draw(whole: Skeleton, held: set[str], seed: int) -> None:
    head, embedding = whole.tied or ("", "")
    copies = head in held
    # the head's own values are never drawn: it starts as the embedding, which is drawn for it where it is not held
    _complete(whole, (held - {head}) | {embedding} if copies else held, seed)
    if copies:
        values = dict(tensors(whole.model))[embedding].detach()
        put(whole.model, {head: values.clone() if embedding in held else values})


def _complete(whole: Skeleton, names: set[str], seed: int) -> None:
    """Make real what is not yet, in no file: random weights, and tables that depend on nothing learnt."""
    new = allocate(whole.model, names)
    draw(whole.model, seed)
    if missing := never_set(whole.model, new):
        raise ConfigError(
            f"a part of a {whole.model.config.model_type} model cannot be made by itself",
            why=f"the library sets {missing[0]} only where it makes the whole model",
            do="hold the whole model, or use another family, such as gptj, gpt_neox or llama",
        )


def _hidden_size(whole: Skeleton) -> int:
    size = whole.model.config.get_text_config().hidden_size
    assert isinstance(size, int)
    return size
