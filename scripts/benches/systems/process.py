"""What the peers of all systems have in common: flags, the JSON lines they print, how they are asked to end.

    {"event": "ready"}                                                        once, when training begins
    {"event": "progress", "tokens": T, "swarm_tokens": S, "time": unix s}     a few a second
    {"event": "left", "reason": "..."}                                        the last line

tokens: trained by this peer since it started. swarm_tokens: tokens of the whole swarm in finished, successful
averagings, as this peer knows. A peer that waits for others goes on printing: the numbers stand still, which is what
a benchmark wants to see.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

INTERVAL_S = 0.3
START_S = 120.0
GATHER_S = 30.0


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--run", type=Path, required=True, metavar="FILE", help="run config")
    made.add_argument("--number", type=int, required=True, metavar="N", help="which peer this is, from 0")
    made.add_argument("--ips", nargs="+", required=True, metavar="IP", help="addresses of all peers' hosts")
    made.add_argument("--folder", type=Path, required=True, metavar="DIR", help="of this swarm, shared by its peers")
    made.add_argument("--weights", type=Path, required=True, metavar="FILE", help="where the final weights go")
    made.add_argument("--until-tokens", type=int, metavar="N", help="end once the swarm has trained N (the run's)")
    return made


class Lines:
    """Prints from a thread of its own; the training loop only sets the two numbers."""

    def __init__(self) -> None:
        self.tokens = 0
        self.swarm_tokens = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="lines", daemon=True)

    def ready(self) -> None:
        _print({"event": "ready"})
        self._thread.start()

    def left(self, reason: str) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._progress()
        _print({"event": "left", "reason": reason})

    def _tell(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._progress()

    def _progress(self) -> None:
        _print({
            "event": "progress", "tokens": self.tokens, "swarm_tokens": self.swarm_tokens,
            "time": round(time.time(), 3),
        })


class Stop:
    """Set by SIGTERM or Ctrl+C: finish the step at hand and leave."""

    def __init__(self) -> None:
        self.asked = False
        self.listen()

    def listen(self) -> None:
        """Again, where a library has taken the signals over."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def interface_of(ip: str) -> str:
    """Name of the network interface with that address: what gloo wants to be told in GLOO_SOCKET_IFNAME."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.family == socket.AF_INET and address.address == ip for address in addresses):
            return str(name)
    raise SystemExit(f"no network interface of this host has the address {ip}")


def publish(file: Path, text: str) -> None:
    """From the first peer to the others: a laboratory's hosts share their disk, and a swarm's folder is its own."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def published(file: Path) -> str:
    """What the first peer has published there, or will in a moment."""
    deadline = time.monotonic() + START_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"peer 0 has not written {file} within {START_S:.0f} s")
        time.sleep(0.1)
    return file.read_text()


def gather(folder: Path, number: int, num_peers: int) -> None:
    """Wait until all have come this far. Not for ever: a peer may be dead, or meant to come later."""
    (folder / f"here-{number}").touch()
    deadline = time.monotonic() + GATHER_S
    while time.monotonic() < deadline and not all((folder / f"here-{other}").exists() for other in range(num_peers)):
        time.sleep(0.1)


def within(seconds: float, action: Callable[[], object]) -> bool:
    """Run `action`; False when it is not done in time, or failed. It is left to itself then."""
    done = threading.Event()

    def attempt() -> None:
        with contextlib.suppress(Exception):
            action()
            done.set()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()


def exit_now() -> None:
    """End without waiting for the threads that a library may have left waiting."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _print(line: dict[str, object]) -> None:
    try:
        print(json.dumps(line), flush=True)
    except BrokenPipeError:  # whoever read the lines has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGTERM)
