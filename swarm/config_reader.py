"""Plain data, as YAML and JSON give it, made into frozen dataclasses, with errors that name the key.

Typos must not pass silently: a key that means nothing, a word where a number belongs, `yes` for 1 are ConfigErrors that
say where (`train.betas`) and what is known there. Standard library only, as `swarm/config.py`, which builds on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from typing import Any

from swarm.errors import ConfigError


def build(cls: Any, document: Any, *, origin: str, at: str) -> Any:
    """Make dataclass `cls` from plain data; unknown keys and wrong types are errors that name the key."""
    where = at.rstrip(".") or "top level"
    if not isinstance(document, dict):
        raise ConfigError(f"{origin}: {where} must be keys and values", why=f"got {type(document).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [key for key in document if key not in fields]
    if unknown:
        raise ConfigError(
            f"{origin}: unknown key {', '.join(repr(f'{at}{key}') for key in unknown)}",
            why="typos must not pass silently",
            do=f"known here: {', '.join(fields)}",
        )
    missing = [
        name for name, f in fields.items()
        if name not in document and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{origin}: missing key {', '.join(repr(f'{at}{key}') for key in missing)}")
    hints = typing.get_type_hints(cls)
    values = {key: convert(hints[key], value, origin=origin, at=f"{at}{key}") for key, value in document.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error.what}", why=error.why, do=error.do) from None


def convert(hint: Any, value: Any, *, origin: str, at: str) -> Any:
    """`value` as type `hint`, or ConfigError. Integers pass for floats, lists for tuples, never the other way."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, origin=origin, at=f"{at}.")
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        if value is None:
            return None
        return convert(next(a for a in arguments if a is not type(None)), value, origin=origin, at=at)
    if kind is list and isinstance(value, (list, tuple)):
        numbered = dataclasses.is_dataclass(arguments[0])
        return [
            convert(arguments[0], item, origin=origin, at=f"{at}[{number}]" if numbered else at)
            for number, item in enumerate(value)
        ]
    if kind is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(convert(a, item, origin=origin, at=at) for a, item in zip(arguments, value, strict=True))
    if kind is dict and isinstance(value, dict):
        if arguments[1] is Any:
            return value
        if not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{origin}: every key in {at} must be text")
        return {key: convert(arguments[1], item, origin=origin, at=f"{at}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number beyond all floats
            if math.isfinite(value):
                return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{origin}: {at} must be {wanted}", why=f"got {shown(value)}")


def shown(value: Any) -> str:
    try:
        return repr(value)[:200]
    except (ValueError, RecursionError):  # Python spells no whole number of over 4300 digits
        return "something too long to show"


def has_text_keys(value: Any) -> bool:
    """JSON would turn the key 1 into "1", and null into "null": two documents with one hash."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and has_text_keys(item) for key, item in value.items())
    return not isinstance(value, (list, tuple)) or all(map(has_text_keys, value))
