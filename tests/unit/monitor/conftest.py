"""Events as a peer emits them, for the tests of what shows them."""

import types

import pytest

from swarm.events import Check, Left, Progress, Ready, Round, Warning

JOIN = "python -m swarm.peer --initial-peers /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW" + "x" * 200


def check(name="device", text="CPU, 2 threads (no CUDA device)", seconds=0.42):
    return Check(name=name, text=text, seconds=seconds)


def ready(join=JOIN):
    return Ready(run_id="demo-0123456789ab", peer_id="12D3", maddrs=["/ip4/203.0.113.7/tcp/31337"], join=join)


def progress(loss=3.4123, tokens=300_000, versions=(118, 117)):
    return Progress(
        tokens=tokens, swarm_tokens=1_200_000, loss=loss, tokens_per_s=8_123.4, peers=14, versions=list(versions),
        bytes_sent=1_234_567, bytes_received=1_100_000,
    )  # fmt: skip


def committed(version=3, fragment=0):
    return Round(
        fragment=fragment, version=version, digest="abcdef0123456789" * 4, contributors=3, tokens=20_000,
        bytes_sent=250_000, bytes_received=260_000, seconds=1.25,
    )  # fmt: skip


def warning(text="peer amber-heron is gone"):
    return Warning(text=text)


def left(reason="finished"):
    return Left(reason=reason)


LINE = "round 118  loss 3.412  tokens 1.2M (mine 300k)  8.1k tok/s  peers 14  up 1.2 MB  down 1.1 MB"
EVIL = "\x1b[2J\x1b]0;owned\x07[red]name[/red]\r\nround 999  loss 0.000"
EVIL_SHOWN = "?[2J?]0;owned?[red]name[/red] round 999  loss 0.000"


@pytest.fixture
def run():
    """All of the above: one test file cannot import another, a fixture travels."""
    makers = {make.__name__: make for make in (check, ready, progress, committed, warning, left)}
    return types.SimpleNamespace(**makers, JOIN=JOIN, LINE=LINE, EVIL=EVIL, EVIL_SHOWN=EVIL_SHOWN)
