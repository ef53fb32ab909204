"""The DHT: where newcomers learn which runs there are and who is in them. A hint, not the truth.

hivemind's Kademlia node, in our process and on our event loop, with every record signed and bounded. Three keys:

    swarm/runs          subkey = peer id -> run id            which runs are on this DHT
    RUN_ID/config       subkey = peer id -> run config        its canonical JSON; checked against the hash in the run id
    RUN_ID/peers        subkey = peer id -> Status            who is here

Only dictionary entries under the writer's own peer id are valid, so a stranger can replace nobody's record.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import msgpack
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils.serializer import MSGPackSerializer

from swarm.errors import BadMessage
from swarm.network import records
from swarm.network.daemon import Daemon
from swarm.network.keys import Keypair

MAX_KEYS_STORED = 20_000
MAX_NESTING = 4


class SignedRecords(RecordValidatorBase):
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
        value = msgpack.unpackb(data, max_str_len=200, max_bin_len=records.MAX_RECORD_BYTES, max_array_len=0,
                                max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.UnpackException):
        return None
    return value if isinstance(value, kind) else None


class Dht:
    def __init__(self, node: DHTNode, keypair: Keypair, clock: Callable[[], float]) -> None:
        self._node, self._keypair, self._clock = node, keypair, clock

    @classmethod
    async def start(
        cls, daemon: Daemon, keypair: Keypair, *, initial_peers: list[str], observe: bool, clock: Callable[[], float]
    ) -> Dht:
        """Join through `initial_peers` (already connected; empty: alone). `observe`: read, never serve."""
        _bound_hivemind_decoding()
        node = await DHTNode.create(
            p2p=daemon.p2p, initial_peers=initial_peers, client_mode=observe, record_validator=SignedRecords(clock),
            ensure_bootstrap_success=False, strict=False, cache_locally=False, cache_nearest=0, cache_on_store=False,
        )
        node.protocol.storage.maxsize = MAX_KEYS_STORED  # hivemind's has no bound
        node.protocol.cache.maxsize = MAX_KEYS_STORED
        return cls(node, keypair, clock)

    async def meet(self, peer_id: str) -> None:
        """Add a peer that we are linked to to the routing table (and ourselves to its)."""
        from hivemind.p2p import PeerID

        await self._node.protocol.call_ping(PeerID.from_base58(peer_id), validate=False, strict=False)

    async def publish(self, key: str, payload: str, *, ttl_s: float) -> bool:
        """Store our entry under `key` for `ttl_s` seconds; False where nobody took it."""
        expires = self._clock() + min(ttl_s, records.MAX_TTL_S)
        value = records.seal(self._keypair, DHTID.generate(source=key).to_bytes(), payload, expires=expires)
        return bool(await self._node.store(key, value, expires, subkey=self._keypair.peer_id))

    async def entries(self, key: str) -> dict[str, str]:
        """Everybody's valid entry under `key`: peer id -> payload."""
        found = await self._node.get(key, latest=True)
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

    async def statuses(self, run_id: str) -> dict[str, records.Status]:
        statuses = {}
        for peer_id, payload in (await self.entries(f"{run_id}/peers")).items():
            try:
                statuses[peer_id] = records.parse(records.Status, json.loads(payload))
            except (BadMessage, ValueError, RecursionError):
                continue
        return {peer_id: status for peer_id, status in statuses.items() if status.run_id == run_id}

    async def stop(self) -> None:
        await self._node.shutdown()


_depth = threading.local()
_decode_ext = MSGPackSerializer._decode_ext_types


def _bound_hivemind_decoding() -> None:
    """hivemind's msgpack decoder recurses through nested tuples without limit: 200 levels (a 1.2 kB value from any
    stranger) overflow the C stack and end the process. Give it a depth."""

    def decode(type_code: int, data: bytes) -> Any:
        level = getattr(_depth, "level", 0)
        if level >= MAX_NESTING:
            raise ValueError("a DHT value is nested too deeply")
        _depth.level = level + 1
        try:
            return _decode_ext(type_code, data)
        finally:
            _depth.level = level

    MSGPackSerializer._decode_ext_types = staticmethod(decode)
