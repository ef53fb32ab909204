"""Addresses: what is one, how far it reaches, and the line for a friend."""

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import ConfigError
from swarm.network.keys import Keypair
from swarm.network.maddr import host_and_port, join_command, peer_id_of, ranked, reach, without_peer_id

ID, RELAY = Keypair(b"\1" * 32).peer_id, Keypair(b"\2" * 32).peer_id
PUBLIC = f"/ip4/8.8.8.8/tcp/31337/p2p/{ID}"
HOME = f"/ip4/192.168.1.7/tcp/31337/p2p/{ID}"
HERE = f"/ip4/127.0.0.1/tcp/31337/p2p/{ID}"
DOCKER = f"/ip4/172.17.0.1/tcp/31337/p2p/{ID}"


@pytest.mark.parametrize(
    "maddr",
    [
        PUBLIC, HERE, f"/ip6/::1/tcp/1/p2p/{ID}", f"/dns4/example.org/tcp/443/p2p/{ID}",
        f"/ip4/1.2.3.4/udp/1/quic/p2p/{ID}", f"/ip4/8.8.8.8/tcp/1/p2p/{RELAY}/p2p-circuit/p2p/{ID}",
    ],
)  # fmt: skip
def test_a_whole_address_names_the_peer_at_its_end(maddr):
    assert peer_id_of(maddr) == ID


@pytest.mark.parametrize(
    "maddr",
    [
        "", "x", "localhost:31337", "/ip4/127.0.0.1", "/ip4/127.0.0.1/tcp/31337", f"/ip4/300.0.0.1/tcp/1/p2p/{ID}",
        f"/ip4/127.0.0.1/tcp/70000/p2p/{ID}", f"/ip4/127.0.0.1/tcp/x/p2p/{ID}", f"/ip4/127.0.0.1/tcp/1/p2p/{ID[:-1]}",
        f"/ip4/127.0.0.1/tcp/1/p2p/{ID}x", "/ip4/127.0.0.1/tcp/1/p2p/", f"/nonsense/1/p2p/{ID}", ID, f"{PUBLIC}/",
        f" {PUBLIC}", f"{PUBLIC}\n", f"/ip4/127.0.0.1/tcp/1/p2p/{'2' * 100_000}", "/p2p-circuit" * 1000,
        f"/ip4/127.0.0.1/tcp/1/p2p/{ID}/p2p-circuit",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_an_example(maddr):
    with pytest.raises(ConfigError, match="is not the address of a peer") as caught:
        peer_id_of(maddr)
    assert "/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW" in caught.value.do
    assert caught.value.why
    assert len(str(caught.value)) < 2000


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_makes_it_stumble(text):
    with pytest.raises(ConfigError):
        peer_id_of(text)
    without_peer_id(text, ID)
    without_peer_id("/" + text, ID)
    assert 0 <= reach(text) <= 3
    host_and_port(text)


@pytest.mark.parametrize(
    ("maddr", "expected"),
    [
        (PUBLIC, ("8.8.8.8", 31337)),
        ("/ip6/::1/tcp/1", ("::1", 1)),
        ("/ip4/1.2.3.4/udp/5/quic", None),
        ("/dns4/example.org/tcp/443", None),
        ("/ip4/1.2.3.4/tcp/\u00b2", None),
        ("/ip4/1.2.3.4/tcp/", None),
        (f"/ip4/8.8.8.8/tcp/1/p2p/{RELAY}/p2p-circuit/p2p/{ID}", None),
        ("", None),
    ],
)
def test_host_and_port(maddr, expected):
    assert host_and_port(maddr) == expected


@pytest.mark.parametrize(
    ("maddr", "distance"),
    [
        (PUBLIC, 3), ("/dns4/example.org/tcp/443", 3), ("/ip6/2001:4860:4860::8888/tcp/1", 3),
        (HOME, 2), ("/ip4/10.0.0.1/tcp/1", 2), ("/ip4/100.64.0.1/tcp/1", 2), ("/ip6/fd00::1/tcp/1", 2),
        (DOCKER, 1), ("/ip4/169.254.1.1/tcp/1", 1), ("/ip6/fe80::1/tcp/1", 1), ("/ip4/x/tcp/1", 1), ("nonsense", 1),
        (HERE, 0), ("/ip6/::1/tcp/1", 0), ("/ip4/0.0.0.0/tcp/1", 0),
    ],
)  # fmt: skip
def test_how_far_an_address_reaches(maddr, distance):
    assert reach(maddr) == distance


def test_the_farthest_comes_first_and_order_is_kept():
    other = PUBLIC.replace("8.8.8.8", "9.9.9.9")
    assert ranked([HERE, DOCKER, PUBLIC, HOME, other]) == [PUBLIC, other, HOME, DOCKER, HERE]


def test_the_join_command_has_the_two_farthest_classes():
    words = shlex.split(join_command([HERE, DOCKER, HOME, PUBLIC, PUBLIC.replace("8.8.8.8", "9.9.9.9")]))
    assert words == ["python", "-m", "swarm.peer", "--initial-peers", PUBLIC, HOME]
    assert shlex.split(join_command([HERE], run_id="demo-0123"))[-3:] == [HERE, "--run-id", "demo-0123"]


def test_nothing_in_an_address_can_become_another_command():
    words = shlex.split(join_command(["/ip4/1.2.3.4/tcp/1;rm -rf ~/p2p/x"]))
    assert words[-1] == "/ip4/1.2.3.4/tcp/1;rm -rf ~/p2p/x"


@pytest.mark.parametrize(
    ("maddr", "dialled"),
    [
        (PUBLIC, "/ip4/8.8.8.8/tcp/31337"),
        ("/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/tcp/1"),
        (f"/ip4/8.8.8.8/tcp/1/p2p/{RELAY}/p2p-circuit/p2p/{ID}", f"/ip4/8.8.8.8/tcp/1/p2p/{RELAY}/p2p-circuit"),
        (f"/ip4/8.8.8.8/tcp/1/p2p/{RELAY}", None),
        ("nonsense", None),
        ("/ip4/999.8.8.8/tcp/1", None),
        ("/ip4/8.8.8.8/tcp/1" + "/tcp/1" * 200, None),
    ],
)
def test_what_is_dialled_for_a_peer(maddr, dialled):
    found = without_peer_id(maddr, ID)
    assert (found if found is None else str(found)) == dialled
