"""Small programs that the lab's tests run on its hosts, and how they are started and read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from wanlab import machine, namespaces
from wanlab.lab import Lab
from wanlab.requirements import missing
from wanlab.topology import Topology, load, parse

__all__ = ["Lab", "Topology", "load", "machine", "namespaces", "parse"]  # from here, where the path to them is known

LACKING = missing() + [program for program in ("iperf3", "ping") if shutil.which(program) is None]
needs_a_lab = [
    pytest.mark.lab, pytest.mark.skipif(bool(LACKING), reason=f"no WAN lab here: it lacks {', '.join(LACKING)}"),
]
NAME = f"t{os.getpid()}"
MSS_OF_MTU = 1448 / 1500
"""rates count IP bytes; this much of a full packet is what TCP carries"""

COUNT_DATAGRAMS = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE: what this process loses must not count as lost
s.bind(("", 5000)); s.settimeout(20); print("ready", flush=True)
n = 0
try:
    while True:
        s.recv(100); n += 1; s.settimeout(1.5)
except socket.timeout:
    print(n)
"""
SEND_DATAGRAMS = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((sys.argv[1], 5000))
began = time.monotonic()
for n in range(int(sys.argv[2])):
    if n % 200 == 0:
        time.sleep(max(0, began + n / 20e3 - time.monotonic()))
    s.send(b"x" * 32)
"""
SERVE = """
import socket, sys
s = socket.create_server(("", int(sys.argv[1]))); print("ready", flush=True)
while True:
    c, address = s.accept(); c.sendall(address[0].encode()); kept = c
"""
CALL = """
import socket, sys
try:
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)
    s.settimeout(2.5); print(s.recv(100).decode(), flush=True)
    print("data" if s.recv(100) else "closed")
except socket.timeout:
    print("silence")
except ConnectionResetError:
    print("closed")
"""
SWALLOW = """
import socket
s = socket.create_server(("", 5002)); print("ready", flush=True)
c, _ = s.accept(); n = 0
while data := c.recv(1 << 16): n += len(data)
print(n)
"""
POUR = """
import socket, sys
s = socket.create_connection((sys.argv[1], 5002)); s.sendall(bytes(int(sys.argv[2])))
"""
ECHO_PORT = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("", 5003)); print("ready", flush=True)
while True:
    data, address = s.recvfrom(100); s.sendto(str(address[1]).encode(), address)
"""
ASK_PORTS = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("", 6000)); s.settimeout(3)
for address in sys.argv[1:]:
    s.sendto(b"?", (address, 5003)); print(s.recv(100).decode())
"""


def program(lab: Lab, host: str, code: str, *arguments: object) -> list[str]:
    return lab.command(host, [sys.executable, "-I", "-c", code, *map(str, arguments)])


@contextlib.contextmanager
def running(command: list[str], *, ready: bool = True) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if ready:
            assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def pings(lab: Lab, host: str, address: str, count: int = 3) -> list[float]:
    """Round-trip times in seconds of those that came back."""
    command = ["ping", "-n", "-c", str(count), "-i", "0.1", "-W", "1", address]
    words = output(lab.command(host, command)).split()
    return [float(word.removeprefix("time=")) / 1e3 for word in words if word.startswith("time=")]


@contextlib.contextmanager
def iperf_server(lab: Lab, host: str) -> Iterator[None]:
    with running(lab.command(host, ["iperf3", "-s", "--forceflush"]), ready=False) as process:
        assert process.stdout is not None
        while "listening" not in process.stdout.readline():
            assert process.poll() is None
        yield


def rates(iperf_json: str) -> list[float]:
    """Bits a second of TCP payload that came in, of each interval of an `iperf3 -R -J`."""
    return [interval["sum"]["bits_per_second"] for interval in json.loads(iperf_json)["intervals"]]


def tcp_rate(lab: Lab, sender: str, receiver: str) -> float:
    """In steady state: the median of half-seconds, without the first one."""
    with iperf_server(lab, sender):
        command = ["iperf3", "-c", lab.ip(sender), "-R", "-J", "-t", "3.5", "-i", "0.5"]
        return statistics.median(rates(output(lab.command(receiver, command)))[1:])


def same(what: str, asked: float, measured: float) -> None:
    """Within 5 %; and said, so that `pytest -rP` shows how well."""
    print(f"{what}: asked {asked:g}, measured {measured:g} ({100 * (measured / asked - 1):+.2f} %)")
    assert measured == pytest.approx(asked, rel=0.05)
