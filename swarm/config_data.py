"""Which text a run trains on: its sources, and the phases that mix them. Part of the run config (`swarm/config.py`).

A run has either `data`, one plain text, or `sources`, several by name, each in a format of its own. `phases` say in
which shares they are mixed, under which objective, and for how many tokens of the whole swarm: GPT-JT's recipe
(https://huggingface.co/togethercomputer/GPT-JT-6B-v1) is two phases over four sources. Standard library only.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from swarm.errors import ConfigError

FORMATS = ("text", "p3", "natural-instructions", "cot")
OBJECTIVES = ("causal", "prefix", "ul2", "ul2r")
MAX_SHOTS = 64


@dataclass(frozen=True)
class DataConfig:
    """Which text: exactly one of `stdlib`, `files` and `hub`."""

    stdlib: bool = False
    """the running Python's own standard library and its documentation (about 12 MB, on every machine)"""
    files: list[str] = field(default_factory=list)
    """txt, jsonl, jsonl.zst or parquet files or glob patterns"""
    hub: str | None = None
    """a data set on the Hugging Face hub"""
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    held_out_percent: float = 4.0
    """of the documents, chosen by the hash of their names; never trained on"""


@dataclass(frozen=True)
class SourceConfig:
    """One of the texts or sets of tasks that a run mixes: exactly one of `stdlib`, `files` and `hub`; of a data set on
    the hub `files` may say which."""

    format: str = "text"
    """text (one field a document) | p3 (inputs, targets) | natural-instructions (the folder of the repository, or
    rows with definition, inputs, targets) | cot (a JSON file of subject: text, or rows with inputs, targets)"""
    stdlib: bool = False
    """the running Python's own standard library and its documentation; only as text"""
    files: list[str] = field(default_factory=list)
    """txt, jsonl, jsonl.zst, json or parquet files, or glob patterns; for natural-instructions its folder, too.
    With `hub`: files or patterns in the data set"""
    hub: str | None = None
    """a data set on the Hugging Face hub"""
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    """of format text"""
    streaming: bool = False
    """read as it is needed and never kept: for what is larger than memory"""
    shots: int = 4
    """of tasks: at most so many solved examples stand before the one that is asked"""
    held_out_percent: float = 1.0
    """of the documents or examples, chosen by the hash of their names; never trained on"""


@dataclass(frozen=True)
class PhaseConfig:
    """A part of the run, by tokens of the whole swarm: all peers go over to the next one at the same tokens."""

    tokens: int | None = None
    """that it lasts; the last phase may leave it out: it lasts to the end of the run (`train.total_tokens`)"""
    objective: str = "causal"
    """causal | prefix | ul2 | ul2r"""
    mixture: dict[str, float] = field(default_factory=dict)
    """source -> its share of the tokens; need not add up to 1. Empty: the same share of every source"""


def check_data(data: DataConfig) -> None:
    """Raises ConfigError that names the key."""
    given = data.stdlib + bool(data.files) + (data.hub is not None)
    _need(given == 1, "data needs exactly one of stdlib, files and hub")
    _need(0 < data.held_out_percent <= 50, "data.held_out_percent must be over 0 and at most 50")


def check_sources(sources: dict[str, SourceConfig]) -> None:
    for name, source in sources.items():
        at = f"sources.{name}"
        fits = re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", name) is not None
        _need(fits, "a name in sources must be 1-40 of a-z, 0-9 and -", f"got {name[:60]!r}")
        _need(not (source.stdlib and (source.files or source.hub)), f"{at}.stdlib excludes files and hub")
        _need(source.stdlib or bool(source.files) or source.hub is not None, f"{at} needs stdlib, files or hub")
        why = f"got {source.format[:60]!r}"
        _need(source.format in FORMATS, f"{at}.format must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}", why)
        _need(not source.stdlib or source.format == "text", f"{at}.stdlib is text: its format cannot be another")
        _need(not (source.stdlib and source.streaming), f"{at}.stdlib is 10 MB: it is not streamed")
        _need(0 <= source.shots <= MAX_SHOTS, f"{at}.shots must be 0 to {MAX_SHOTS}")
        _need(0 < source.held_out_percent <= 50, f"{at}.held_out_percent must be over 0 and at most 50")


def check_phases(phases: list[PhaseConfig], sources: dict[str, SourceConfig], *, total_tokens: int) -> None:
    """`sources`: those of the run, by name; empty where it has `data`."""
    for number, phase in enumerate(phases):
        at = f"phases[{number}]"
        name = phase.objective.partition(":")[0]
        known = f"{', '.join(OBJECTIVES[:-1])} or {OBJECTIVES[-1]}"
        _need(name in OBJECTIVES, f"{at}.objective must be {known}", f"got {phase.objective[:60]!r}")
        unknown = [key for key in phase.mixture if key not in sources]
        there = f"sources are: {', '.join(sources)}" if sources else "the run has `data`, which is the only source"
        _need(not unknown, f"{at}.mixture names no source: {', '.join(map(repr, unknown))[:200]}", there)
        shares = all(math.isfinite(share) and 0 < share <= 1e6 for share in phase.mixture.values())
        _need(shares, f"{at}.mixture: each share must be over 0", "leave a source out that is not wanted")
        _need(phase.tokens is None or phase.tokens > 0, f"{at}.tokens must be over 0")
        last = number == len(phases) - 1
        _need(last or phase.tokens is not None, f"{at}.tokens is missing", "only the last phase may leave it out")
    counts = [phase.tokens for phase in phases if phase.tokens is not None]
    if len(counts) < len(phases):
        _need(
            sum(counts) < total_tokens, f"phases[{len(phases) - 1}] never begins",
            f"those before it last {sum(counts)} tokens, train.total_tokens is {total_tokens}",
        )
    elif phases:
        what = "the phases' tokens do not add up to train.total_tokens"
        _need(sum(counts) == total_tokens, what, f"{sum(counts)} and {total_tokens}: leave the last phase's out")
    unused = [name for name in sources if phases and not any(name in (p.mixture or sources) for p in phases)]
    _need(not unused, f"sources.{', sources.'.join(unused)}: no phase mixes it", "leave it out, or give it a share")


def _need(ok: bool, what: str, why: str = "") -> None:
    if not ok:
        raise ConfigError(what, why=why)
