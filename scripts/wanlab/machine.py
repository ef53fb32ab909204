"""What all labs of this machine share: the run folder, its lock, the compiled forwarder, one setting of the kernel.

The first lab makes it and the last one to go down removes it. /run/wanlab/NAME belongs to the lab of that name;
what begins with a dot is shared, and changes only under the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from swarm.errors import SwarmError

RUN = Path("/run/wanlab")
ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
ALLOWED_BEFORE = RUN / ".allowed-congestion-control"
SOURCE = Path(__file__).parent / "forwarder.c"


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """The lock is the run folder itself, so that nothing of it stays behind. Who leaves last removes what is shared."""
    while True:
        RUN.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another lab, the last one, has just removed it
            descriptor = os.open(RUN, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_still(descriptor, RUN):
                break
            os.close(descriptor)
    try:
        yield
    finally:
        if not labs():
            _leave_as_found()
        os.close(descriptor)


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _leave_as_found() -> None:
    if ALLOWED_BEFORE.exists():
        ALLOWED.write_text(ALLOWED_BEFORE.read_text())
    shutil.rmtree(RUN)


def labs() -> list[str]:
    """Names of the labs that are up, or that were not taken down."""
    return sorted(path.name for path in RUN.glob("[!.]*"))


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.rename(path)


def compiled_forwarder() -> Path:
    """Compiled once, until the source changes. Under the lock."""
    program = RUN / f".forwarder-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    if not program.exists():
        new = program.with_name(f"{program.name}.new")
        command = ["gcc", "-O2", "-Wall", "-o", str(new), str(SOURCE), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            do = "on Debian and Ubuntu: apt install gcc libc6-dev"
            raise SwarmError("the lab's forwarder cannot be compiled", why=result.stderr.strip()[-1000:], do=do)
        new.rename(program)
    return program


def allow(congestion_control: str) -> None:
    """A namespace may only use an algorithm that the machine's list has: add it. Under the lock."""
    allowed = ALLOWED.read_text().split()
    if congestion_control not in allowed:
        if not ALLOWED_BEFORE.exists():
            write(ALLOWED_BEFORE, " ".join(allowed))
        try:
            ALLOWED.write_text(" ".join([*allowed, congestion_control]))
        except OSError as error:
            raise SwarmError(
                f"the kernel has no congestion control {congestion_control!r}", why=str(error),
                do="set net.ipv4.tcp_congestion_control in the topology's sysctls to one that it has",
            ) from error
