"""The two configs, kept apart: what all peers of a run agree on, and what one machine decides for itself.

`RunConfig` is a small document: YAML for people, canonical JSON for the hash. `run_id` is its name and the first
12 hex digits of its SHA-256, so nobody can change a run without making another run (DESIGN 5).
`PeerConfig` holds one machine's choices (flag > SWARM_* environment > --config file > default; see `swarm/cli.py`).
Standard library and yaml only: `--help` must not wait for torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from swarm.config_data import DataConfig as DataConfig
from swarm.config_data import PhaseConfig as PhaseConfig
from swarm.config_data import SourceConfig as SourceConfig
from swarm.config_data import check_data, check_phases, check_sources
from swarm.config_reader import build, has_text_keys, shown
from swarm.errors import ConfigError

MAX_RUN_CONFIG_BYTES = 8_000
"""A run config travels in one DHT record, and records over 10 kB break the DHT."""

MAX_FRAGMENTS = 256


@dataclass(frozen=True)
class LoraConfig:
    """Only small adapters are trained, averaged and downloaded; the model itself is a frozen base that each peer reads
    for itself (swarm/model/lora.py)."""

    rank: int = 16
    alpha: float = 32.0
    """an adapter's output counts alpha / rank times"""
    targets: list[str] = field(default_factory=list)
    """last part of the names of the linear layers that get an adapter, such as q_proj; none: all that are in blocks"""
    base: str = "nf4"
    """how the linear layers of the blocks are kept: nf4 (4.25 bits a weight), bf16 or fp32"""


@dataclass(frozen=True)
class ModelConfig:
    """Which model: `config`, or `source`, or both: then the weights of `source`, whose config need not be fetched."""

    config: dict[str, Any] | None = None
    """Hugging Face config as in config.json, `model_type` included; weights are drawn from the run's seed"""
    source: str | None = None
    """a folder in Hugging Face layout, or a hub id; its weights are the start"""
    revision: str | None = None
    """of the hub id"""
    lora: LoraConfig | None = None
    """train adapters only; None: all weights"""


@dataclass(frozen=True)
class TrainConfig:
    sequence_length: int = 128
    """tokens"""
    batch_sequences: int = 8
    """sequences in one inner step of one peer"""
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.1
    """fraction of `learning_rate` at the end of the cosine"""
    warmup_tokens: int = 0
    total_tokens: int = 1_000_000
    """the learning-rate schedule ends here; counted over the swarm, never in local steps"""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """of each fragment's gradient, so that the cut does not change the arithmetic; 0: no clipping"""


@dataclass(frozen=True)
class AveragingConfig:
    mode: str = "local"
    """local: pseudo-gradients of many inner steps; sync: gradients of every step, fp32 (exact, for small LANs)"""
    tokens_per_round: int = 80_000
    """swarm tokens for a fragment between two of its rounds (sync: tokens of one step of the whole swarm). The default
    is 20 inner steps of 1,024 tokens at each of four peers: for long runs. In a short one from cold it costs quality
    (at 1 M tokens 48,000 ended 2.2 % above 12,000: swarm/README.md), so the demo has 32,000"""
    max_round_s: float = 60.0
    """a round opens after this many seconds even with fewer tokens"""
    bits: int = 4
    """on the wire: 2 (thin links), 4, 8 or 32 a value (norms, biases and embeddings at least 8)"""
    outer_learning_rate: float | None = None
    """None: 1, or less beside a momentum over 0.86 (averaging/outer_settings.py). Symptom of too much: momentum's"""
    outer_momentum: float | None = None
    """Nesterov's. None: by the number of rounds that the run will have: 0.8 for 35, 0.9 from 70 on, none below 8. A run
    from cold with short rounds wants less: 21 of the demo ended 2 % better with 0.5 than with 0.7. Symptom of too much:
    a loss that swings with the rounds; of too little: one that lags the more, the longer rounds are"""
    first_round_tokens: int = 0
    """of the first round of a run that starts afresh; they grow to `tokens_per_round` over `ramp_tokens`. A model that
    knows nothing moves too far between two averages (symptom: a loss that lags from the start). 0: rounds are alike,
    which is right for a run that goes on from trained weights"""
    ramp_tokens: int = 0
    """swarm tokens over which rounds grow; 0 with `first_round_tokens` 0"""
    warm_steps: int = 40
    """inner steps of a newcomer until its contributions weigh in full: its AdamW knows no moments yet (symptom: a loss
    that jumps when somebody joins). 0: at once"""
    momentum_restart: float = 0.5
    """outer momentum starts again where more than this share of the swarm's weight is new or gone at once: it is the
    memory of another swarm (symptom: a loss that jumps when many join or leave). 1: never"""
    robust: bool = True
    """contributions are held against each other, so that few cannot spoil the average (averaging/robust.py). False: the
    plain mean, of people who trust each other's computers"""


LATER_AVERAGING = ("first_round_tokens", "ramp_tokens", "warm_steps", "momentum_restart", "robust")
"""settings that came later: see `canonical_json`"""


@dataclass(frozen=True)
class PipelineConfig:
    """How microbatches travel between peers that hold parts of the model."""

    activation_bits: int = 8
    """a value of what is sent on: 8, 4 (half the bytes, where links bind; 1 to 3 % of the loss in the
    demo's first 200,000 tokens) or 32 (exact). Gradients come back with 8, or with 32 where activations have 32. `sync`
    runs always have 32"""


@dataclass(frozen=True)
class RunConfig:
    """What a swarm trains. All its peers agree on every byte of it."""

    name: str
    model: ModelConfig
    data: DataConfig | None = None
    """the one text that it trains on, or"""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """several by name: exactly one of `data` and `sources`"""
    phases: list[PhaseConfig] = field(default_factory=list)
    """one after the other; empty: plain causal text, each source with the same share"""
    tokenizer: str = "bytes"
    """"bytes", a folder, or a hub id"""
    fragments: int = 4
    seed: int = 0
    train: TrainConfig = field(default_factory=TrainConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    initial_digests: list[str] = field(default_factory=list)
    """of each fragment at version 0; filled in by the peer that starts the run, so that a joiner can check it"""
    base_digests: list[str] = field(default_factory=list)
    """of each fragment's frozen base, where `model.lora` is used; filled in likewise"""

    def __post_init__(self) -> None:
        _check_run(self)

    @functools.cached_property
    def run_id(self) -> str:
        return f"{self.name}-{hashlib.sha256(canonical_json(self)).hexdigest()[:12]}"

    @property
    def is_mixture(self) -> bool:
        """Whether its rows are packed, each text in a segment of its own. One text without phases is a plain stream."""
        return self.data is None or bool(self.phases)

    def named_sources(self) -> dict[str, SourceConfig]:
        """All it trains on, by name; `data` is called so."""
        if self.data is None:
            return self.sources
        return {"data": SourceConfig(**dataclasses.asdict(self.data))}

    def all_phases(self) -> list[PhaseConfig]:
        """At least one, each with its mixture: every share given, and all of them together 1."""
        names, phases = self.named_sources(), self.phases or [PhaseConfig()]
        mixtures = [phase.mixture or dict.fromkeys(names, 1.0) for phase in phases]
        return [
            dataclasses.replace(phase, mixture={name: share / sum(of.values()) for name, share in of.items()})
            for phase, of in zip(phases, mixtures, strict=True)
        ]

    def phase_at(self, swarm_tokens: int) -> int:
        """Number of the phase that the swarm is in; after the end, the last."""
        end, last = 0, max(0, len(self.phases) - 1)
        for number, phase in enumerate(self.phases[:last]):
            end += phase.tokens or 0
            if swarm_tokens < end:
                return number
        return last


@dataclass(frozen=True)
class PeerConfig:
    """What one machine decides for itself."""

    initial_peers: list[str] = field(default_factory=list)
    """multiaddresses of peers to join through"""
    new_swarm: bool = False
    run: str | None = None
    """file with the run config; only with new_swarm"""
    run_id: str | None = None
    """which run, where several share one DHT"""
    home: str = "~/.swarm"
    name: str | None = None
    """what others see; default: two words made from the peer id"""
    role: str = "trainer"
    """trainer | rendezvous (a stable peer that others join through; trains nothing)"""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N | mps"""
    threads: int = 0
    """CPU threads for training; 0: torch decides"""
    fragments: str = "auto"
    """which of the run's fragments to hold: auto, or A:B for those from A to before B"""
    weights: str = "auto"
    """auto | fp32 | bf16: what this peer computes with; global weights are fp32 everywhere"""
    optimizer_bits: str = "auto"
    """auto | 32 | 8: of AdamW's two moments, which no other peer sees"""
    max_memory: int | None = None
    """bytes this peer may take, of main memory and of the GPU's each; default: what is free"""
    base: str | None = None
    """folder with the frozen base of a run with adapters, where that is not on the hub"""
    spare_disk: int | None = None
    """bytes of the disk for spare copies of fragments that others hold, 0: none; default: a tenth of what is free,
    20 GB at most"""
    listen: list[str] = field(default_factory=list)
    """multiaddresses to listen on; default: a free TCP port on every interface, kept for the next start"""
    announce: list[str] = field(default_factory=list)
    """multiaddresses to tell others, where they differ from `listen` (port forwarding)"""
    no_introductions: bool = False
    """do not tell peers behind routers each other's addresses"""
    until_tokens: int | None = None
    """leave cleanly once the swarm has trained this many tokens"""
    restart: bool = False
    """start again whatever ends this peer, but its owner or the run's end"""
    ui: str = "auto"
    """auto (live on a terminal, else plain) | plain | live | json"""
    join_timeout_s: float = 60.0
    """give up joining after this long"""
    verbose: bool = False

    @property
    def fragment_span(self) -> tuple[int, int] | None:
        """(first fragment to hold, one past the last); None: whatever is best for the swarm. Raises ValueError."""
        if self.fragments == "auto":
            return None
        if re.fullmatch(r"[0-9]{1,3}:[0-9]{1,3}", self.fragments) is None:
            raise ValueError(f"{self.fragments!r} is neither auto nor of the form A:B")
        start, end = map(int, self.fragments.split(":"))
        if not start < end <= MAX_FRAGMENTS:
            raise ValueError(f"there are no fragments from {start} to before {end}")
        return start, end


def canonical_json(run: RunConfig) -> bytes:
    """The one spelling of a run config: sorted keys, no spaces, ASCII. Its SHA-256 names the run. What came later is
    spelt only where it says anything, so that runs from before keep their names.

    Raises ConfigError for what JSON cannot spell; a RunConfig that was made can be spelt.
    """
    try:
        document = dataclasses.asdict(run)
        if run.pipeline == PipelineConfig():
            del document["pipeline"]
        for key in LATER_AVERAGING:
            if getattr(run.averaging, key) == getattr(AveragingConfig(), key):
                del document["averaging"][key]
        document["sources"] = {name: _said(source) for name, source in run.sources.items()}
        document["phases"] = [_said(phase) for phase in run.phases]
        for name in ("data", "sources", "phases"):
            if not document[name]:
                del document[name]
        if run.model.lora is None:
            del document["model"]["lora"]
        if not run.base_digests:
            del document["base_digests"]
        json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair is no text, though ASCII spells it
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            "the run config cannot be written as JSON", why=str(error)[:200],
            do="use text, finite numbers, true, false, null, lists, and keys that are text",
        ) from None


def _said(part: SourceConfig | PhaseConfig) -> dict[str, Any]:
    """What it says that is not so anyway."""
    return {key: value for key, value in dataclasses.asdict(part).items() if value != getattr(type(part)(), key)}


def load_run(path: str | Path) -> RunConfig:
    """Read a run config from YAML. Raises ConfigError naming the file and the key."""
    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = str(error.strerror or error)
        raise ConfigError(f"cannot read the run config {path}", why=why, do="check the path") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # not UTF-8, an impossible date, a bomb
        why = str(error)[:500]
        raise ConfigError(f"{path} is not YAML", why=why, do="see peers/runs/demo.yaml for an example") from None
    return run_from_dict(document, origin=str(path))


def run_from_json(text: bytes, *, run_id: str | None = None) -> RunConfig:
    """Read a run config that came over the network; `run_id`: check that it is the one asked for.

    Raises ConfigError where it is too long, not a run config, or where its hash is not the one in `run_id`.
    """
    if len(text) > MAX_RUN_CONFIG_BYTES:
        raise ConfigError("a run config from the swarm is too long", why=f"{len(text)} > {MAX_RUN_CONFIG_BYTES} bytes")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError("a run config from the swarm is not JSON", do="join through another peer") from None
    run = run_from_dict(document, origin="the swarm's run config")
    if run_id is not None and run.run_id != run_id:
        raise ConfigError(
            "the run config does not match its run_id",
            why=f"asked for {run_id}, its content hashes to {run.run_id}: it was tampered with",
            do="join through another peer",
        )
    return run


def run_from_dict(document: Any, *, origin: str) -> RunConfig:
    run: RunConfig = build(RunConfig, document, origin=origin, at="")
    return run


def _check_run(run: RunConfig) -> None:
    def need(ok: bool, what: str, why: str = "") -> None:
        if not ok:
            raise ConfigError(what, why=why)

    model, data, train, averaging = run.model, run.data, run.train, run.averaging
    name_fits = re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", run.name) is not None
    need(name_fits, "name must be 1-40 of a-z, 0-9 and -", f"got {shown(run.name)}")
    need(model.config is not None or model.source is not None, "model needs config, source, or both")
    need(model.config is None or isinstance(model.config.get("model_type"), str), "model.config needs a model_type")
    try:
        need(has_text_keys(model.config), "every key in model.config must be text")
    except RecursionError:
        raise ConfigError("model.config is nested too deeply") from None
    need((data is None) == bool(run.sources), "a run needs exactly one of data and sources")
    if data is not None:
        check_data(data)
    check_sources(run.sources)
    check_phases(run.phases, run.sources, total_tokens=train.total_tokens)
    need(1 <= run.fragments <= MAX_FRAGMENTS, f"fragments must be 1 to {MAX_FRAGMENTS}")
    need(0 <= run.seed < 2**31, "seed must be 0 to 2**31 - 1")
    need(8 <= train.sequence_length <= 2**20, "train.sequence_length must be 8 to 2**20 tokens")
    need(1 <= train.batch_sequences <= 2**16, "train.batch_sequences must be 1 to 65536")
    need(0 < train.learning_rate <= 10, "train.learning_rate must be over 0 and at most 10")
    need(0 <= train.final_learning_rate <= 1, "train.final_learning_rate is a fraction, 0 to 1")
    need(train.warmup_tokens >= 0 and train.total_tokens > 0, "train.warmup_tokens or total_tokens is negative")
    need(all(0 <= beta < 1 for beta in train.betas), "train.betas must be 0 to below 1")
    need(train.weight_decay >= 0 and train.clip_norm >= 0, "train.weight_decay and clip_norm must not be negative")
    need(averaging.mode in ("local", "sync"), "averaging.mode must be local or sync", f"got {shown(averaging.mode)}")
    need(averaging.bits in (2, 4, 8, 32), "averaging.bits must be 2, 4, 8 or 32", f"got {shown(averaging.bits)}")
    need(averaging.mode == "local" or averaging.bits == 32, "averaging.mode sync is exact: it needs bits 32")
    bits = run.pipeline.activation_bits
    need(bits in (4, 8, 32), "pipeline.activation_bits must be 4, 8 or 32", f"got {shown(bits)}")
    rough = averaging.mode == "sync" and bits == 4
    need(not rough, "averaging.mode sync is exact: it cannot have pipeline.activation_bits 4")
    need(averaging.tokens_per_round > 0, "averaging.tokens_per_round must be positive")
    need(0.1 <= averaging.max_round_s <= 86_400, "averaging.max_round_s must be 0.1 to 86400")
    rate, momentum = averaging.outer_learning_rate, averaging.outer_momentum
    need(rate is None or 0 < rate <= 10, "averaging.outer_learning_rate must be over 0 and at most 10")
    need(momentum is None or 0 <= momentum < 1, "averaging.outer_momentum must be 0 to below 1")
    _check_policy(averaging, need)
    need(len(run.initial_digests) in (0, run.fragments), "initial_digests needs one digest a fragment")
    need(all(re.fullmatch(r"[0-9a-f]{64}", d) for d in run.initial_digests), "initial_digests must be SHA-256 in hex")
    if model.lora is not None:
        _check_lora(model.lora, need)
    need(not run.base_digests or model.lora is not None, "base_digests are of runs with model.lora only")
    need(len(run.base_digests) in (0, run.fragments), "base_digests needs one digest a fragment")
    need(all(re.fullmatch(r"[0-9a-f]{32}", d) for d in run.base_digests), "base_digests must be 32 hex digits each")
    size = len(canonical_json(run))
    why = f"{size} > {MAX_RUN_CONFIG_BYTES} bytes"
    need(size <= MAX_RUN_CONFIG_BYTES, "the run config is too long for a DHT record", why)


def _check_policy(averaging: AveragingConfig, need: Callable[..., None]) -> None:
    first, full = averaging.first_round_tokens, averaging.tokens_per_round
    need(first >= 0 and averaging.ramp_tokens >= 0, "averaging.first_round_tokens or ramp_tokens is negative")
    why = f"got {first} and {averaging.ramp_tokens}"
    need((first > 0) == (averaging.ramp_tokens > 0), "averaging.first_round_tokens and ramp_tokens go together", why)
    need(first <= full, "averaging.first_round_tokens must be at most tokens_per_round", f"got {first} > {full}")
    need(not first or averaging.mode == "local", "averaging.first_round_tokens is for runs with mode local")
    need(0 <= averaging.warm_steps <= 10_000, "averaging.warm_steps must be 0 to 10000")
    need(0 < averaging.momentum_restart <= 1, "averaging.momentum_restart must be over 0 and at most 1")


def _check_lora(lora: LoraConfig, need: Callable[..., None]) -> None:
    need(1 <= lora.rank <= 1024, "model.lora.rank must be 1 to 1024")
    need(0 < lora.alpha <= 1e6, "model.lora.alpha must be over 0 and at most a million")
    known = lora.base in ("nf4", "bf16", "fp32")
    need(known, "model.lora.base must be one of nf4, bf16, fp32", f"got {shown(lora.base)}")
    named = all(re.fullmatch(r"[A-Za-z0-9_]{1,64}", name) for name in lora.targets)
    need(named, "model.lora.targets must be names of layers, such as q_proj", f"got {shown(lora.targets)}")
    need(len(set(lora.targets)) == len(lora.targets), "model.lora.targets has a name twice")
