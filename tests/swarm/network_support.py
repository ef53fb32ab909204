"""Networks on loopback for tests: made in one line, stopped with the test, and waited for with a deadline."""

import asyncio
import contextlib
import hashlib
import random
import time

import msgpack
import psutil
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.network import records
from swarm.network.keys import Keypair
from swarm.network.network import Network
from swarm.network.records import Status

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
PATIENCE_S = 30.0
KEY = "some/key"
RUN = RunConfig(name="demo", model=ModelConfig(config={"model_type": "gptj"}), data=DataConfig(stdlib=True))
OTHER_RUN = RunConfig(name="other", model=ModelConfig(config={"model_type": "llama"}), data=DataConfig(stdlib=True))


def key(name):
    """The same identity in every process and every run of a test."""
    return Keypair(hashlib.sha256(str(name).encode()).digest())


def key_of(name):
    return key(name).peer_id


DEAD = f"/ip4/127.0.0.1/tcp/1/p2p/{key_of('dead')}"
"""nobody listens there"""


def until(condition, what="it"):
    """Wait for a condition that another thread or process brings about; fails after a generous deadline."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


async def soon(condition, what="it"):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.005)


def status(name="peer", role="trainer", run=RUN, **more):
    return Status(run_id=run.run_id, name=name, role=role, **more)


class Nets:
    """Makes networks and stops them all. Use as a context manager."""

    def __init__(self, folder):
        self._folder, self._made = folder, []

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        for network in self._made:
            with contextlib.suppress(Exception):
                network.stop()

    def make(self, name=None, *, clock=time.time, keypair=None):
        """A network that is not started yet."""
        network = Network(keypair or key(name or random.random()), clock=clock)
        self._made.append(network)
        return network

    def start(self, name=None, *, initial_peers=(), listen=LOOPBACK, keypair=None, clock=time.time, **more):
        network = self.make(name, clock=clock, keypair=keypair)
        network.run(
            network.start(
                folder=self._folder, listen=list(listen), announce=[], initial_peers=list(initial_peers),
                **{"join_timeout_s": PATIENCE_S, **more},
            ),
            timeout_s=2 * PATIENCE_S,
        )  # fmt: skip
        return network

    def swarm(self, *names, run=RUN):
        """Networks with directories, each joined through the first one."""
        networks = []
        for name in names:
            initial = networks[0].maddrs if networks else []
            network = self.start(name, initial_peers=initial)
            start_directory(network, run=run, name=str(name))
            if networks:
                meet(network, networks[0])
            networks.append(network)
        return networks


def start_directory(network, *, run=RUN, role="trainer", name="peer"):
    async def start():
        maddrs = network.maddrs[:8]
        network.start_directory(
            run_id=run.run_id, my_status=lambda: status(name, role, run=run, maddrs=maddrs)
        )

    network.run(start())


def meet(network, other):
    async def meet_it():
        network.directory.meet(other.peer_id, other.maddrs)

    network.run(meet_it())


def alive(network):
    async def ask():
        return network.directory.alive()

    return network.run(ask())


def p2pd_of(network):
    """The process of a network's libp2p daemon."""
    watchdog = psutil.Process(network._daemon._process.pid)
    return watchdog.children()[0]


def call(network, other, method, header=None, body=b"", **more):
    more = {"deadline_s": PATIENCE_S, "maddrs": other.maddrs, **more}
    return network.run(network.endpoint.call(other.peer_id, method, header, body, **more))


def store(network, *, at=KEY, subkey=None, value, expires, signer="stranger"):
    """What a stranger's rpc_store does to a live DHT node."""
    protocol = network.dht._node.protocol
    request = dht_pb2.StoreRequest(
        keys=[DHTID.generate(source=at).to_bytes()], values=[value], expiration_time=[expires], in_cache=[False],
        subkeys=[subkey if subkey is not None else msgpack.packb(key_of(signer))],
    )  # fmt: skip
    context = P2PContext("store", None, PeerID.from_base58(key_of(signer)))
    return list(network.run(protocol.rpc_store(request, context)).store_ok)


def sealed(payload="evil", *, name="stranger", at=KEY, expires):
    value = records.seal(key(name), DHTID.generate(source=at).to_bytes(), payload, expires=expires)
    return msgpack.packb(value)
