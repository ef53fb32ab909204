"""Frames: how messages travel on one stream between two peers. Every length is bounded before it is read.

    frame   = kind (1 byte)  call (4 bytes)  length (4 bytes)  payload (`length` bytes, at most 512 KiB)
    request = REQUEST {"m": method, "h": header, "n": body bytes}, then frames REQUEST_BODY
    answer  = ANSWER {"h": header, "n": body bytes}, then frames ANSWER_BODY;   or   REFUSED {"why": text}
    CANCEL  = the asker has given up on `call`
    ARRIVED = the bytes of bodies that have arrived on this stream so far, when, and the share of the receiver's line
              that the stream may take (24 bytes); see pacing.py and line.py

A request with "q" is quiet: nobody waits for an answer, and none is sent.

`call` numbers are the asker's own. Frames of many calls interleave, so that a heartbeat never waits behind a tensor.
Frames in a raw stream reach 350-380 MB/s on loopback; one long message is four times slower and a unary libp2p call
costs five to ten times the CPU (DESIGN 9). We send bodies in frames of 64 KiB, which are 50 ms on 10 Mbit/s.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import struct
from typing import Any

from swarm.errors import BadMessage

MAX_FRAME_BYTES = 512 * 1024
"""that we accept"""
FRAME_BYTES = 64 * 1024
"""that we send"""
MAX_HEAD_BYTES = 64 * 1024
MAX_HEAD_DEPTH = 8

REQUEST, REQUEST_BODY, ANSWER, ANSWER_BODY, REFUSED, CANCEL, ARRIVED = range(1, 8)
_KINDS = range(REQUEST, ARRIVED + 1)
_HEADER = struct.Struct("!BII")
HEADER_BYTES = _HEADER.size


def pack(kind: int, call: int, payload: bytes | memoryview) -> bytes:
    assert len(payload) <= MAX_FRAME_BYTES, "split it first"
    return b"".join((_HEADER.pack(kind, call, len(payload)), payload))


async def read(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    """The next (kind, call, payload). Raises BadMessage on an unknown kind or a length over the limit, before it
    reads or allocates a byte of the payload; asyncio.IncompleteReadError at the end of the stream."""
    kind, call, length = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    if kind not in _KINDS:
        raise BadMessage(f"unknown kind of frame {kind}")
    limit = MAX_FRAME_BYTES if kind in (REQUEST_BODY, ANSWER_BODY) else MAX_HEAD_BYTES
    if length > limit:
        raise BadMessage(f"a frame of {length} bytes", why=f"the limit is {limit}")
    return kind, call, await reader.readexactly(length)


_ARRIVED = struct.Struct("!Qdd")


def pack_arrived(total: int, *, at: float, share: float) -> bytes:
    """`at`: seconds of our own clock, whose zero is anywhere; `share`: bytes a second, 0: not known."""
    return pack(ARRIVED, 0, _ARRIVED.pack(total, at, share))


def parse_arrived(payload: bytes) -> tuple[int, float, float]:
    """(bytes that have arrived, when by the other side's clock, its share of the line in bytes a second). Raises
    BadMessage."""
    if len(payload) != _ARRIVED.size:
        raise BadMessage("a number of arrived bytes that is none")
    total, at, share = _ARRIVED.unpack(payload)
    if not math.isfinite(at):
        raise BadMessage("bytes that arrived at no time")
    if not 0 <= share < math.inf:  # false for NaN too
        raise BadMessage("an impossible share of a line")
    return int(total), float(at), float(share)


def pack_head(head: dict[str, Any]) -> bytes:
    data = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
    assert len(data) <= MAX_HEAD_BYTES, f"a head of {len(data)} bytes: put it in the body"
    return data


def parse_head(data: bytes) -> dict[str, Any]:
    """A dictionary from a stranger's bytes: UTF-8 JSON, finite numbers, no key twice, at most 8 levels deep.

    Raises BadMessage.
    """
    if _depth(data) > MAX_HEAD_DEPTH:
        raise BadMessage("a head is nested too deeply")
    try:
        head = json.loads(
            data.decode(), parse_constant=_finite, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
        if b"\\u" in data:
            json.dumps(head, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise BadMessage("a head is not JSON", why=str(error)[:100]) from None
    if not isinstance(head, dict):
        raise BadMessage("a head is not a dictionary")
    return head


_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
"""the last quote is optional so that a string without an end takes linear time"""


def _depth(data: bytes) -> int:
    """The nesting, without recursion. Brackets in strings do not count: a closing one would hide an opening one."""
    deepest = depth = 0
    for bracket in _STRINGS.sub(b"", data).translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _finite(text: str) -> float:
    number = float(text)  # NaN and Infinity come here too, and 1e999 is infinite
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not allowed")
    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may take different ones of two equal keys; what one checked, the other does not use."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key appears twice")
    return unique
