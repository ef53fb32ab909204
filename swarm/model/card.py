"""The model card of an export (README.md): what a stranger must know to use the model, to judge it, and to check it.

It says what the run's peers agreed on, how many tokens of which source it saw, who took part, and the digest of each
fragment, which is what peers of the run have at that version, too. https://arxiv.org/abs/1810.03993; the hub reads the
first lines. Text that strangers chose (names) is made harmless.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.config import RunConfig, canonical_json
from swarm.errors import ConfigError, HomeError
from swarm.units import printable

FILE = "README.md"
BEGIN, END = "<!-- evaluation -->", "<!-- /evaluation -->"
NOT_YET = "Not evaluated yet: `python -m swarm.evaluate FOLDER --card` writes its table here."
Phases = Sequence[tuple[int | None, str, Mapping[str, float]]]
"""(swarm tokens that it lasts, None: to the end; objective; share of each source), one after the other"""


@dataclass(frozen=True)
class Facts:
    run: RunConfig
    parameters: int
    tokens: int
    """of the swarm, in the fragment that has fewest"""
    phases: Phases
    heads: Sequence[tuple[int, int, str]]
    """(version, tokens, digest) of each fragment"""
    names: Sequence[str] = ()
    """of peers that took part and gave one, as far as known"""
    prefix: bool = False
    """its last phase taught it to read a prompt in both directions"""
    mark: Sequence[int] = ()
    """token ids to put before a prompt"""
    datasets: Sequence[str] = ()
    """on the hub"""


def card(facts: Facts) -> str:
    """Markdown."""
    run = facts.run
    parts = [
        _front_matter(facts),
        f"# {run.name}",
        f"A language model of {facts.parameters:,} parameters, trained for {facts.tokens:,} tokens by a swarm: people"
        f"'s own computers on ordinary links, without a server. Run `{run.run_id}`.",
        "## Use", _use(facts),
        "## Evaluation", f"{BEGIN}\n{NOT_YET}\n{END}",
        "## Training", _sources(facts),
        "What all peers agreed on:", "```json\n" + _config(run) + "\n```",
        "## Who trained it", _people(facts.names),
        "## What is in it",
        *_adapters(run),
        "SHA-256 of each fragment's global weights, outer momentum and version. Peers of the run have the same bits:",
        _heads(facts.heads),
    ]
    return "\n\n".join(parts) + "\n"


def add_evaluation(folder: Path, table: str) -> None:
    """Put `table` (markdown) where the card in `folder` has its evaluation. Raises ConfigError, HomeError."""
    path = folder.expanduser() / FILE
    try:
        text = path.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ConfigError(
                f"{path} has no place for an evaluation", why=f"it lacks the lines {BEGIN} and {END}",
                do="export the model again with scripts/export.py, or put these two lines where the table belongs",
            )
        path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no model card {path}", why="only an export of scripts/export.py has one", do="export it again",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise HomeError(f"cannot write the model card {path}", why=str(error), do="check permissions") from None


def tokens_by_phase(phases: Phases, tokens: int) -> list[tuple[str, int, dict[str, int]]]:
    """(objective, tokens in it, tokens of each source) of each phase that has begun, after so many swarm tokens.

    Sources are mixed by tokens, so that their shares of the run config are what was trained on."""
    found: list[tuple[str, int, dict[str, int]]] = []
    left = tokens
    for lasts, objective, mixture in phases:
        here = left if lasts is None else min(left, lasts)
        if here <= 0 and found:
            break
        found.append((objective, here, {source: round(share * here) for source, share in mixture.items()}))
        left -= here
    return found


def _front_matter(facts: Facts) -> str:
    """YAML for the hub, written as JSON values, which are YAML."""
    run = facts.run
    values: dict[str, object] = {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["swarm", *(["prefix-lm"] if facts.prefix else [])],
    }
    if run.model.source is not None:
        values["base_model"] = run.model.source
    if facts.datasets:
        values["datasets"] = sorted(set(facts.datasets))
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"])


def _use(facts: Facts) -> str:
    lines = [
        "```python", *(["import torch"] if facts.mark else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'folder = "."  # or where you downloaded it to', "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
    ]
    if facts.prefix:
        lines.append("model.config.is_causal = False  # the prompt is read in both directions; only for generate")
    lines.append('ids = tokenizer("Is it positive? I love this! Answer:", return_tensors="pt").input_ids')
    if facts.mark:
        mark = ", ".join(map(str, facts.mark))
        lines.append(f"ids = torch.cat([torch.tensor([[{mark}]]), ids], dim=1)  # the mark for going on with a text")
    lines += ["print(tokenizer.decode(model.generate(ids, max_new_tokens=30)[0]))", "```"]
    if facts.prefix:
        lines += [
            "", "It was trained with a causal mask with prefix: the tokens of the prompt see each other, those that are"
            " written see what is before them. `generate` does so with `is_causal = False`, since each new token sees"
            " the cache and nothing else. Never take the likelihood of a text in one pass that way: each token would"
            " see itself. Leave `is_causal` alone for that, or pass a 4D attention mask.",
        ]
    return "\n".join(lines)


def _sources(facts: Facts) -> str:
    rows = ["| phase | objective | source | tokens |", "|-|-|-|-:|"]
    for number, (objective, _, sources) in enumerate(tokens_by_phase(facts.phases, facts.tokens), start=1):
        rows += [f"| {number} | {objective} | {source} | {tokens:,} |" for source, tokens in sources.items()]
    return "\n".join(rows)


def _people(names: Sequence[str]) -> str:
    if not names:
        return "Nobody who gave a name, as far as is known."
    shown = [re.sub(r"[`|<>\[\]]", "?", printable(name, max_chars=40)) for name in names]
    return "Those who gave a name: " + ", ".join(f"`{name}`" for name in shown) + "."


def _adapters(run: RunConfig) -> list[str]:
    lora = run.model.lora
    if lora is None:
        return []
    return [
        f"Adapters of rank {lora.rank} on a frozen base ({lora.base}), merged into it here. What was trained, and what"
        " the digests are of, is the adapters:"
    ]


def _heads(heads: Sequence[tuple[int, int, str]]) -> str:
    rows = ["| fragment | version | tokens | digest |", "|-:|-:|-:|-|"]
    for index, (version, tokens, digest) in enumerate(heads):
        rows.append(f"| {index} | {version} | {tokens:,} | `{digest}` |")
    return "\n".join(rows)


def _config(run: RunConfig) -> str:
    return json.dumps(json.loads(canonical_json(run)), indent=1, sort_keys=True)
