"""Ties the life of libp2p's daemon to ours: however we end, SIGKILL included, nothing of it is left.

Runs as its own process in its own session: `python -I -S watchdog.py FOLDER PROGRAM ARGUMENTS...`. Standard library
only, so that it starts in some 20 ms. It holds the read end of a pipe whose write end only our process has: end of
file means that we are gone. Then it kills the daemon and removes FOLDER with the daemon's sockets.
A daemon started directly outlives a killed parent and holds its stdout (measured with hivemind 1.1.12).
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In the daemon, before it starts: should this watchdog itself be killed, the kernel ends the daemon (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(folder: str, command: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the peer; we end after it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(os.path.join(folder, "daemon.log"), "wb") as log:
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent
        )
    peer_gone = threading.Event()

    def follow_daemon() -> None:
        code = daemon.wait()
        if not peer_gone.is_set():  # the daemon ended first: the peer sees us end, reads the log and removes FOLDER
            os._exit(code if code > 0 else 1)

    threading.Thread(target=follow_daemon, daemon=True).start()
    while os.read(0, 4096):
        pass
    peer_gone.set()
    daemon.kill()
    daemon.wait()
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
