"""libp2p's daemon (hivemind's p2pd): started by us with only what we need, and gone when we are gone.

`hivemind.P2P.create` would start it with a relay service and UPnP on, in the temporary folder, untied from our life
(DESIGN 9). We start it through `watchdog.py` and attach with `P2P.replicate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from hivemind.p2p import P2P
from hivemind.utils.multiaddr import Multiaddr

from swarm.errors import NetworkError
from swarm.network import watchdog
from swarm.network.keys import Keypair

START_TIMEOUT_S = 60.0
"""p2pd takes 0.1 s on an idle machine; hivemind's own limit of 15 s fails on slow and busy ones"""
SHUTDOWN_S = 2.0
MAX_SOCKET_PATH = 60
"""of the folder: a unix socket's path must be under 108 bytes; below it come 13 for our folder and 30 for the name"""


class Daemon:
    """One running p2pd and the hivemind `P2P` that talks to it."""

    def __init__(self, p2p: P2P, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.p2p, self._process, self._folder = p2p, process, folder

    @classmethod
    async def start(
        cls, keypair: Keypair, *, folder: Path, listen: list[str], announce: list[str], accept_incoming: bool = True
    ) -> Daemon:
        """Start p2pd with its sockets below `folder`. Raises NetworkError with p2pd's reason (port in use, ...)."""
        for maddr in listen if accept_incoming else []:
            _check_port_is_free(maddr)
        try:
            runtime = Path(tempfile.mkdtemp(prefix="p2p-", dir=folder if len(str(folder)) < MAX_SOCKET_PATH else None))
            key_file = runtime / "key"
            with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(keypair.libp2p_bytes())
        except OSError as error:
            raise NetworkError(f"cannot write to {folder}", why=str(error), do="choose another --home") from None
        arguments = {
            "listen": f"/unix{runtime}/control",
            "id": str(key_file),
            "dhtServer" if accept_incoming else "dhtClient": "1",
            "connManager": "1",
            "natPortMap": "0",  # never change a stranger's router
            "autonat": "1",
            "relay": "0",  # links never ride on relays, which cut them after 128 KiB; see introductions.py
            "relayService": "0",
            "idleTimeout": "0s",
            "tls": "1",
        }
        if accept_incoming:
            arguments["hostAddrs"] = ",".join(listen)
            if announce:
                arguments["announceAddrs"] = ",".join(announce)
        else:
            arguments["noListenAddrs"] = "1"
        program = str(files("hivemind.hivemind_cli") / "p2pd")
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", watchdog.__file__, str(runtime), program]
                + [f"-{name}={value}" for name, value in arguments.items()],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "GOLOG_LOG_LEVEL": "error"},
            )
        except OSError as error:
            shutil.rmtree(runtime, ignore_errors=True)
            raise NetworkError("cannot start libp2p's daemon", why=str(error)) from None
        try:
            p2p = await _attach(process, runtime, arguments["listen"], listen)
            key_file.unlink(missing_ok=True)  # p2pd has read it
        except BaseException:  # also when the start is called off
            _end(process, runtime)
            raise
        return cls(p2p, process, runtime)

    def is_alive(self) -> bool:
        """False within a moment of p2pd's death: the watchdog ends with it."""
        return self._process.poll() is None

    async def addresses(self) -> list[str]:
        """Where others can dial this peer, its peer id included; not all of them are reachable from everywhere."""
        peer_id, maddrs = await self.p2p._client.identify()
        return [f"{maddr}/p2p/{peer_id.to_base58()}" for maddr in maddrs]

    async def stop(self) -> None:
        """Ends p2pd and removes its folder. Safe to call twice."""
        with contextlib.suppress(Exception):  # hivemind's own shutdown; whatever it fails at dies with the daemon
            await asyncio.wait_for(self.p2p.shutdown(), SHUTDOWN_S)
        await asyncio.get_running_loop().run_in_executor(None, self.end)

    def end(self) -> None:
        """The part of `stop` that matters, for when the event loop does not answer."""
        _end(self._process, self._folder)


async def _attach(process: subprocess.Popen[bytes], runtime: Path, control: str, listen: list[str]) -> P2P:
    """hivemind's client of the daemon, once that answers."""
    # replicate() puts our own listening socket beside the daemon's when told so
    attach: Any = type("SwarmP2P", (P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{runtime}/"})
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise _start_error(_last_line(runtime / "daemon.log"), listen)
        try:
            return await asyncio.wait_for(attach.replicate(Multiaddr(control)), max(deadline - loop.time(), 0.1))
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            if loop.time() > deadline:
                raise NetworkError(
                    "libp2p's daemon did not start", why=f"no answer within {START_TIMEOUT_S:.0f} s",
                    do="look at the machine's load, then try again",
                ) from None
            await asyncio.sleep(0.02)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()  # the watchdog sees the end of its pipe and kills p2pd
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        for line in reversed(lines):
            if "failed" in line or "error" in line.lower() or "panic" in line:
                return line[-400:]
        if lines:
            return lines[-1][-400:]
    return "it said nothing"


def _check_port_is_free(maddr: str) -> None:
    """Two p2pd share a port without a word (SO_REUSEPORT) and each then gets half of the connections: ask first."""
    parts = maddr.split("/")  # "", ip4, HOST, tcp, PORT
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp" or parts[4] == "0":
        return
    with socket.socket(socket.AF_INET6 if parts[1] == "ip6" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection in TIME_WAIT is no user of the port
        try:
            probe.bind((parts[2], int(parts[4])))
        except (OSError, OverflowError, ValueError) as error:
            raise _listen_error([maddr], str(error)) from None


def _start_error(reason: str, listen: list[str]) -> NetworkError:
    if "address already in use" in reason or "failed to listen" in reason:
        return _listen_error(listen, reason)
    return NetworkError("libp2p's daemon ended at once", why=reason, do="run again with -v and report the lines above")


def _listen_error(listen: list[str], reason: str) -> NetworkError:
    return NetworkError(
        f"cannot listen on {', '.join(listen)}",
        why=f"another program uses that port, or the address is not this machine's ({reason})",
        do="choose another one with --listen, for example /ip4/0.0.0.0/tcp/0 for any free port",
    )
