"""Who learns from segments: as FAMILIES.md says, and not where layers or windows of a config would spoil it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from swarm.errors import ConfigError
from swarm.model.families import check_segments, packed_families

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
import families


@pytest.mark.parametrize("name", ["gptj", "gpt_neox", "gpt2", "llama", "mpt", "falcon", "qwen3", "gemma2"])
def test_a_listed_family_computes_segments_as_each_alone(name: str) -> None:
    assert name in packed_families()
    families.check_packed(name)


@pytest.mark.parametrize("name", ["qwen3_next", "roberta"])
def test_a_family_that_does_not_is_not_listed(name: str) -> None:
    assert name not in packed_families()
    with pytest.raises(AssertionError, match="a segment is off"):
        families.check_packed(name)


@pytest.mark.parametrize("name", ["gpt_neo", "bloom", "mamba", "qwen3_next", "nemotron_h"])
def test_its_run_ends_in_an_error_that_says_what_to_do(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' cannot learn from prefixes or packed texts") as caught:
        check_segments(AutoConfig.for_model(name), sequence_length=128)
    assert "gptj" in caught.value.do and caught.value.why


@pytest.mark.parametrize(("name", "changes"), [
    ("gptj", {}), ("llama", {}), ("qwen2", {"sliding_window": 4}), ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 128}), ("gemma2", {"sliding_window": 4096}), ("llama4_text", {}),
])
def test_whose_attention_reaches_as_far_as_a_sequence_may(name: str, changes: dict[str, Any]) -> None:
    check_segments(AutoConfig.for_model(name, **changes), sequence_length=128)


@pytest.mark.parametrize(("name", "changes", "window"), [
    ("mistral", {"sliding_window": 100}, 100), ("gemma2", {"sliding_window": 64}, 64),
    ("llama4_text", {"attention_chunk_size": 32}, 32),
])
def test_a_window_shorter_than_a_sequence_would_be_lost(name: str, changes: dict[str, Any], window: int) -> None:
    with pytest.raises(ConfigError, match=f"reaches back {window} tokens, and sequences have 128") as caught:
        check_segments(AutoConfig.for_model(name, **changes), sequence_length=128)
    assert f"{window} or less" in caught.value.do


def test_layers_that_heed_no_mask_are_found_in_the_config() -> None:
    """LFM2's layers are all attention as it comes, and most are convolutions in its published models."""
    check_segments(AutoConfig.for_model("lfm2"), sequence_length=128)
    with pytest.raises(ConfigError, match="cannot learn"):
        check_segments(AutoConfig.for_model("lfm2", full_attn_idxs=[2, 5]), sequence_length=128)
