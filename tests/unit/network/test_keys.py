"""Identities: a peer id holds its key, so what it signed certifies itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.network import keys
from swarm.network.keys import Keypair, friendly_name, verify

ONE, OTHER = Keypair(b"\1" * 32), Keypair(b"\2" * 32)
patient = settings(deadline=None)


def test_the_peer_id_is_a_known_one_for_a_known_seed():
    """Changing this would give every peer another identity after an update."""
    assert ONE.peer_id.startswith("12D3KooW") and len(ONE.peer_id) == 52
    assert Keypair(b"\1" * 32).peer_id == ONE.peer_id != OTHER.peer_id


@patient
@given(st.binary(max_size=200))
def test_what_was_signed_verifies_and_nothing_else(message):
    signature = ONE.sign(message)
    assert verify(ONE.peer_id, message, signature)
    assert not verify(OTHER.peer_id, message, signature)
    assert not verify(ONE.peer_id, message + b"x", signature)
    assert not verify(ONE.peer_id, message, signature[:-1] + bytes([signature[-1] ^ 1]))


@patient
@given(st.text(max_size=100), st.binary(max_size=100), st.binary(max_size=100))
def test_no_garbage_makes_it_stumble(peer_id, message, signature):
    assert not verify(peer_id, message, signature)


@pytest.mark.parametrize(
    "peer_id",
    [
        "", "0OIl", "1" * 52, "12D3KooW", "Qm" + "a" * 44, "\ud800", ONE.peer_id[:-1], ONE.peer_id + "1",
        " " + ONE.peer_id, ONE.peer_id + "\n", "1" + ONE.peer_id, "2" * 1_000_000,
    ],
)  # fmt: skip
def test_a_peer_id_that_is_none_verifies_nothing(peer_id):
    assert not verify(peer_id, b"message", ONE.sign(b"message"))


@pytest.mark.parametrize("signature", [b"", b"\0" * 64, b"\0" * 10_000])
def test_a_signature_that_is_none_verifies_nothing(signature):
    assert not verify(ONE.peer_id, b"message", signature)


def test_the_key_file_is_the_protobuf_that_libp2p_reads():
    data = ONE.libp2p_bytes()
    assert data[:4] == bytes.fromhex("08011240")
    assert len(data) == 4 + 64
    assert data[4:36] == b"\1" * 32


def test_a_seed_of_another_length_is_our_bug():
    with pytest.raises(ValueError):
        Keypair(b"short")


def test_names_are_for_people_and_always_the_same():
    assert friendly_name(ONE.peer_id) == friendly_name(ONE.peer_id)
    first, second = friendly_name(ONE.peer_id).split("-")
    assert first.isalpha() and second.isalpha()
    assert len(set(keys._ADJECTIVES)) == len(set(keys._ANIMALS)) == 32
