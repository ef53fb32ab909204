"""How things are read and written: bytes, seconds, counts, addresses, and text that came from somebody else.

Units are decimal (1 MB = 1,000,000 bytes) as on network links and disks; KiB, MiB and GiB are understood too.
Pure functions, standard library only.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping

_BYTE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
RATE_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
"""for `parse_quantity`"""
_PEER_ID = r"[1-9A-HJ-NP-Za-km-z]{32,64}"  # base58, as libp2p writes it
_NUMBER = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+]?[0-9]{1,2})?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """ "6GB" -> 6000000000, "512 MiB" -> 536870912, "100" -> 100. Raises ValueError with the known units."""
    return _parse(text, _BYTE_UNITS, what="a size", example="6GB or 512MiB")


def parse_count(text: str) -> int:
    """ "20M" -> 20000000, "1.5k" -> 1500, "-3" -> -3 (whoever asks decides whether that makes sense)."""
    sign = -1 if text.strip().startswith("-") else 1
    return sign * _parse(text.strip().removeprefix("-"), _COUNT_UNITS, what="a count", example="500000 or 20M")


def parse_quantity(value: object, units: Mapping[str, float], *, example: str) -> float:
    """ "100mbit" -> 1e8 with RATE_UNITS, "20ms" -> 0.02 with TIME_UNITS; 0 needs no unit. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-z%]*)", str(value).strip().lower())
    number = float(match[1]) if match else math.nan
    if match and match[2] in units:
        return number * units[match[2]]
    if match and not match[2] and number == 0:
        return 0.0
    raise ValueError(f"cannot read {value!r}: it takes a number and a unit ({', '.join(units)}), such as {example}")


def format_bytes(num_bytes: float) -> str:
    """1234567 -> "1.2 MB"."""
    return _scale(num_bytes, ["B", "kB", "MB", "GB", "TB", "PB"], space=" ")


def format_count(count: float) -> str:
    """8100 -> "8.1k", 1200000 -> "1.2M", 14 -> "14"."""
    return _scale(count, ["", "k", "M", "B", "T"], space="")


def format_seconds(seconds: float) -> str:
    """70 -> "1:10", 3670 -> "1:01:10"; "?" where nobody knows."""
    if not math.isfinite(seconds):
        return "?"
    sign, rest = ("-" if seconds <= -0.5 else ""), round(abs(seconds))
    hours, minutes, rest = rest // 3600, rest // 60 % 60, rest % 60
    return f"{sign}{hours}:{minutes:02d}:{rest:02d}" if hours else f"{sign}{minutes}:{rest:02d}"


def printable(text: str, *, max_chars: int = 500) -> str:
    """`text` on one line and harmless in a terminal. Names and warnings are chosen by other peers: an escape

    sequence among them could rewrite the screen or the clipboard of whoever watches.
    """
    shown = text if len(text) <= max_chars else text[: max_chars - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in " ".join(re.split(r"[\t\n\r]+", shown)))


def maddr_problem(maddr: str, *, needs_peer_id: bool) -> str:
    """What keeps `maddr` from being /ip4|ip6|dns.../HOST/tcp|udp/PORT/...[/p2p/ID]; "" where nothing does."""
    parts = maddr.split("/")
    if len(maddr) > 512 or len(parts) < 5 or parts[0] or not all(parts[1:]):
        return "it is not of the form /ip4/HOST/tcp/PORT" + ("/p2p/ID" if needs_peer_id else "")
    host_kind, host, transport, port = parts[1:5]
    if host_kind in ("ip4", "ip6"):
        try:
            (ipaddress.IPv4Address if host_kind == "ip4" else ipaddress.IPv6Address)(host)
        except ValueError:
            return f"{printable(host)!r} is not an {host_kind} address"
    elif host_kind not in ("dns", "dns4", "dns6", "dnsaddr") or not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", host):
        return f"it must begin with /ip4, /ip6 or /dns and a host, not /{printable(host_kind)}/{printable(host)}"
    lowest = 1 if needs_peer_id else 0  # 0 asks for any free port: fine to listen on, nothing to call
    if transport not in ("tcp", "udp") or not re.fullmatch(r"[0-9]{1,5}", port) or not lowest <= int(port) <= 65535:
        return f"after the host come /tcp or /udp and a port, {lowest} to 65535"
    if needs_peer_id and (parts[-2] != "p2p" or not re.fullmatch(_PEER_ID, parts[-1])):
        return "it must end with /p2p/ and the peer's id: otherwise anybody at that address could pose as the peer"
    return ""


def _parse(text: str, units: dict[str, int], *, what: str, example: str) -> int:
    match = _NUMBER.fullmatch(text)
    if match is None or match[2].lower() not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(f"{text!r} is not {what} such as {example} (units: {known})")
    # whole numbers stay integers: a float is exact to 2**53 only
    number = match[1].replace("_", "")
    factor = units[match[2].lower()]
    return int(number) * factor if number.isdigit() else round(float(number) * factor)


def _scale(value: float, units: list[str], *, space: str) -> str:
    if not math.isfinite(value):
        return "?"
    size, unit = abs(value), 0
    # 999.96 would be written "1000": what counts is what is left after rounding
    while unit < len(units) - 1 and float(_digits(size, unit)) >= 1000:
        size, unit = size / 1000, unit + 1
    sign = "-" if value < 0 and float(_digits(size, unit)) else ""
    return f"{sign}{_digits(size, unit)}{space}{units[unit]}".rstrip()


def _digits(size: float, unit: int) -> str:
    """At most two digits after which nobody looks: 8.1, 81, 812; units themselves are whole."""
    text = f"{size:.0f}" if unit == 0 or size >= 99.95 else f"{size:.1f}"
    return text.removesuffix(".0")
