"""Spare copies on this peer's disk: the newest known state of fragments that others hold.

    runs/RUN_ID/spares/fragment-003.safetensors     see state_file.py; one a fragment, whole or not there

All together stay within the room that this machine gives (`--spare-disk`); while one is renewed, the old file and the
new one are both there for a moment. What is damaged is dropped, and said: other copies of it exist. A full disk costs
the spare only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from swarm.averaging.global_state import GlobalState
from swarm.errors import HomeError, StateError
from swarm.network.records import Head
from swarm.train import state_file
from swarm.units import format_bytes

DEFAULT_SHARE = 0.1
"""of the disk that is free"""
DEFAULT_MOST_BYTES = 20 * 10**9
_NAME = re.compile(r"fragment-([0-9]{3})\.safetensors")

log = logging.getLogger(__name__)


def room_bytes(asked: int | None, folder: Path) -> int:
    """Bytes of the disk for spares: as the owner of the machine says, or a modest share of what is free."""
    return asked if asked is not None else min(DEFAULT_MOST_BYTES, int(DEFAULT_SHARE * state_file.free_bytes(folder)))


class SpareDisk:
    def __init__(
        self, folder: Path, *, room_bytes: int, numels: Mapping[int, int], num_buffers: int,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`numels`: fragment -> length of its flat vector, of all fragments of the run. Finds what an earlier start has
        left, and lets go of what does not fit into the room any more."""
        self.room_bytes = self._limit_bytes = room_bytes
        self._folder, self._numels, self._num_buffers, self._warn = folder, numels, num_buffers, warn
        self._heads: dict[int, Head] = {}
        self._find()
        while self.used_bytes() > room_bytes:
            self.drop(min(self._heads, key=lambda index: self._heads[index].tokens))

    def heads(self) -> dict[int, Head]:
        """Fragment -> what its copy says it is; it is read and checked when somebody wants it."""
        return dict(self._heads)

    def size_bytes(self, fragment: int) -> int:
        """The most that the copy of a fragment takes, whether it is here or not."""
        return state_file.file_bytes(self._numels[fragment], self._num_buffers)

    def used_bytes(self) -> int:
        return sum(map(self.size_bytes, self._heads))

    def has_room_for(self, fragment: int) -> bool:
        others = sum(self.size_bytes(index) for index in self._heads if index != fragment)
        return others + self.size_bytes(fragment) <= self._limit_bytes

    def offer_nothing(self) -> None:
        """This peer has no memory to follow rounds with copies. Those that are here stay until others have them, and
        what would be lost with this peer is still written."""
        self.room_bytes = 0

    def read(self, fragment: int) -> GlobalState | None:
        """The copy, checked against its digest. None: there is none, or it was damaged and is dropped."""
        head = self._heads.get(fragment)
        if head is None:
            return None
        try:
            return state_file.read(
                self._path(fragment), fragment=fragment, head=head, numel=self._numels[fragment],
                num_buffers=self._num_buffers,
            )
        except (StateError, OSError) as error:
            self._warn(f"the spare copy of fragment {fragment} is damaged and was dropped: {error}")
            self.drop(fragment)
            return None

    def write(self, state: GlobalState) -> bool:
        """Keep this copy in the place of an older one. False: there is no room for it; what was there still is."""
        if not self.has_room_for(state.fragment):
            return False
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            state_file.write(self._path(state.fragment), state)
        except (HomeError, OSError) as error:
            why = f"{error.what} ({error.why})" if isinstance(error, HomeError) else f"{error}"
            size = format_bytes(self.size_bytes(state.fragment))
            self._warn(f"a spare copy of fragment {state.fragment} ({size}) was not written, training goes on: {why}")
            return False
        self._heads[state.fragment] = Head(version=state.version, digest=state.digest, tokens=state.tokens)
        return True

    def drop(self, fragment: int) -> None:
        self._heads.pop(fragment, None)
        try:
            self._path(fragment).unlink(missing_ok=True)
        except OSError as error:  # it takes its room, and is tried again at the next start
            log.warning("cannot delete the spare copy of fragment %d: %s", fragment, error)

    def _find(self) -> None:
        if not self._folder.is_dir():
            return
        for path in sorted(self._folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match is None:
                if path.name.endswith(".tmp"):  # of a peer that was killed while writing
                    path.unlink(missing_ok=True)
                continue
            try:
                fragment, head = state_file.head_in(path)
                if fragment != int(match[1]) or fragment not in self._numels:
                    raise StateError(f"{path.name} is not of a fragment of this run")
                self._heads[fragment] = head
            except (StateError, OSError) as error:
                self._warn(f"a spare copy is damaged and was dropped: {error}")
                self.drop(int(match[1]))

    def _path(self, fragment: int) -> Path:
        return self._folder / f"fragment-{fragment:03d}.safetensors"
