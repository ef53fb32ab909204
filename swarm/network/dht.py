"""The DHT: where newcomers learn which runs there are and who is in them. A hint, not the truth.

hivemind's Kademlia node, in our process and on our event loop, with every record signed and bounded. Its keys:

    swarm/runs          subkey = peer id -> run id            which runs are on this DHT
    RUN_ID/config       subkey = peer id -> run config        canonical JSON; checked against the hash in the run id
    RUN_ID/peers        subkey = peer id -> Status            who is here; of more than 64: neighbourhood.py
    RUN_ID/holders/F    subkey = peer id -> Contact           who has fragment F, once there are more: holders.py

Only dictionary entries under the writer's own peer id are valid, so a stranger can replace nobody's record.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import hivemind.dht.protocol
import msgpack
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import PeerID
from hivemind.utils.serializer import MSGPackSerializer

from swarm.errors import BadMessage, NetworkError
from swarm.network import frames, records
from swarm.network.daemon import Daemon
from swarm.network.keys import Keypair
from swarm.network.neighbourhood import Neighbourhood

MAX_KEYS_STORED = 500
"""a run of up to 64 peers needs three; of more, each peer stores a few dozen of all their keys"""
MAX_BYTES_OF_KEY = 400_000
"""under one key, of all its writers: some 600 statuses, should so many come at the same moment; 64 are usual. An answer
over 4 MB fails as a whole"""
MAX_NESTING = 4
START_S = 30.0
CALL_S = 20.0
"""for one look-up or one store, all its hops together"""

log = logging.getLogger(__name__)


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc] # hivemind is not typed
    """What we keep for others: hivemind's has no bound. What is full refuses what is new and still renews the old, so
    a flood cannot push out the records of those who were here before."""

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        here = self.get(key)
        if here is None:
            if len(self) >= MAX_KEYS_STORED:
                return False
        elif isinstance(here.value, DictionaryDHTValue):
            entry = here.value.get(subkey)
            if entry is not None and entry.expiration_time >= expiration_time:
                return False  # an old record replayed would make hivemind forget the new one at the old one's expiry
            others = sum(len(item.value) for name, item in here.value.items() if name != subkey)
            if others + len(value) > MAX_BYTES_OF_KEY:
                return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]
    """Admits a record only as an entry of a dictionary, under its signer's peer id, in bounds, with a sane expiry."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def validate(self, record: DHTRecord) -> bool:
        if record.subkey in (DHTProtocol.IS_REGULAR_VALUE, DHTProtocol.IS_DICTIONARY):
            return False
        peer_id, value = _plain(record.subkey, str), _plain(record.value, bytes)
        if peer_id is None or value is None:
            return False
        return records.unseal(
            peer_id, record.key, value, expires=record.expiration_time, now=self._clock()
        ) is not None


def _plain(data: bytes, kind: type) -> Any:
    """One msgpack string or byte string, or None; anything nested or long is refused unread."""
    try:
        value = msgpack.unpackb(
            data, max_str_len=200, max_bin_len=records.MAX_RECORD_BYTES, max_array_len=0, max_map_len=0, max_ext_len=0
        )
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    return value if isinstance(value, kind) else None


class Dht:
    def __init__(
        self, node: DHTNode, keypair: Keypair, clock: Callable[[], float], *, first: Sequence[str] = ()
    ) -> None:
        """`first`: peer ids of those through whom we have come."""
        self._node, self._keypair, self._clock, self._first = node, keypair, clock, first
        self._neighbourhoods: dict[str, Neighbourhood] = {}

    @classmethod
    async def start(
        cls, daemon: Daemon, keypair: Keypair, *, initial_peers: list[str], observe: bool, clock: Callable[[], float]
    ) -> Dht:
        """Join through `initial_peers` (already connected; empty: alone). `observe`: read, never serve.

        Raises NetworkError where the daemon does not answer.
        """
        _bound_hivemind()
        try:
            node = await asyncio.wait_for(DHTNode.create(
                p2p=daemon.p2p, initial_peers=initial_peers, client_mode=observe,
                record_validator=SignedRecords(clock), ensure_bootstrap_success=False, strict=False,
                cache_locally=False, cache_nearest=0, cache_on_store=False,
            ), START_S)
        except Exception as error:  # a daemon that died leaves hivemind waiting, or raising any kind
            why = str(error) or type(error).__name__
            raise NetworkError("cannot start the DHT", why=why, do="try again; -v says more") from error
        return cls(node, keypair, clock, first=[maddr.rsplit("/", 1)[-1] for maddr in initial_peers])

    async def meet(self, peer_id: str) -> None:
        """Add a peer that we are linked to to the routing table (and ourselves to its). A failure is no news."""
        try:
            ping = self._node.protocol.call_ping(PeerID.from_base58(peer_id), validate=False, strict=False)
            await asyncio.wait_for(ping, CALL_S)
        except Exception as error:
            log.debug("the DHT cannot meet %s: %s", peer_id, error)

    async def meet_again(self) -> None:
        """Those through whom we have come, once more: a first contact that failed on a busy machine would leave us
        alone in an empty DHT for good."""
        await asyncio.gather(*(self.meet(peer_id) for peer_id in self._first))

    async def publish(self, key: str, payload: str, *, ttl_s: float) -> bool:
        """Store our entry under `key` for `ttl_s` seconds; False where nobody took it. ValueError: it is too long."""
        expires = self._clock() + min(ttl_s, records.MAX_TTL_S)
        value = records.seal(self._keypair, DHTID.generate(source=key).to_bytes(), payload, expires=expires)
        try:
            store = self._node.store(key, value, expires, subkey=self._keypair.peer_id)
            return bool(await asyncio.wait_for(store, CALL_S))
        except Exception as error:  # a hint: whatever goes wrong here goes right next time
            log.debug("the DHT did not store %s: %s", key, error)
            return False

    async def entries(self, key: str) -> dict[str, str]:
        """Everybody's valid entry under `key`: peer id -> payload. Empty where nothing is found, or on a failure."""
        try:
            found = await asyncio.wait_for(self._node.get(key, latest=True), CALL_S)
        except Exception as error:
            log.debug("the DHT did not find %s: %s", key, error)
            return {}
        if found is None or not isinstance(found.value, dict):
            return {}
        key_bytes = DHTID.generate(source=key).to_bytes()
        entries = {}
        for peer_id, entry in found.value.items():
            if isinstance(peer_id, str) and isinstance(entry.value, bytes):
                payload = records.unseal(
                    peer_id, key_bytes, entry.value, expires=entry.expiration_time, now=self._clock()
                )
                if payload is not None:
                    entries[peer_id] = payload
        return entries

    def neighbourhood(self, key: str) -> Neighbourhood:
        """The tree of records under `key`, as this peer sees it; always the same one."""
        if key not in self._neighbourhoods:
            self._neighbourhoods[key] = Neighbourhood(
                key, me=self._keypair.peer_id, entries=self.entries, publish=self.publish
            )
        return self._neighbourhoods[key]

    def peers(self, run_id: str) -> Neighbourhood:
        return self.neighbourhood(f"{run_id}/peers")

    async def statuses(self, run_id: str) -> dict[str, records.Status]:
        """Of the peers of a run: of all of them up to 64, else of this peer's neighbours."""
        statuses = {}
        for peer_id, payload in (await self.peers(run_id).look()).items():
            try:
                statuses[peer_id] = records.parse(records.Status, frames.parse_head(payload.encode()))
            except BadMessage:
                continue
        return {peer_id: status for peer_id, status in statuses.items() if status.run_id == run_id}

    async def stop(self) -> None:
        """Its handlers end with the daemon; hivemind's own shutdown would wait for a dead one without end."""
        self._node.is_alive = False


_depth = threading.local()
_decode_ext = MSGPackSerializer._decode_ext_types


_EXT_TUPLE, _EXT_DICTIONARY = 0x40, 0x50


def _bound_hivemind() -> None:
    """hivemind's msgpack decoder recurses through nested tuples without limit: 200 levels (a 1.2 kB value from any
    stranger) overflow the C stack and end the process. Give it a depth, and its storage a size."""

    def decode(type_code: int, data: bytes) -> Any:
        level = getattr(_depth, "level", 0)
        if level >= MAX_NESTING or type_code not in (_EXT_TUPLE, _EXT_DICTIONARY):
            raise ValueError("a DHT value is nested too deeply or of an unknown type")
        _depth.level = level + 1
        try:
            return _decode_ext(type_code, data)
        finally:
            _depth.level = level

    MSGPackSerializer._decode_ext_types = staticmethod(decode)
    hivemind.dht.protocol.DHTLocalStorage = BoundedStorage
