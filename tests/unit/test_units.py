"""Quantities: what is read back is what was meant, and what is written never looks odd at a boundary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.units import (
    format_bytes,
    format_count,
    format_seconds,
    maddr_problem,
    parse_bytes,
    parse_count,
    printable,
)

patient = settings(deadline=None)  # a busy machine is no failure


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0), ("100", 100), ("100B", 100), ("6GB", 6 * 10**9), ("6gb", 6 * 10**9), (" 1.5 MB ", 1_500_000),
        ("512 MiB", 512 * 2**20), ("2TiB", 2 * 2**40), ("1_000kB", 10**6), ("1e3", 1000),
    ],
)  # fmt: skip
def test_sizes_are_read(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "6 parsecs", "six", "-5MB", "1.2.3", "0x10", "nan", "1e999", "1\n2"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="6GB or 512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "count"), [("12", 12), ("20M", 20_000_000), ("1.5k", 1500), ("2B", 2 * 10**9), ("-3", -3), ("-1k", -1000)]
)
def test_counts_are_read(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "-", "--1", "many", "1 MB", "3x"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError, match="20M"):
        parse_count(text)


def test_large_whole_counts_stay_exact():
    assert parse_count(str(2**63 - 1)) == 2**63 - 1


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.2 MB"), (12_345_678, "12.3 MB"),
        (123_456_789, "123 MB"), (999_949, "1 MB"), (999_499, "999 kB"), (12.7e12, "12.7 TB"), (5e18, "5000 PB"),
        (-1500, "-1.5 kB"), (0.2, "0 B"), (-0.2, "0 B"), (float("nan"), "?"), (float("inf"), "?"),
    ],
)  # fmt: skip
def test_sizes_are_written(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(14, "14"), (8_100, "8.1k"), (300_000, "300k"), (1_200_000, "1.2M"), (999_999, "1M"), (3.53e9, "3.5B"), (0, "0")],
)
def test_counts_are_written(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"), (4.4, "0:04"), (59.6, "1:00"), (70, "1:10"), (3599.7, "1:00:00"), (3670, "1:01:10"),
        (90_000, "25:00:00"), (-70, "-1:10"), (-0.2, "0:00"), (float("inf"), "?"), (float("nan"), "?"),
    ],
)  # fmt: skip
def test_durations_are_written(seconds, text):
    assert format_seconds(seconds) == text


@patient
@given(st.integers(0, 10**15))
def test_a_written_count_is_within_half_a_digit_of_the_count(count):
    assert abs(parse_count(format_count(count)) - count) <= max(0.5, count * 0.05)


@patient
@given(st.integers(0, 10**15))
def test_a_written_size_is_short_and_never_reaches_the_next_unit(num_bytes):
    number = format_bytes(num_bytes).split()[0]
    assert len(number) <= 4
    assert float(number) < 1000


@patient
@given(st.text())
def test_nothing_written_by_a_stranger_steers_the_terminal(text):
    shown = printable(text)
    assert shown.isprintable()
    assert "\x1b" not in shown


def test_foreign_text_stays_readable_but_short():
    assert printable("amber-heron") == "amber-heron"
    assert printable("\x1b[2Jgone\x07") == "?[2Jgone?"
    assert printable("two\nlines\tand tabs") == "two lines and tabs"
    assert printable("\u202eevil") == "?evil"  # right-to-left override
    assert printable("x" * 600) == "x" * 497 + "..."
    assert printable("caf\u00e9") == "caf\u00e9"


ID = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


@pytest.mark.parametrize(
    "maddr",
    [
        f"/ip4/203.0.113.7/tcp/31337/p2p/{ID}",
        f"/ip6/2001:db8::1/tcp/1/p2p/{ID}",
        f"/dns4/peer.example.org/tcp/31337/p2p/{ID}",
        f"/dns/localhost/udp/65535/quic-v1/p2p/{ID}",
        f"/ip4/203.0.113.7/tcp/31337/p2p/{ID}/p2p-circuit/p2p/{ID}",
    ],
)
def test_good_addresses_pass(maddr):
    assert maddr_problem(maddr, needs_peer_id=True) == ""


@pytest.mark.parametrize(
    ("maddr", "problem"),
    [
        ("", "not of the form"),
        ("203.0.113.7:31337", "not of the form"),
        (f"/ip4/203.0.113.7/p2p/{ID}", "tcp or /udp"),
        (f"ip4/203.0.113.7/tcp/31337/p2p/{ID}", "not of the form"),
        (f"/ip4/203.0.113.7/tcp/31337/p2p/{ID}/", "not of the form"),
        (f"/ip4/203.0.113.777/tcp/31337/p2p/{ID}", "not an ip4 address"),
        (f"/ip6/203.0.113.7/tcp/31337/p2p/{ID}", "not an ip6 address"),
        (f"/ip5/203.0.113.7/tcp/31337/p2p/{ID}", "must begin with"),
        (f"/dns4/a b/tcp/31337/p2p/{ID}", "must begin with"),
        (f"/ip4/203.0.113.7/sctp/31337/p2p/{ID}", "tcp or /udp"),
        (f"/ip4/203.0.113.7/tcp/65536/p2p/{ID}", "65535"),
        (f"/ip4/203.0.113.7/tcp/0/p2p/{ID}", "1 to 65535"),
        (f"/ip4/203.0.113.7/tcp/-1/p2p/{ID}", "65535"),
        ("/ip4/203.0.113.7/tcp/31337", "must end with /p2p/"),
        ("/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...", "must end with /p2p/"),
        (f"/ip4/203.0.113.7/tcp/31337/p2p/{ID[:-1]}0", "must end with /p2p/"),
        ("/ip4/1.2.3.4/tcp/1" + "/x" * 300, "not of the form"),
    ],
)
def test_bad_addresses_say_what_is_bad(maddr, problem):
    assert problem in maddr_problem(maddr, needs_peer_id=True)


def test_an_address_to_listen_on_needs_no_peer_id_and_may_leave_the_port_open():
    assert maddr_problem("/ip4/0.0.0.0/tcp/0", needs_peer_id=False) == ""
    assert maddr_problem("/ip6/::/udp/31337/quic-v1", needs_peer_id=False) == ""


@patient
@given(st.text(max_size=40))
def test_no_text_makes_the_address_check_stumble(text):
    assert isinstance(maddr_problem(f"/ip4/{text}", needs_peer_id=True), str)
