"""Who sees whom where sequences begin with a prefix, and of what a loss is taken."""

from __future__ import annotations

import pytest
import torch

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.model.build import build_model
from swarm.model.prefix import IGNORED, after_prefix, num_targets, prefix_mask


def test_each_sequence_sees_its_own_prefix_and_what_came_before() -> None:
    mask = prefix_mask(torch.tensor([0, 2, 4]), 4)
    assert mask.shape == (3, 1, 4, 4) and mask.dtype == torch.float32
    sees = (mask == 0).int()[:, 0].tolist()
    assert sees[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert sees[1] == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert sees[2] == [[1, 1, 1, 1]] * 4
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


def test_the_mask_has_the_type_of_the_hidden_states() -> None:
    mask = prefix_mask(torch.tensor([1]), 3, dtype=torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and bool(torch.isfinite(mask).all()), "minus infinity would make NaN of a row"


def test_the_loss_is_of_what_comes_after() -> None:
    tokens = torch.arange(12).view(3, 4)
    targets = after_prefix(tokens, torch.tensor([0, 1, 3]))
    assert targets.tolist() == [[0, 1, 2, 3], [IGNORED, 5, 6, 7], [IGNORED] * 3 + [11]]
    assert tokens[1, 0] == 4, "the tokens themselves stay"
    assert num_targets(targets) == 3 + 3 + 1 and num_targets(tokens) == 9


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_models_heed_it(family: str) -> None:
    sizes = {
        "gptj": {"n_layer": 2, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 16},
        "llama": {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
    }[family]
    model = build_model(RunConfig(
        name="test", model=ModelConfig(config={"model_type": family, "vocab_size": 257, **sizes}),
        data=DataConfig(stdlib=True), fragments=1,
    )).eval()
    tokens = torch.randint(0, 257, (2, 8), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 257
    mask = prefix_mask(torch.tensor([0, 5]), 8)
    with torch.no_grad():
        one, other = (model(input_ids=ids, attention_mask=mask).logits for ids in (tokens, changed))
        causal = model(input_ids=tokens).logits
    assert torch.equal(one[0, :3], other[0, :3]), "nothing of what comes later, where there is no prefix"
    torch.testing.assert_close(one[0], causal[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(one[1, 0], other[1, 0]), "inside the prefix the first token sees the fourth"
