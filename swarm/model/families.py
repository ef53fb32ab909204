"""Which kinds of models learn from rows cut into segments: those that FAMILIES.md found to heed what they are told.

Others would not fail, they would learn the wrong thing: tokens that see other texts, answers that are given away. So a
run that needs segments (prefix-LM, UL2, packed tasks) asks here before anything is built.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from transformers import PreTrainedConfig

from swarm.errors import ConfigError

DOCUMENT = Path(__file__).with_name("FAMILIES.md")


ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""kinds of layers that heed a mask; others (convolutions, states) carry on what came before"""


def check_segments(config: PreTrainedConfig, *, sequence_length: int) -> None:
    """Raises ConfigError where a model of this config does not compute the segments of a row as each would be alone."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if not {config.model_type, text.model_type} & packed_families() or kinds - ATTENTION:
        raise ConfigError(
            f"model_type {config.model_type!r} cannot learn from prefixes or packed texts",
            why="it ignores masks of other shapes than its own, or keeps a state from one text to the next",
            do="use the objective causal on plain text, or a model such as gptj, gpt_neox, llama or qwen3"
            " (swarm/model/FAMILIES.md)",
        )
    window = _window(text, kinds)
    if window and window < sequence_length:
        raise ConfigError(
            f"the model's attention reaches back {window} tokens, and sequences have {sequence_length}",
            why="the mask of a prefix or of packed texts takes the place of that window",
            do=f"set train.sequence_length to {window} or less",
        )


def _window(text: PreTrainedConfig, kinds: set[str]) -> int:
    """Tokens that attention reaches back in some layer; 0: all."""
    if kinds == {"full_attention"} or not getattr(text, "use_sliding_window", True):
        return 0
    found = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in found if isinstance(size, int) and size), default=0)


@cache
def packed_families() -> frozenset[str]:
    """By model_type."""
    found = re.search(r"\*\*Packed[^*]*:\*\* (.*)", DOCUMENT.read_text(encoding="utf-8"))
    assert found is not None, "scripts/families.py writes it"
    return frozenset(found[1].split(", "))
