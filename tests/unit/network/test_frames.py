"""Frames and heads: what fits comes back the same, what does not is refused before it costs anything."""

import asyncio
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import BadMessage
from swarm.network import frames

patient = settings(deadline=None)
KINDS = range(frames.REQUEST, frames.CANCEL + 1)


def read(data, *, end=True):
    async def go():
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        if end:
            reader.feed_eof()
        return await asyncio.wait_for(frames.read(reader), 5)

    return asyncio.run(go())


def header(kind, call, length):
    return struct.pack("!BII", kind, call, length)


# --- frames


@patient
@given(st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.binary(max_size=2000))
def test_a_frame_comes_back_the_same(kind, call, payload):
    data = frames.pack(kind, call, payload)
    assert len(data) == frames.HEADER_BYTES + len(payload)
    assert read(data) == (kind, call, payload)


def test_the_largest_body_passes_and_one_more_byte_does_not():
    payload = bytes(frames.MAX_FRAME_BYTES)
    assert read(frames.pack(frames.ANSWER_BODY, 1, payload)) == (frames.ANSWER_BODY, 1, payload)
    with pytest.raises(AssertionError, match="split it"):
        frames.pack(frames.ANSWER_BODY, 1, payload + b"x")


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_over_the_limit_is_refused_before_a_byte_of_it_is_read(kind):
    limit = frames.MAX_FRAME_BYTES if kind in (frames.REQUEST_BODY, frames.ANSWER_BODY) else frames.MAX_HEAD_BYTES
    for length in (limit + 1, 2**32 - 1):
        with pytest.raises(BadMessage, match=f"{length} bytes"):
            read(header(kind, 1, length), end=False)  # nothing follows, and nothing is waited for


@pytest.mark.parametrize("kind", [0, 8, 255])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(BadMessage, match="unknown kind"):
        read(header(kind, 1, 10), end=False)


@pytest.mark.parametrize("data", [b"", b"\1", header(1, 2, 3), header(1, 2, 3) + b"ab"])
def test_a_stream_that_ends_within_a_frame_is_an_end(data):
    with pytest.raises(asyncio.IncompleteReadError):
        read(data)


@patient
@given(st.binary(max_size=64))
def test_no_bytes_make_it_stumble(data):
    try:
        kind, _, payload = read(data)
    except (BadMessage, asyncio.IncompleteReadError):
        return
    assert kind in KINDS and len(payload) <= len(data)


# --- heads


numbers = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
heads = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.text() | numbers,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


@patient
@given(heads)
def test_a_head_comes_back_the_same(head):
    data = frames.pack_head(head)
    if nesting(head) <= frames.MAX_HEAD_DEPTH:
        assert frames.parse_head(data) == head
    else:
        with pytest.raises(BadMessage, match="too deeply"):
            frames.parse_head(data)


def nesting(value):
    if isinstance(value, (dict, list)):
        return 1 + max(map(nesting, value.values() if isinstance(value, dict) else value), default=0)
    return 0


@patient
@given(heads)
def test_the_nesting_is_measured_right_whatever_the_strings_hold(head):
    assert frames._depth(frames.pack_head(head)) == nesting(head)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"7", b"null", b'"x"', b"{}x", b"\xff\xfe", b'{"a":NaN}', b'{"a":Infinity}',
        b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":[-1e999]}', b'{"a":1,"a":2}', b'{"b":{"a":1,"a":1}}',
        b'{"a":"\\ud800"}', b'{"\\udfff":1}', b'{"a":"\xed\xa0\x80"}', '{"a":1}'.encode("utf-16"),
        b'{"a":' + b"9" * 5000 + b"e9999}", b"{'a':1}", b'{"a":1,}',
    ],
)  # fmt: skip
def test_what_is_no_head_is_refused(data):
    with pytest.raises(BadMessage):
        frames.parse_head(data)


def test_text_outside_ascii_and_whole_surrogate_pairs_pass():
    assert frames.parse_head(b'{"a":"\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}
    assert frames.parse_head('{"a":"\u00e9"}'.encode()) == {"a": "\u00e9"}


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b'{"a":' + b"[" * 8 + b"]" * 8 + b"}",
        b'{"a":"' + b"]" * 30_000 + b'","b":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"a":"\\"' + b"]" * 50 + b'","b":' + b"[" * 50 + b"]" * 50 + b"}",
    ],
    ids=["lists", "dictionaries", "just too deep", "hidden by a string", "hidden by a quote in a string"],
)
def test_a_nesting_bomb_is_refused(bomb):
    with pytest.raises(BadMessage, match="too deeply"):
        frames.parse_head(bomb)


@pytest.mark.parametrize("text", [b'"', b'\\"', b'"\\', b'\\', b'"a'])
def test_quotes_without_end_take_linear_time(text):
    with pytest.raises(BadMessage):
        frames.parse_head(text * (frames.MAX_HEAD_BYTES // len(text)))  # quadratic would take minutes


def test_brackets_in_strings_do_not_count():
    head = {"a": "[" * 1000, "b": '"[[[[[[[[[[[[[', "c": "\\"}
    assert frames.parse_head(json.dumps(head).encode()) == head


@patient
@given(st.binary(max_size=100))
def test_no_bytes_make_a_head_stumble(data):
    try:
        assert isinstance(frames.parse_head(data), dict)
    except BadMessage as error:
        assert len(str(error)) < 300


def test_we_never_send_what_others_would_refuse():
    with pytest.raises(ValueError):
        frames.pack_head({"a": float("nan")})
    with pytest.raises(AssertionError, match="put it in the body"):
        frames.pack_head({"a": "x" * frames.MAX_HEAD_BYTES})


def test_what_has_arrived_and_when():
    sent = frames.pack_arrived(2**40, at=-1.5, share=6e6)
    assert frames.parse_arrived(sent[frames.HEADER_BYTES:]) == (2**40, -1.5, 6e6)


@pytest.mark.parametrize("payload", [
    b"", bytes(8), bytes(16), bytes(25), *(
        struct.pack("!Qdd", 1, at, share) for at, share in (
            (float("nan"), 1.0), (float("inf"), 1.0), (0.0, float("nan")), (0.0, float("inf")), (0.0, -1.0),
        )
    ),
])
def test_bytes_that_arrived_at_no_time_and_shares_of_no_line_are_refused(payload):
    with pytest.raises(BadMessage):
        frames.parse_arrived(payload)
