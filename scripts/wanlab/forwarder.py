"""Starts the forwarder (forwarder.c) of one lab, talks to it, ends it."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from swarm.errors import SwarmError
from wanlab import machine, processes
from wanlab.topology import Topology

ANSWER_S = 10.0
MAX_LINES = 500
"""a message: more might not fit into a datagram"""
MIN_QUEUE_BYTES = 30_000
"""twenty packets: a slow link with less would drop every burst"""


def start(folder: Path) -> None:
    """It goes to the background by itself, when its socket is there."""
    with machine.locked():
        program = machine.compiled_forwarder()
    log = folder / "log"
    with log.open("w") as output:
        command = [str(program), str(_socket(folder))]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/")
    if result.returncode:
        raise SwarmError("the lab's forwarder did not start", why=log.read_text().strip())


def is_running(folder: Path) -> bool:
    return any(processes.with_command(command) for command in _commands(folder))


def stop(folder: Path) -> None:
    for command in _commands(folder):
        processes.end_with_command(command)


def tell(folder: Path, lines: list[str]) -> str:
    """Send commands; the answer, without its last line "ok"."""
    answers = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(ANSWER_S)
        channel.bind("")  # an unnamed address to answer to
        for start in range(0, len(lines), MAX_LINES):
            try:
                channel.connect(str(_socket(folder)))
                channel.send("\n".join(lines[start:start + MAX_LINES]).encode())
                answer = channel.recv(1 << 16).decode()
            except OSError as error:
                do = f"take the lab down and up again; {folder / 'log'} may say more"
                raise SwarmError(f"the forwarder of lab {folder.name!r} is gone", why=str(error), do=do) from error
            if not answer.endswith("ok\n"):
                raise SwarmError("the lab's forwarder refuses a command", why=answer.strip())
            answers.append(answer.removesuffix("ok\n"))
    return "".join(answers)


def link_line(topology: Topology, name: str) -> str:
    host = topology.host(name)
    rates = host.up_bits_per_s, host.down_bits_per_s
    queues = [_queue_bytes(rate, host.queue_s) for rate in rates]
    return f"link {name} {rates[0]:.0f} {rates[1]:.0f} {queues[0]} {queues[1]}"


def path_line(topology: Topology, a: str, b: str) -> str:
    """One direction. The path's own queue is as long, in seconds, as the sender's uplink's."""
    latency_ns, jitter_ns = topology.latency_s(a, b) * 1e9, topology.jitter_s(a, b) * 1e9
    rate = topology.pair(a, b).bits_per_s
    queue = _queue_bytes(rate, topology.host(a).queue_s)
    return f"path {a} {b} {latency_ns:.0f} {jitter_ns:.0f} {topology.loss(a, b):.9f} {rate:.0f} {queue}"


def _queue_bytes(bits_per_s: float, queue_s: float) -> int:
    return max(MIN_QUEUE_BYTES, round(bits_per_s / 8 * queue_s))


def _socket(folder: Path) -> Path:
    return folder / "control"


def _commands(folder: Path) -> list[list[str]]:
    """The source may have changed while the lab was up: whichever compiled forwarder has this lab's socket."""
    return [[str(program), str(_socket(folder))] for program in machine.RUN.glob(".forwarder-*")]
