"""The command line of `python -m swarm.peer`: flag > SWARM_* environment > --config file > default.

Names, types and defaults come from `PeerConfig`; `_HELP` adds what a person needs to know. What the swarm decides
(the keys of `RunConfig`) is refused here with its own message: a joiner cannot train another model, or another way.
Every mistake is a `ConfigError` that says what to do. Nothing heavy is imported: `--help` must not wait for torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import configargparse
import yaml

from swarm.config import PeerConfig, RunConfig
from swarm.errors import ConfigError
from swarm.units import format_bytes, maddr_problem, parse_bytes, parse_count, printable

RUN_ID_PATTERN = r"[a-z0-9][a-z0-9-]{0,39}-[0-9a-f]{12}"
EXAMPLE_PEER = "/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
_MADDR = "MADDR"
_HELP: dict[str, dict[str, tuple[str, str]]] = {
    "what to do (none of these: go on with the run in the home folder)": {
        "new_swarm": ("", "start a run; others join you"),
        "run": ("FILE", "what the new swarm trains, a YAML file; only with --new-swarm (default: the demo run)"),
        "initial_peers": (_MADDR, "join a run through these peers; all else comes from the swarm"),
        "run_id": ("ID", "which run, where several share one network"),
        "join_timeout_s": ("SECONDS", "give up joining after this long"),
        "until_tokens": ("N", "leave cleanly once the swarm has trained N tokens (20M is understood)"),
        "restart": ("", "start again, from the home folder, whatever ends this peer but you (not on Windows)"),
    },
    "this machine": {
        "home": ("DIR", "the only folder this program writes to: identity, checkpoints, addresses"),
        "name": ("TEXT", "what others see (default: two words made from the peer id)"),
        "role": ("ROLE", "trainer, or rendezvous: a stable peer that others join through and that trains nothing"),
        "device": ("DEVICE", "auto, cpu, cuda, cuda:N or mps"),
        "threads": ("N", "CPU threads for training; 0: torch decides"),
        "fragments": ("A:B", "which fragments of the model to hold: those from A to before B, counted from 0, or auto"),
        "weights": ("KIND", "fp32, bf16 (3 bytes a weight, and half the gradients), or auto: fp32 where that fits"),
        "optimizer_bits": ("BITS", "of AdamW's moments: 32, 8, or auto: 32 where that fits"),
        "max_memory": ("SIZE", "how much memory to take at most, such as 6GB (default: what is free)"),
        "base": ("DIR", "folder with the frozen model that this run's adapters are for, where it is not on the hub"),
        "spare_disk": (
            "SIZE", "disk for spare copies of what others hold, so that it outlives them; 0: none (default: a tenth of "
            "what is free, 20GB at most)",
        ),
        "listen": (_MADDR, "addresses to listen on (default: a free TCP port, kept for the next start)"),
        "announce": (_MADDR, "addresses to tell others, where they differ, as with port forwarding"),
        "no_introductions": ("", "do not help peers behind closed routers to find each other"),
    },
    "what you see": {
        "ui": ("KIND", "auto (live on a terminal, else plain), plain, live or json"),
        "verbose": ("", "every round, and the traceback of an error"),
    },
}
_FIELDS = {f.name: f for f in dataclasses.fields(PeerConfig)}
_CHOICES = {
    "role": ("trainer", "rendezvous"), "ui": ("auto", "plain", "live", "json"),
    "weights": ("auto", "fp32", "bf16"), "optimizer_bits": ("auto", "32", "8"),
}  # fmt: skip
_READ: dict[str, Callable[[str], Any]] = {
    "join_timeout_s": float, "until_tokens": parse_count, "threads": parse_count, "max_memory": parse_bytes,
    "spare_disk": parse_bytes,
}  # fmt: skip


MIN_MEMORY_BYTES = 750_000_000
"""the program itself takes that; see host/memory.py"""


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> PeerConfig:
    """The peer config for these arguments. Raises ConfigError; --help and --print-config print and exit 0."""
    arguments = [_dashed(argument) for argument in argv]
    _refuse_run_settings(arguments)
    parser = make_parser()
    given = parser.parse_args(arguments, env_vars=_settings_in(environ))
    sources = _sources(parser, arguments)
    values = {key: getattr(given, key) for key in _FIELDS}
    for key in filter(_is_list, _FIELDS):
        values[key] = [part.strip() for item in values[key] for part in item.split(",") if part.strip()]
    config = PeerConfig(**values)
    if given.print_config:  # before the check: whoever looks for a mistake wants to see where each value comes from
        print("\n".join(f"{key.replace('_', '-')}: {json.dumps(values[key])}  # {sources[key]}" for key in values))
    _check(config, sources)
    if given.print_config:
        sys.exit(0)
    return config


def make_parser() -> configargparse.ArgumentParser:
    """One option a field of PeerConfig; scripts that take the same options may add their own."""
    parser = _Parser(
        prog="python -m swarm.peer",
        description="Train a language model together with other people's computers.",
        epilog="Every option can also be a key of the --config file, or a variable such as SWARM_HOME. A flag counts "
        "more than a variable, a variable more than the file.",
        config_file_parser_class=_ConfigFile,
        allow_abbrev=False,  # an abbreviation breaks when an option is added
        add_config_file_help=False,
        add_env_var_help=False,
    )
    for title, options in _HELP.items():
        group = parser.add_argument_group(title)
        for key, (metavar, text) in options.items():
            _add(group, key, metavar, text)
    files = parser.add_argument_group("files")
    files.add_argument("--config", metavar="FILE", is_config_file_arg=True, help="YAML file with options as above")
    files.add_argument("--print-config", action="store_true", help="print each value and its source, then exit")
    return parser


def _add(group: Any, key: str, metavar: str, text: str) -> None:
    field = _FIELDS[key]
    names = [f"--{key.replace('_', '-')}"]
    variable = f"SWARM_{key.upper()}"
    if field.default is False:
        names = ["-v", *names] if key == "verbose" else names
        group.add_argument(*names, env_var=variable, action="store_true", help=text)
    elif _is_list(key):
        # given twice, both count: losing the first silently would lose a way into the swarm
        group.add_argument(
            *names, env_var=variable, action="extend", nargs="+", default=[], metavar=metavar, help=text
        )
    else:
        shown = "" if field.default is None else f" (default: {field.default})"
        read = _reader(key) if key in _READ else str
        group.add_argument(
            *names, env_var=variable, type=read, default=field.default, metavar=metavar, help=text + shown,
        )  # fmt: skip


def _reader(key: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return _READ[key](text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]
    """Usage errors are ConfigErrors like all others, so that they can be tested and read the same."""

    def error(self, message: str) -> NoReturn:
        option = re.match(r"argument (?:-v/)?--([a-z-]+):", message)
        source = _sources(self, []).get(option[1].replace("-", "_"), "default") if option else "default"
        why = "" if source == "default" else f"the value is from {source}"
        raise ConfigError(message, why=why, do="see python -m swarm.peer --help")


class _Yaml(yaml.SafeLoader):
    """Whole numbers stay text, which is what ConfigArgParse wants: YAML reads 1:3 as 63, in base 60, and not as the
    fragments from 1 to before 3."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _ConfigFile(configargparse.ConfigFileParser):  # type: ignore[misc]
    """Flat YAML, keys with dashes or underscores. Unknown keys are errors: a limit with a typo is no limit."""

    def get_syntax_description(self) -> str:
        return "YAML, one option a line"

    def parse(self, stream: io.TextIOBase) -> dict[str, str | list[str]]:
        origin = str(getattr(stream, "name", "the config file"))
        try:
            document = yaml.load(stream, Loader=_Yaml)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{origin} is not YAML", why=str(error), do="write one `key: value` a line") from None
        if document is None:
            return {}
        if not isinstance(document, dict):
            raise ConfigError(f"{origin} must be keys and values", why=f"got {type(document).__name__}")
        return {
            f"{key}".replace("_", "-"): _spelled(value, origin=origin, key=f"{key}")
            for key, value in document.items()
            if _known(f"{key}", value, origin=origin) and value is not None
        }


def _known(key: str, value: Any, *, origin: str) -> bool:
    """True for an option of this machine; an error that says which kind of mistake it is for all else."""
    name = key.replace("-", "_")
    if name in _FIELDS:
        return True
    if isinstance(value, dict):  # as in a run config: name the first setting under it
        for inner, asked in value.items():
            if (full := f"{name}.{inner}".replace("-", "_")) in _RUN_KEYS:
                raise _decided_by_the_swarm(full, asked, origin=origin)
    if name in _RUN_KEYS:
        raise _decided_by_the_swarm(name, value, origin=origin)
    known = ", ".join(field.replace("_", "-") for field in _FIELDS)
    raise ConfigError(f"{origin}: unknown key {key!r}", why="typos must not pass silently", do=f"known here: {known}")


def _spelled(value: Any, *, origin: str, key: str) -> str | list[str]:
    """As ConfigArgParse wants it: text or a list of texts."""
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        if _is_list(key.replace("-", "_")):
            return [str(item) for item in value]
    elif not isinstance(value, (list, dict)):
        return str(value)
    raise ConfigError(f"{origin}: {key} must be one value", why=f"got {value!r}")


def _run_keys(cls: Any, at: str = "") -> dict[str, str]:
    """Every way to name a run setting -> its full name: `averaging.bits` and `bits` both mean averaging.bits."""
    keys: dict[str, str] = {}
    for name, hint in typing.get_type_hints(cls).items():
        keys = {name: f"{at}{name}", f"{at}{name}": f"{at}{name}"} | keys
        for section in (hint, *typing.get_args(hint)):  # `DataConfig | None` is one too
            if dataclasses.is_dataclass(section) and typing.get_origin(hint) not in (list, dict):
                keys = _run_keys(section, f"{at}{name}.") | keys
    return keys


_RUN_KEYS = {
    key: full for key, full in _run_keys(RunConfig).items() if key not in _FIELDS and key not in ("config", "help")
}


def _decided_by_the_swarm(name: str, asked: Any, *, origin: str) -> ConfigError:
    return ConfigError(
        f"{origin}: this is decided by the swarm ({_RUN_KEYS[name]}); you asked for {asked}",
        why="all peers of a run must agree on it",
        do="leave it out; to train with another value, write it into a run config and start a swarm of your own: "
        "--new-swarm --run FILE",
    )


def _refuse_run_settings(arguments: list[str]) -> None:
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in _RUN_KEYS:
            following = [a for a in arguments[position + 1 : position + 2] if not a.startswith("--")]
            raise _decided_by_the_swarm(name, value if equals else "".join(following) or "true", origin=flag)


def _dashed(argument: str) -> str:
    """--initial_peers is --initial-peers: hivemind spells it so, and people copy it."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def _settings_in(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that mean something here; ConfigArgParse wants a list in brackets, people write commas."""
    found = {f"SWARM_{key.upper()}": key for key in _FIELDS}
    return {
        variable: f"[{value}]" if _is_list(key) else value
        for variable, key in found.items()
        if (value := environ.get(variable, "").strip())
    }


def _is_list(key: str) -> bool:
    return _FIELDS[key].default_factory is list


def _sources(parser: configargparse.ArgumentParser, arguments: list[str]) -> dict[str, str]:
    """Where each value comes from, in words."""
    sources = dict.fromkeys(_FIELDS, "default")
    given = {argument.partition("=")[0] for argument in arguments}
    for action in parser._actions:
        if given.intersection(action.option_strings):
            sources[action.dest] = "flag"
    for source, settings in parser.get_source_to_settings_dict().items():
        kind, _, path = source.partition("|")
        for key, (action, _value) in settings.items():
            if kind == "environment_variables":
                sources[action.dest] = f"environment {key}"
            elif kind == "config_file":
                sources[action.dest] = f"file {path}"
    return sources


def _check(config: PeerConfig, sources: dict[str, str]) -> None:
    """What cannot be, or cannot be together. Every message names the option and where its value came from."""

    def said(key: str) -> str:
        flag = f"--{key.replace('_', '-')}"
        return flag if sources[key] == "flag" else f"{flag} (from {sources[key]})"

    def need(ok: bool, key: str, must: str, *, why: str = "", do: str = "") -> None:
        if not ok:
            raise ConfigError(f"{said(key)} {must}", why=why or f"got {getattr(config, key)!r}", do=do)

    for key in ("initial_peers", "run_id"):
        together = f"cannot be used together with {said('new_swarm')}"
        why, do = "one starts a run, the other joins one that exists", "leave out one of the two"
        need(not (config.new_swarm and getattr(config, key)), key, together, why=why, do=do)
    need(
        config.new_swarm or config.run is None, "run", "is only for --new-swarm",
        why="a peer that joins or resumes trains what its swarm trains", do="add --new-swarm, or leave out --run",
    )  # fmt: skip
    for key, known in _CHOICES.items():
        need(getattr(config, key) in known, key, f"must be one of {', '.join(known)}")
    known_device = re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", config.device)
    need(known_device is not None, "device", "must be auto, cpu, cuda, cuda:N or mps")
    need(config.until_tokens is None or config.until_tokens > 0, "until_tokens", "must be over 0")
    need(0 <= config.threads <= 4096, "threads", "must be 0 (torch decides) to 4096")
    try:
        _ = config.fragment_span
    except ValueError as error:
        need(
            False, "fragments", "must be auto or A:B", do="--fragments 0:2 holds the first two",
            why=f"{error}; into how many the model is cut is decided by the swarm, which of them you hold by you",
        )  # fmt: skip
    enough = config.max_memory is None or config.max_memory >= MIN_MEMORY_BYTES
    got = "" if config.max_memory is None else f"got {format_bytes(config.max_memory)}; the program itself needs that"
    need(enough, "max_memory", f"must be {format_bytes(MIN_MEMORY_BYTES)} or more", why=got)
    need(0 < config.join_timeout_s <= 86_400, "join_timeout_s", "must be over 0 and at most 86400 seconds")
    need(config.home.strip() != "", "home", "must be a folder")
    name = config.name
    need(name is None or (0 < len(name) <= 40 and name.isprintable()), "name", "must be 1 to 40 visible characters")
    known_run_id = config.run_id is None or re.fullmatch(RUN_ID_PATTERN, config.run_id)
    need(bool(known_run_id), "run_id", "must look like demo-0123456789ab")
    for key in ("initial_peers", "listen", "announce"):
        for maddr in getattr(config, key):
            problem = maddr_problem(maddr, needs_peer_id=key == "initial_peers")
            example = f"/ip4/203.0.113.7/tcp/31337{EXAMPLE_PEER if key == 'initial_peers' else ''}"
            need(not problem, key, f"has a bad address: {printable(maddr)}", why=problem, do=f"a good one: {example}")
