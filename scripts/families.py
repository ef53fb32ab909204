#!/usr/bin/env python3
"""Which model families can be cut into stages: tries every causal LM that transformers has, in a tiny config.

    scripts/families.py            writes swarm/model/FAMILIES.md
    scripts/families.py NAME ...   tries some, and says why one does not work

A family works if three chained stages give the logits and gradients of the whole model to the last bit, and so does one
stage that is entered and left at the same blocks. With a prefix: also under a 4D mask that lets the first tokens see
each other. Packed: with masks and positions of segments, each is computed as it would be alone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DOCUMENT = ROOT / "swarm" / "model" / "FAMILIES.md"

BLOCKS = 4
EDGES = (0, 1, 3, 4)
LENGTH, BATCH, PREFIX = 9, 2, 4
PACKED = (((0, 4), (2, 5)), ((3, 6), (1, 3)))
MAX_PARAMETERS = 20_000_000
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), BLOCKS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(
        ("attention_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "hidden_dropout", "dropout", "embed_dropout",
         "activation_dropout", "layerdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
         "classifier_dropout", "ffn_dropout"), 0.0,
    ),
    "vocab_size": 64, "head_dim": 8, "rotary_dim": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "word_embed_proj_dim": 32,
}
"""of whatever a config knows of this"""
LATENT = {
    "head_dim": ..., "num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "n_group": 1, "topk_group": 1,
}
"""multi-head latent attention"""
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "youtu", "axk1", "glm4_moe_lite"), LATENT),
    "falcon": {"head_dim": ...},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "kimi_linear": {**LATENT, "linear_num_heads": 4, "linear_head_dim": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "chunk_size": 4},
}
"""where that is not enough, or is not small (some take 20 s as they come); `...`: not this one"""


def names() -> list[str]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def make(name: str, *, device: str = "cpu", **changes: Any) -> Any:
    """A tiny model of a family, with random weights, in eval mode. Raises whatever transformers raises."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    defaults = AutoConfig.for_model(name)
    text = defaults.get_text_config()
    sizes = {key: value for key, value in SIZES.items() if hasattr(text, key)}
    sizes |= {**MORE.get(name, {}), **changes}
    config = type(text)(**{key: value for key, value in sizes.items() if value is not ...})
    config.is_decoder = True
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert size < MAX_PARAMETERS, f"{size:,} parameters: its config has sizes by names of its own"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.train(False)


def compare(name: str, edges: tuple[int, ...], *, prefix: int = 0) -> None:
    """Raises AssertionError, or whatever else goes wrong, unless chained stages with these edges are the whole model.

    Twice: cut there, each working on values that know nothing of the one before, as at another peer; and (causal only,
    since some families take their time) as one stage that holds all blocks and is entered and left there."""
    import torch

    from swarm.model.skeleton import untie
    from swarm.model.stage import Stage

    whole = make(name)
    untie(whole)
    spans = list(itertools.pairwise(edges))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SIZES["vocab_size"], (BATCH, LENGTH), generator=generator)
    mask = prefix_mask(prefix) if prefix else None
    cut = [Stage(copy.deepcopy(whole), start, end) for start, end in spans]
    all_blocks = Stage(copy.deepcopy(whole), 0, BLOCKS)
    logits = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if prefix:
        causal = whole(input_ids=ids, use_cache=False).logits
        assert not torch.equal(causal[:, :prefix], logits[:, :prefix]), "the model does not heed the mask"
    loss_of(logits, ids).backward()
    wanted = dict(whole.named_parameters())

    for stages in (cut,) if prefix else (cut, [all_blocks] * len(spans)):
        values = chain(list(zip(stages, spans, strict=True)), ids, mask)
        assert torch.equal(values, logits), f"logits differ by up to {float((values - logits).abs().max()):.2g}"
        held = [(key, parameter) for stage in dict.fromkeys(stages) for key, parameter in stage.held()]
        assert sorted(key for key, _ in held) == sorted(wanted), "a parameter is in no stage, or in two"
        for key, parameter in held:
            gradient = wanted[key].grad
            if gradient is None:
                assert parameter.grad is None or not parameter.grad.any(), f"a gradient of {key} from nowhere"
            else:
                assert parameter.grad is not None and torch.equal(parameter.grad, gradient), f"gradient of {key}"


def chain(steps: list[tuple[Any, tuple[int, int]]], ids: Any, mask: Any = None) -> Any:
    """Forward and backward through stages, each for the blocks beside it. Returns the logits."""
    entered: list[Any] = []
    left: list[Any] = []
    values = ids
    for stage, (start, end) in steps:
        if start > 0:
            values = values.detach().requires_grad_()
            entered.append(values)
        values = stage(values, start=start, end=end, attention_mask=mask)
        left.append(values)
    loss_of(values, ids).backward()
    for before, after in zip(reversed(left[:-1]), reversed(entered), strict=True):
        before.backward(after.grad)
    return values


def check_packed(name: str) -> None:
    """Raises AssertionError, or whatever else goes wrong, unless segments of a row are computed as each alone."""
    import torch

    from swarm.model.prefix import model_inputs

    model = make(name)
    ids = torch.randint(3, SIZES["vocab_size"], (len(PACKED), LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        packed = model(input_ids=ids, **model_inputs(model, PACKED), use_cache=False).logits
        for number, row in enumerate(PACKED):
            first = 0
            for prefix, length in row:
                part = ids[number : number + 1, first : first + length]
                alone = model(input_ids=part, **model_inputs(model, (((prefix, length),),)), use_cache=False).logits[0]
                off = float((packed[number, first : first + length] - alone).abs().max() / alone.abs().max())
                assert off < 1e-5, f"a segment is off by {off:.2g}"
                first += length


def prefix_mask(prefix: int) -> Any:
    """Additive, fp32 [batch, 1, length, length]: the first `prefix` tokens see each other, the rest is causal."""
    import torch

    sees = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    sees[:, :prefix] = True
    return torch.where(sees, 0.0, torch.finfo(torch.float32).min).expand(BATCH, 1, LENGTH, LENGTH)


def loss_of(logits: Any, ids: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def verdict(name: str) -> tuple[bool, bool, bool, str]:
    """(works, works with a prefix, works packed, why not)"""
    try:
        compare(name, EDGES)
    except Exception as error:  # whatever kind: it does not work
        return False, False, False, f"{type(error).__name__}: {error}"
    try:
        compare(name, EDGES, prefix=PREFIX)
    except Exception as error:
        return True, False, False, f"with a prefix: {type(error).__name__}: {error}"
    try:
        check_packed(name)
    except Exception as error:
        return True, True, False, f"packed: {type(error).__name__}: {error}"
    return True, True, True, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="as in config.json's model_type (all)")
    wanted = parser.parse_args().names
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    found = {}
    for name in wanted or names():
        found[name] = works, prefix, packed, why = verdict(name)
        said = (
            "works" if packed else "works, not packed" if prefix else "works, not with a prefix" if works
            else "does not work"
        )
        print(f"{name}: {said}" + (f" ({' '.join(why.split())[:160]})" if why else ""), flush=True)
    if not wanted:
        DOCUMENT.write_text(document(found), encoding="utf-8")
        print(f"written to {DOCUMENT.relative_to(ROOT)}")
    return 0


def document(found: dict[str, tuple[bool, bool, bool, str]]) -> str:
    import transformers

    full = [name for name, (_, prefix, _, _) in found.items() if prefix]
    packed = [name for name, (_, _, packed, _) in found.items() if packed]
    causal = [name for name, (works, prefix, _, _) in found.items() if works and not prefix]
    none = [name for name, (works, _, _, _) in found.items() if not works]
    return f"""# Families that can be cut into stages

Made by `scripts/families.py` with transformers {transformers.__version__}: three chained stages of a tiny model against
the whole one, logits and gradients equal to the last bit. Of {len(found)} families {len(full) + len(causal)} work.

**Causal and with a bidirectional prefix ({len(full)}):** {", ".join(full)}

**Packed, each segment as it would be alone ({len(packed)}):** {", ".join(packed)}

**Causal only ({len(causal)}):** {", ".join(causal)}

**Not, or not in a config as small as this ({len(none)}):** {", ".join(none)}
"""


if __name__ == "__main__":
    sys.exit(main())
