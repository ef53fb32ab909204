"""State for newcomers: a fragment's weights and momentum in hashed chunks, from several holders at once.

The donor keeps the very version that it was asked for as long as somebody downloads it, however many rounds pass
meanwhile; one without memory for that waits with rounds that it has with nobody (turns.py). A donor that dies or lies
is dropped and its chunks come from another one. What was downloaded is checked against the digest that the swarm
attests before any of it is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from swarm.averaging import roll
from swarm.averaging.global_state import HASH_BYTES, GlobalState, chunk_length, digest_of, num_chunks
from swarm.averaging.roll import Roll
from swarm.errors import BadMessage, NetworkError, PeerRefused, StateError
from swarm.network.endpoint import Endpoint
from swarm.network.records import MAX_TOKENS, Head

LEASE_S = 30.0
"""a donor keeps an old version this long after the last request for it"""
MAX_LEASES = 4
MAX_VERSION = 2**40
CHUNKS_IN_FLIGHT = 4
"""of one donor"""
CHUNK_S = 30.0

log = logging.getLogger(__name__)


class Donor:
    """Serves a fragment's newest states, and older ones that somebody is in the middle of downloading."""

    def __init__(
        self, states: Callable[[], Iterable[GlobalState]], clock: Callable[[], float], *, max_leases: int = MAX_LEASES
    ) -> None:
        self._states, self._clock, self._max_leases = states, clock, max_leases
        self._leases: dict[str, tuple[GlobalState, float]] = {}
        self._not_kept, self._not_kept_until = "", 0.0
        """the version asked for last that there was no room to keep"""

    def gives_what_it_cannot_keep(self) -> bool:
        """Is somebody downloading the newest version, which is gone for them with the next one?"""
        newest = next(iter(self._states())).digest
        return newest == self._not_kept and self._clock() < self._not_kept_until

    def find(self, digest: object) -> GlobalState:
        now = self._clock()
        self._leases = {key: lease for key, lease in self._leases.items() if lease[1] > now}
        for state in [*self._states(), *(lease[0] for lease in self._leases.values())]:
            if state.digest == digest:
                if digest in self._leases or len(self._leases) < self._max_leases:
                    self._leases[state.digest] = (state, now + LEASE_S)
                else:
                    self._not_kept, self._not_kept_until = state.digest, now + LEASE_S
                return state
        raise PeerRefused("this peer does not have that version any more")

    def manifest(self, digest: object) -> tuple[dict[str, Any], bytes]:
        """Of the version with this digest; None: of the newest one, which is kept from now on."""
        state = self.find(next(iter(self._states())).digest if digest is None else digest)
        header = {"version": state.version, "tokens": state.tokens, "roll": roll.to_json(state.roll)}
        return header, state.chunk_hashes

    def chunk(self, digest: object, index: object) -> bytes:
        state = self.find(digest)
        if not isinstance(index, int) or not 0 <= index < state.num_chunks:
            raise BadMessage("there is no such chunk")
        return bytes(state.chunk(index))


@dataclass(frozen=True)
class Shape:
    """Of a fragment's state, as the run config says it is."""

    fragment: int
    numel: int
    num_buffers: int


@dataclass(frozen=True)
class Wanted:
    """What to download: the head that the swarm attests and the shape that the run config says it has."""

    fragment: int
    digest: str
    numel: int
    num_buffers: int


@dataclass
class _Transfer:
    wanted: Wanted
    version: int
    tokens: int
    hashes: bytes
    tensors: list[torch.Tensor]
    todo: list[int]
    done: int = 0
    in_flight: int = 0
    roll: Roll = ()


async def download(
    endpoint: Endpoint, wanted: Wanted, donors: list[str], *,
    maddrs: Callable[[str], list[str]] = lambda peer_id: [],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> GlobalState:
    """Fetch one state from whichever of `donors` have it. Raises StateError when none of them can give all of it."""
    transfer = await _manifest(endpoint, wanted, donors, maddrs)
    await asyncio.gather(*(
        _fetch_from(endpoint, transfer, donor, maddrs, on_progress)
        for donor in donors for _ in range(CHUNKS_IN_FLIGHT)
    ))
    total = num_chunks(wanted.numel, wanted.num_buffers)
    if transfer.done < total:
        raise StateError(
            f"fragment {wanted.fragment}: {total - transfer.done} of {total} chunks are missing",
            why="every peer that had this version has gone or moved on", do="it is tried again with a newer version",
        )
    weights, *buffers = transfer.tensors
    state = GlobalState(wanted.fragment, transfer.version, transfer.tokens, weights, tuple(buffers), transfer.roll)
    if await asyncio.to_thread(lambda: state.digest) != wanted.digest:
        raise StateError(f"fragment {wanted.fragment}: the downloaded state does not match its digest")
    return state


async def newest_head(
    endpoint: Endpoint, fragment: int, donor: str, *, numel: int, num_buffers: int,
    maddrs: Callable[[str], list[str]] = lambda peer_id: [],
) -> Head:
    """The head that a donor has right now, and keeps for us: in a quick swarm what it said a second ago is gone."""
    total = num_chunks(numel, num_buffers)
    header, hashes = await endpoint.call(
        donor, "state", {"fragment": fragment}, deadline_s=CHUNK_S, max_answer=total * HASH_BYTES, maddrs=maddrs(donor)
    )
    version, tokens, listed = _check_manifest(header, hashes, total)
    return Head(version=version, digest=digest_of(fragment, version, tokens, hashes, listed), tokens=tokens)


async def _manifest(
    endpoint: Endpoint, wanted: Wanted, donors: list[str], maddrs: Callable[[str], list[str]]
) -> _Transfer:
    total = num_chunks(wanted.numel, wanted.num_buffers)
    problem: Exception | None = None
    for donor in donors:
        try:
            header, hashes = await endpoint.call(
                donor, "state", {"fragment": wanted.fragment, "digest": wanted.digest}, deadline_s=CHUNK_S,
                max_answer=total * HASH_BYTES, maddrs=maddrs(donor),
            )
            version, tokens, listed = _check_manifest(header, hashes, total)
            if digest_of(wanted.fragment, version, tokens, hashes, listed) != wanted.digest:
                raise BadMessage("a manifest that does not match the digest")
            tensors = [torch.empty(wanted.numel) for _ in range(1 + wanted.num_buffers)]
            return _Transfer(wanted, version, tokens, hashes, tensors, list(range(total))[::-1], roll=listed)
        except NetworkError as error:
            log.info("no manifest from %s: %s", donor[-6:], error)
            problem = error
    raise StateError(f"fragment {wanted.fragment}: nobody gave the manifest of {wanted.digest[:12]}", why=str(problem))


def _check_manifest(header: dict[str, Any], hashes: bytes, total: int) -> tuple[int, int, Roll]:
    """(version, tokens, roll). Raises BadMessage."""
    version, tokens = header.get("version"), header.get("tokens")
    if not (type(version) is int and type(tokens) is int and version >= 0 and tokens >= 0):  # True is an int too
        raise BadMessage("a manifest without version and tokens")
    if len(hashes) != total * HASH_BYTES or version > MAX_VERSION or tokens > MAX_TOKENS:
        raise BadMessage("a manifest of another shape than the run config's")
    return version, tokens, roll.from_json(header.get("roll", []))


async def _fetch_from(
    endpoint: Endpoint, transfer: _Transfer, donor: str, maddrs: Callable[[str], list[str]],
    on_progress: Callable[[int, int], None],
) -> None:
    """Take chunks off the list until it is empty or this donor fails; a chunk that failed goes back on the list."""
    wanted = transfer.wanted
    total = num_chunks(wanted.numel, wanted.num_buffers)
    while transfer.todo or transfer.in_flight:
        if not transfer.todo:
            await asyncio.sleep(0.02)  # others have the last ones; they may fail and put them back
            continue
        index = transfer.todo.pop()
        transfer.in_flight += 1
        try:
            _, data = await endpoint.call(
                donor, "chunk", {"fragment": wanted.fragment, "digest": wanted.digest, "index": index},
                deadline_s=CHUNK_S, max_answer=chunk_length(wanted.numel, index), maddrs=maddrs(donor),
            )
            _store(transfer, index, data)
            on_progress(transfer.done, total)
        except NetworkError as error:
            log.info("chunk %d from %s: %s", index, donor[-6:], error)
            transfer.todo.append(index)
            return
        finally:
            transfer.in_flight -= 1


def _store(transfer: _Transfer, index: int, data: bytes) -> None:
    expected = transfer.hashes[index * HASH_BYTES:(index + 1) * HASH_BYTES]
    if len(data) != chunk_length(transfer.wanted.numel, index) or hashlib.sha256(data).digest() != expected:
        raise BadMessage(f"chunk {index} does not match its hash, or the run config's shape")
    state = GlobalState(0, 0, 0, transfer.tensors[0], tuple(transfer.tensors[1:]))
    state.chunk(index)[:] = data
    transfer.done += 1
