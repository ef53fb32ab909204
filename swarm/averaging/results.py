"""Results of recent rounds, by hash, and the commits that name them: with them a peer catches up a few rounds."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass

from swarm.averaging.messages import Commit
from swarm.errors import BadMessage

KEPT_BYTES = 512 * 1024 * 1024
KEPT_COMMITS = 256
"""of one fragment; as far back a parted swarm can tell whose contributions are in which history"""
COMMITS_AT_ONCE = 32


class Results:
    """Bytes by SHA-256, the newest `KEPT_BYTES` of them. Serves anyone: a hash gives away nothing."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes, self._bytes = kept_bytes, 0
        self._by_hash: OrderedDict[str, bytes] = OrderedDict()
        self._awaited: dict[str, set[asyncio.Future[None]]] = {}

    def put(self, data: bytes) -> str:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._by_hash:
            self._by_hash[key] = data
            self._bytes += len(data)
            while self._bytes > self._kept_bytes and len(self._by_hash) > 1:
                self._bytes -= len(self._by_hash.popitem(last=False)[1])
            for coming in self._awaited.get(key, ()):
                if not coming.done():
                    coming.set_result(None)
        return key

    async def arrival(self, key: str, *, timeout_s: float) -> bool:
        """Wait for bytes that somebody is sending; False where they have not come."""
        if key in self._by_hash:
            return True
        coming = asyncio.get_running_loop().create_future()
        waiting = self._awaited.setdefault(key, set())
        waiting.add(coming)
        try:
            await asyncio.wait_for(coming, timeout_s)
        except asyncio.TimeoutError:
            return False
        finally:
            waiting.discard(coming)
            if not waiting:
                self._awaited.pop(key, None)
        return True

    def get(self, key: str) -> bytes | None:
        return self._by_hash.get(key)


@dataclass(frozen=True)
class Fates:
    """What has become of a peer's own openings (by id) in a history that it moves over to: fates.py."""

    known: frozenset[str] = frozenset()
    """those that our history has contributions of; what came later has another fate"""
    absorbed: tuple[str, ...] = ()
    """of unknown fate so far, and in the new history"""
    lost: tuple[str, ...] = ()
    """in our history, and not in the new one"""
    common: int | None = None
    """up to this version both are the same; None: nobody can tell"""
    commits: tuple[Commit, ...] = ()
    """of the new history, up to its head: from the common version on, or as far back as is known"""


class History:
    """One fragment's applied commits, and the digests of its versions, newest last."""

    def __init__(self) -> None:
        self._commits: OrderedDict[int, Commit] = OrderedDict()
        self._digests: OrderedDict[int, str] = OrderedDict()
        self._told: set[int] = set()
        """versions that others say this history has passed through: good enough to compare histories, but not for
        anybody else to rely on"""

    def copy(self) -> History:
        other = History()
        other._commits, other._digests, other._told = self._commits.copy(), self._digests.copy(), self._told.copy()
        return other

    def add(self, commit: Commit, digest: str) -> None:
        self._commits[commit.opening.version] = commit
        self.saw(commit.opening.version, digest)
        while len(self._commits) > KEPT_COMMITS:
            self._commits.popitem(last=False)

    def saw(self, version: int, digest: str) -> None:
        self._digests[version] = digest
        self._told.discard(version)
        while len(self._digests) > KEPT_COMMITS * 4:
            self._told.discard(self._digests.popitem(last=False)[0])

    def knows(self, version: int, digest: str) -> bool:
        """This peer has had that state itself, and can attest it."""
        return self._digests.get(version) == digest and version not in self._told

    def passes(self, version: int, digest: str) -> bool:
        """Also by what others say."""
        return self._digests.get(version) == digest

    def commit(self, version: int) -> Commit | None:
        return self._commits.get(version)

    def since(self, version: int, *, limit: int) -> list[Commit]:
        """Commits that lead on from `version`, without a gap; empty where the next one is no longer kept."""
        commits: list[Commit] = []
        while (commit := self._commits.get(version + 1)) is not None and len(commits) < limit:
            commits.append(commit)
            version += 1
        return commits

    def answer(self, since: object) -> bytes:
        """What is sent to somebody at version `since`. Raises BadMessage."""
        if type(since) is not int or since < 0:
            raise BadMessage("commits since what?")
        commits = [commit.model_dump() for commit in self.since(since, limit=COMMITS_AT_ONCE)]
        return json.dumps({"commits": commits}, separators=(",", ":")).encode()

    def move_over(self, fates: Fates, version: int, digest: str) -> None:
        """To another history, with this head, of which so much is known; what may not lead here is forgotten."""
        common = -1 if fates.common is None else fates.common
        self._commits = OrderedDict((key, commit) for key, commit in self._commits.items() if key <= common)
        self._digests = OrderedDict((key, known) for key, known in self._digests.items() if key <= common)
        self._told = {key for key in self._told if key <= common}
        bases = [commit.opening.base for commit in fates.commits[1:]]
        for commit, made in zip(fates.commits, [*bases, digest], strict=False):
            self.add(commit, made)
            self._told.add(commit.opening.version)
        self.saw(version, digest)
