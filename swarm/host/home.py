"""The home folder: all that a peer leaves on its computer, and the only place it writes to.

    identity.key     32 random bytes, the Ed25519 seed behind the peer id; mode 600, made once
    lock             held while a peer runs: two peers with one identity would answer for each other
    state.json       addresses of peers ever met, the port we listened on, the run we were in
    runs/<run_id>/   checkpoints and events.jsonl of one run

The address book keeps a swarm without a centre reachable: whoever was met once can be a way back in (DESIGN I5).
Losing it costs a fresh --initial-peers; losing the key costs a new peer id. Neither ever costs weights.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import stat
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from swarm.errors import HomeError

KEY_BYTES = 32
MAX_ADDRESSES = 200
_RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}-[0-9a-f]{12}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Home:
    """An opened home folder. `notes` says what was found damaged and left aside, for the peer to show."""

    def __init__(self, path: Path, *, lock: IO[str] | None) -> None:
        """Use `Home.open`."""
        self.path = path
        self.notes: list[str] = []
        self._lock_file = lock
        self._mutex = threading.Lock()  # the network thread remembers peers, the training thread its run
        self._state = self._read_state()
        self._unwritten = False

    @classmethod
    def open(cls, path: str | Path, *, exclusive: bool = True) -> Home:
        """Make the folder where there is none and take its lock until `close`.

        `exclusive=False` is for reading beside a running peer (export): nothing is made or locked, and there is no
        `key_bytes`. Raises HomeError where it cannot be written, is no folder, or is in use by another peer.
        """
        folder = Path(path).expanduser().absolute()
        if not exclusive:
            if not folder.is_dir():
                raise HomeError(f"there is no home folder {folder}", do="give the folder of a peer with --home")
            return cls(folder, lock=None)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _take_lock(folder)
        except OSError as error:
            raise _explained(error, f"cannot use the home folder {folder}") from None
        for leftover in folder.glob(".*.tmp"):  # of a peer that was killed while writing
            leftover.unlink(missing_ok=True)
        return cls(folder, lock=lock)

    def close(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()  # which lets go of the lock
            self._lock_file = None

    def __enter__(self) -> Home:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def key_bytes(self) -> bytes:
        """The Ed25519 seed, 32 bytes; made on first use. Raises HomeError where the file is not such a seed."""
        assert self._lock_file is not None, "the identity belongs to whoever holds the lock"
        path = self.path / "identity.key"
        try:
            if not path.exists():
                # we hold the lock, so nobody else makes one; a crash leaves the whole key or none
                atomic_write(path, secrets.token_bytes(KEY_BYTES))
            key = path.read_bytes()
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                self.notes.append(f"{path} could be read by other users of this computer; closed it to them")
                path.chmod(0o600)
        except OSError as error:
            raise _explained(error, f"cannot read the identity {path}") from None
        if len(key) != KEY_BYTES:
            raise HomeError(
                f"the identity {path} is damaged",
                why=f"it has {len(key)} bytes where a key has {KEY_BYTES}",
                do="put back a copy, or delete it: the peer then gets a new id and loses nothing else",
            )
        return key

    @property
    def address_book(self) -> list[str]:
        """Multiaddresses of peers ever met, newest first."""
        return list(self._state["address_book"])

    def remember(self, maddrs: Iterable[str]) -> None:
        """Put these in front of the address book. Raises HomeError (full disk); the book in memory is kept then."""
        good = [maddr for maddr in maddrs if _is_address(maddr)]
        with self._mutex:
            book = list(dict.fromkeys(good + self._state["address_book"]))[:MAX_ADDRESSES]
            self._update("address_book", book)

    @property
    def listen_port(self) -> int | None:
        """The port of the last start: others' address books have it, so it is worth listening there again."""
        port: int | None = self._state["listen_port"]
        return port

    def remember_listen_port(self, port: int) -> None:
        with self._mutex:
            self._update("listen_port", port)

    @property
    def last_run_id(self) -> str | None:
        run_id: str | None = self._state["last_run_id"]
        return run_id

    def remember_run(self, run_id: str) -> None:
        """What a start without --new-swarm and --initial-peers goes on with."""
        _check_run_id(run_id)
        with self._mutex:
            self._update("last_run_id", run_id)

    def run_folder(self, run_id: str) -> Path:
        """The folder of one run, made where there is none. Raises HomeError where `run_id` is no run id.

        Run ids come from the network: one with a path in it must not lead out of the home folder.
        """
        _check_run_id(run_id)
        folder = self.path / "runs" / run_id
        if self._lock_file is not None:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise _explained(error, f"cannot make the folder {folder}") from None
        return folder

    def _read_state(self) -> dict[str, Any]:
        """What state.json holds, each part checked on its own: it is a convenience, so damage is a note, no error."""
        path = self.path / "state.json"
        found: Any = {}
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            self.notes.append(f"{path} is damaged and was ignored: {error}")
        if not isinstance(found, dict):
            self.notes.append(f"{path} is damaged and was ignored: it holds no keys and values")
            found = {}
        book, port, run_id = found.get("address_book", []), found.get("listen_port"), found.get("last_run_id")
        good = [maddr for maddr in book if _is_address(maddr)] if isinstance(book, list) else []
        if good != book:
            self.notes.append(f"{path}: what is no address in the address book was ignored")
        return {
            "address_book": list(dict.fromkeys(good))[:MAX_ADDRESSES],
            "listen_port": port if type(port) is int and 0 < port < 65536 else None,
            "last_run_id": run_id if isinstance(run_id, str) and _RUN_ID.fullmatch(run_id) else None,
        }

    def _update(self, key: str, value: Any) -> None:
        assert self._lock_file is not None, "only the peer that holds the lock writes"
        if self._state[key] != value or self._unwritten:
            self._state = {**self._state, key: value}
            self._unwritten = True  # until it is: on a full disk the next call tries again
            atomic_write(self.path / "state.json", json.dumps(self._state, indent=1).encode())
            self._unwritten = False


def atomic_write(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file so that a crash, a kill or a full disk leaves the old one or the new one, whole; mode 600.

    `content` may come in pieces, where it is large. Raises HomeError; the old file is then untouched and nothing else
    is left behind.
    """
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)  # O_EXCL, 0600
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise _explained(error, f"cannot write {path}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """A rename is on the disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_run_id(run_id: str) -> None:
    if not _RUN_ID.fullmatch(run_id):
        why = "one looks like demo-0123456789ab"
        raise HomeError(f"{run_id[:80]!r} is not a run id", why=why, do="check --run-id")


def _is_address(maddr: object) -> bool:
    return isinstance(maddr, str) and re.fullmatch(r"/[!-~]{1,511}", maddr) is not None


def _take_lock(folder: Path) -> IO[str]:
    """Lock, not a pid file: the system lets go of it however the peer ends."""
    # open as long as the peer runs
    file = open(folder / "lock", "a+", encoding="ascii", errors="replace")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = re.sub("[^0-9]", "", file.read(20))
        file.close()
        if not isinstance(error, BlockingIOError):
            raise
        raise HomeError(
            f"two peers with the same home and identity: {folder} is in use",
            why=f"another peer runs there{f' (process {holder})' if holder else ''}; "
            "the swarm could not tell the two apart",
            do="stop it, or give this one a folder of its own: --home DIR",
        ) from None
    with contextlib.suppress(OSError):  # only a hint for the message above
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), str(os.getpid()).encode())
    return file


def _explained(error: OSError, what: str) -> HomeError:
    if error.errno in _FULL:
        return HomeError(f"{what}: the disk is full", why=str(error.strerror), do="make room, then start again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        why, do = "this user may not write there", "change its permissions, or choose another folder: --home DIR"
        return HomeError(what, why=f"{error.strerror}: {why}", do=do)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return HomeError(what, why=f"{error.filename} is not a folder", do="choose another folder: --home DIR")
    return HomeError(what, why=str(error.strerror or error), do="choose another folder: --home DIR")
