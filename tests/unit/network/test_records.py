"""Sealed records and strict schemas: what a stranger sends fits exactly, or is nothing."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import BadMessage
from swarm.network import records
from swarm.network.directory import Beat, Contact
from swarm.network.keys import Keypair
from swarm.network.records import Head, Status, parse, seal, unseal

ME, OTHER = Keypair(b"\1" * 32), Keypair(b"\2" * 32)
KEY, NOW = b"k" * 20, 1_000_000.0
SOON = NOW + 60
patient = settings(deadline=None)
SMALLEST = {"run_id": "demo-0123456789ab", "name": "amber-heron", "role": "trainer"}


def opened(value, *, peer_id=ME.peer_id, key=KEY, expires=SOON, now=NOW):
    return unseal(peer_id, key, value, expires=expires, now=now)


# --- seals


@patient
@given(st.text(max_size=300))
def test_what_was_sealed_opens(payload):
    assert opened(seal(ME, KEY, payload, expires=SOON)) == payload


def test_a_seal_holds_for_its_signer_its_key_and_its_expiry_only():
    value = seal(ME, KEY, "text", expires=SOON)
    assert opened(value) == "text"
    assert opened(value, peer_id=OTHER.peer_id) is None
    assert opened(value, key=b"x" * 20) is None
    assert opened(value, expires=SOON + 1) is None
    assert opened(value.replace(b"text", b"tex7")) is None


@pytest.mark.parametrize(
    "expires",
    [NOW, NOW - 1, 0.0, -1.0, NOW + 10_000, math.nan, math.inf, -math.inf, 1e308],
)
def test_an_expiry_that_is_past_or_far_or_no_number_is_refused(expires):
    assert opened(seal(ME, KEY, "text", expires=expires), expires=expires) is None


@pytest.mark.parametrize("expires", [1_000_060, True, None, "1000060.0", b"x", [], 10**400])
def test_an_expiry_of_another_type_is_refused(expires):
    assert opened(seal(ME, KEY, "text", expires=SOON), expires=expires) is None


@pytest.mark.parametrize(
    "value",
    [
        b"", b"{}", b"[]", b"7", b'"x"', b"\xff", b"null", b'{"payload":"x"}', b'{"payload":"x","sig":"zz"}',
        b'{"payload":"x","sig":7}', b'{"payload":7,"sig":""}', b'{"payload":null,"sig":"00"}',
        b'{"payload":"\\ud800","sig":"00"}', b"[" * 9000, b'{"payload":"' + b"x" * 10_000 + b'","sig":""}',
        b'{"payload":"x","payload":"y","sig":"00"}', b'{"payload":["x"],"sig":"00"}',
    ],
)  # fmt: skip
def test_what_is_no_record_opens_to_nothing(value):
    assert opened(value) is None


@patient
@given(st.binary(max_size=100))
def test_no_bytes_make_it_stumble(value):
    assert opened(value) is None


def test_a_record_over_the_limit_is_not_even_made():
    with pytest.raises(ValueError, match="limit is 9500"):
        seal(ME, KEY, "x" * 9_500, expires=SOON)


def test_two_keys_in_a_record_cannot_say_two_things():
    """One reader may take the first of two equal keys, another the last."""
    genuine = json.loads(seal(ME, KEY, "good", expires=SOON))
    twice = f'{{"payload":"evil","payload":"good","sig":"{genuine["sig"]}"}}'
    assert opened(twice.encode()) is None


# --- schemas


def test_the_smallest_status_fits_and_travels_without_its_defaults():
    status = parse(Status, SMALLEST)
    assert status.model_dump(exclude_defaults=True) == SMALLEST
    assert parse(Status, json.loads(status.model_dump_json())) == status


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "demo"}, {"run_id": "demo-0123456789ab\n"}, {"run_id": "../x-0123456789ab"}, {"run_id": 7},
        {"name": "x" * 41}, {"name": 7}, {"name": "\ud800"}, {"role": "boss"}, {"role": "trainer\n"}, {"more": 1},
        {"maddrs": ["x"]}, {"maddrs": ["/x\n"]}, {"maddrs": ["/\x1b[2J"]}, {"maddrs": ["/" + "x" * 200]},
        {"maddrs": ["/ip4"] * 9}, {"maddrs": "/ip4"}, {"maddrs": [b"/ip4"]},
        {"tokens": -1}, {"tokens": 10**16}, {"tokens": 1.5}, {"tokens": "1"}, {"tokens": True}, {"tokens": 10**400},
        {"tokens_per_s": math.nan}, {"tokens_per_s": math.inf}, {"tokens_per_s": -1.0}, {"loss": math.nan},
        {"loss": "low"}, {"leaving": 1}, {"leaving": "no"}, {"pending": [-1]}, {"pending": [0] * 257},
        {"heads": [{"version": 0, "digest": "0" * 64, "tokens": 0}] * 257}, {"heads": [{}]}, {"heads": {}},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_a_status_is_refused_with_the_place(change):
    with pytest.raises(BadMessage, match="malformed Status") as caught:
        parse(Status, {**SMALLEST, **change})
    assert next(iter(change)) in caught.value.why
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n", None, 0])
def test_a_digest_is_64_hex_digits_and_nothing_more(digest):
    with pytest.raises(BadMessage, match="digest"):
        parse(Head, {"version": 1, "digest": digest, "tokens": 0})


@pytest.mark.parametrize("document", [None, 7, "x", [], b"{}"])
def test_what_is_no_dictionary_is_no_message(document):
    with pytest.raises(BadMessage):
        parse(Status, document)


@pytest.mark.parametrize(
    "peer_id", ["", "x" * 19, "x" * 81, ME.peer_id + "\n", "0" * 52, "\x1b" * 52, ME.peer_id[:-1] + "/"]
)
def test_a_peer_id_in_a_message_is_base58(peer_id):
    with pytest.raises(BadMessage, match="peer_id"):
        parse(Contact, {"peer_id": peer_id, "maddrs": []})
    assert parse(Contact, {"peer_id": ME.peer_id, "maddrs": []}).peer_id == ME.peer_id


def test_a_beat_carries_few_contacts():
    contact = {"peer_id": ME.peer_id, "maddrs": []}
    assert len(parse(Beat, {"status": SMALLEST, "contacts": [contact] * 8}).contacts) == 8
    with pytest.raises(BadMessage, match="contacts"):
        parse(Beat, {"status": SMALLEST, "contacts": [contact] * 9})


def test_messages_cannot_be_changed_once_checked():
    with pytest.raises(ValueError):
        parse(Status, SMALLEST).tokens = -1


def test_a_status_has_none_for_the_fragments_that_its_peer_does_not_hold():
    head = {"version": 3, "digest": "a" * 64, "tokens": 7}
    status = parse(Status, {**SMALLEST, "heads": [None, head, head, None], "pending": [0, 5, 0, 0]})
    assert set(status.held()) == {1, 2} and status.held()[1] == status.head(1) == parse(Head, head)
    assert [status.head(index) for index in (0, 3, 4, 10**6)] == [None] * 4
    again = parse(Status, json.loads(json.dumps(status.model_dump(exclude_defaults=True))))
    assert again == status and again.heads[0] is None, "as it travels"
    assert parse(Status, SMALLEST).held() == parse(Status, {**SMALLEST, "heads": [None] * 4}).held() == {}


@pytest.mark.parametrize("entry", [0, False, "", [], {}, "none"])
def test_nothing_but_none_stands_for_a_fragment_that_is_not_held(entry):
    with pytest.raises(BadMessage, match="malformed Status"):
        parse(Status, {**SMALLEST, "heads": [entry]})


def test_the_largest_status_fits_into_what_is_bounded():
    """Status of a peer that holds 256 fragments: told directly, in one head."""
    head = Head(version=2**40, digest="f" * 64, tokens=records.MAX_TOKENS)
    status = Status(
        **SMALLEST, heads=[head] * 256, pending=[records.MAX_TOKENS] * 256, maddrs=["/" + "x" * 199] * 8
    )
    assert len(Beat(status=status).model_dump_json()) < 60_000


def test_a_status_names_spare_copies_and_the_room_for_them():
    head = {"version": 3, "digest": "a" * 64, "tokens": 7}
    status = parse(Status, {**SMALLEST, "spares": [{"fragment": 2, "head": head}], "spare_room_bytes": 10**9})
    assert status.spare(2) == parse(Head, head) and status.spare(1) is None and status.held() == {}
    again = parse(Status, json.loads(json.dumps(status.model_dump(exclude_defaults=True))))
    assert again == status, "as it travels"
    assert parse(Status, SMALLEST).spares == [] and parse(Status, SMALLEST).spare_room_bytes == 0


@pytest.mark.parametrize("spare", [
    {"fragment": 256, "head": None}, {"fragment": -1}, {"fragment": 1}, {"head": {}}, None, 3,
    {"fragment": 1, "head": {"version": 1, "digest": "x", "tokens": 1}},
])
def test_a_spare_that_is_none_is_refused(spare):
    with pytest.raises(BadMessage, match="malformed Status"):
        parse(Status, {**SMALLEST, "spares": [spare]})
    with pytest.raises(BadMessage, match="malformed Status"):
        parse(Status, {**SMALLEST, "spare_room_bytes": -1})


def test_a_status_with_as_many_spares_as_fragments_that_it_does_not_hold_fits_into_what_is_bounded():
    head = Head(version=2**40, digest="f" * 64, tokens=records.MAX_TOKENS)
    half = records.MAX_SPARES
    status = Status(
        **SMALLEST, heads=[head] * (256 - half) + [None] * half, pending=[records.MAX_TOKENS] * 256,
        maddrs=["/" + "x" * 199] * 8, spares=[records.Spare(fragment=255, head=head)] * half,
        spare_room_bytes=2**50,
    )
    assert len(Beat(status=status).model_dump_json()) < 60_000
    with pytest.raises(BadMessage):
        parse(Status, {**SMALLEST, "spares": [{"fragment": 0, "head": head.model_dump()}] * (half + 1)})
