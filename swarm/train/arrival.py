"""Arriving: start networking, link to whom we were told of or to whom we knew, meet the run's other peers.

Whoever joins must be answered; whoever resumes asks everybody it ever met, and goes on alone where nobody is there,
so that a swarm that was switched off comes back in whatever order its peers do (I5).
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from swarm.config import PeerConfig, RunConfig
from swarm.errors import ConfigError, HomeError, JoinError, NetworkError
from swarm.host.home import Home
from swarm.network import join, reachability
from swarm.network.maddr import host_and_port, peer_id_of, ranked
from swarm.network.network import Network
from swarm.network.records import Status

MEET_S = 5.0
"""how long a newcomer waits for the first word of those who have the state"""
LATE_S = 1.0
"""for the word of everybody, once it knows enough, and for a link: a machine that has lost its power is in the DHT for
another minute, and dialling it takes ten seconds"""


class Arrival:
    def __init__(self, config: PeerConfig, home: Home, network: Network) -> None:
        self._config, self._home, self._network = config, home, network
        self._ways_in: list[str] = []
        self._answered: list[str] = []
        self._publishing: asyncio.Task[None] | None = None
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._linking: list[asyncio.Task[None]] = []
        """all kept, because a loop holds its tasks weakly"""
        self.situation = reachability.judge([], port=0)
        self.situated_s = 0.0
        """how long it took to find that out"""

    def connect(self) -> None:
        """Start networking. Raises JoinError (nobody answers, clock off, identity in use) or NetworkError (port)."""
        config, home = self._config, self._home
        for leftover in home.path.glob("p2p-*"):  # of a peer whose watchdog was killed with it
            shutil.rmtree(leftover, ignore_errors=True)
        wanted = [maddr for maddr in config.initial_peers if peer_id_of(maddr) != self._network.peer_id]
        if config.initial_peers and not wanted:
            raise JoinError(
                "the initial peers are all this peer itself", why="they have the identity of this home folder",
                do="give another peer's address; if the folder was copied from that peer, start with your own --home",
            )
        # who starts a run has nobody to ask yet; who resumes one asks everybody it ever met
        self._ways_in = wanted or ([] if config.new_swarm else self._others_in(home.address_book))
        port = home.listen_port or 0
        attempts = [config.listen] if config.listen else [[f"/ip4/0.0.0.0/tcp/{p}"] for p in dict.fromkeys([port, 0])]
        for attempt, listen in enumerate(attempts):
            try:
                self._answered = self._network.run(self._network.start(
                    folder=home.path, listen=listen, announce=config.announce, initial_peers=self._ways_in,
                    ask_initial_peers=bool(wanted), join_timeout_s=config.join_timeout_s,
                    introduce=not config.no_introductions,
                ))
                break
            except NetworkError:
                if attempt + 1 == len(attempts):
                    raise  # the port of the last start may be taken by now; any other one does as well
        port_now = self._port()
        if port_now is not None and not config.listen:
            home.remember_listen_port(port_now)

    async def arrive(self, run: RunConfig, my_status: Callable[[], Status]) -> int:
        """Start the directory, wait a moment for the others' word, and find out from them whether they can dial this
        peer (`situation`): at the same time, for each round trip is one that this peer does not work. Returns how many
        there are."""
        network = self._network
        network.start_directory(run_id=run.run_id, my_status=my_status)
        network.directory.on_new_address = self._remember
        for peer_id in self._answered:
            network.directory.meet(peer_id, [maddr for maddr in self._ways_in if maddr.endswith(peer_id)])
        others, _ = await asyncio.gather(self._meet(run), self._situate(run))
        publishing = join.publish_run(network.dht, run, others, network.peer_id)
        if others:  # they have published it
            self._publishing = asyncio.create_task(_quietly(publishing))
        else:
            await publishing
        return len(others)

    async def _situate(self, run: RunConfig) -> None:
        network, began = self._network, time.monotonic()
        statuses = await network.dht.statuses(run.run_id)
        public = {p: s.maddrs for p, s in statuses.items() if s.maddrs and s.reach in (reachability.PUBLIC, "")}
        first = list(public.items())[:reachability.MAX_ASKED]
        self._linking = [asyncio.ensure_future(self._link(peer_id, maddrs)) for peer_id, maddrs in first]
        if self._linking:
            await asyncio.wait(self._linking, timeout=LATE_S)
        asked = [peer_id for peer_id in public if network.endpoint.is_linked(peer_id)]
        asked = list(dict.fromkeys([*asked, *self._answered]))
        self.situation = await reachability.ask(network.endpoint, asked, port=self._port())
        network.directory.reach = self.situation.reach
        self.situated_s = time.monotonic() - began

    async def _link(self, peer_id: str, maddrs: list[str]) -> None:
        with contextlib.suppress(NetworkError):
            await self._network.endpoint.link_to(peer_id, maddrs=maddrs)

    async def _meet(self, run: RunConfig) -> list[str]:
        """Whose word has come."""
        directory = self._network.directory
        self._ask(directory.known())
        await directory.refresh()
        self._ask([peer_id for peer_id in directory.known() if peer_id not in directory.alive()])  # the DHT's alone
        deadline = asyncio.get_running_loop().time() + MEET_S
        while asyncio.get_running_loop().time() < deadline:
            if self._asking:
                await asyncio.wait(self._asking.values(), timeout=LATE_S)
            alive = directory.alive()
            if not self._answered or covers(alive.values(), run.fragments):
                break
            if alive and all(status.role == "rendezvous" for status in alive.values()):
                break
            await asyncio.sleep(0.3)
            self._ask(directory.known())  # the others, too, may have more to say by now
        for maddr in self._ways_in:  # who is silent now may come back a moment later, as in a swarm that restarts
            directory.meet(peer_id_of(maddr), [maddr])
        return list(directory.alive())

    def _ask(self, peer_ids: Iterable[str]) -> None:
        """What they have to say of themselves; who is being asked already is not asked again."""
        self._asking = {peer_id: task for peer_id, task in self._asking.items() if not task.done()}
        for peer_id in peer_ids:
            if peer_id not in self._asking:
                self._asking[peer_id] = asyncio.ensure_future(self._network.directory.tell(peer_id))

    def own_maddrs(self) -> list[str]:
        """Where others may dial this peer; none where they cannot."""
        return [] if self.situation.reach == reachability.OUTBOUND else self._network.maddrs

    def public_maddrs(self) -> list[str]:
        """Ways into the swarm for a friend, who cannot dial this peer."""
        alive = self._network.directory.alive()
        public = [s.maddrs for s in alive.values() if s.reach == reachability.PUBLIC and s.maddrs]
        return [ranked(maddrs)[0] for maddrs in public] or self._network.maddrs

    async def look_again(self) -> bool:
        """Whoever was alone at first asks once there is somebody. True: it knows more now."""
        alive = [p for p, s in self._network.directory.alive().items() if s.reach in (reachability.PUBLIC, "")]
        if self.situation.reach or not alive:
            return False
        self.situation = await reachability.ask(self._network.endpoint, alive, port=self._port())
        self._network.directory.reach = self.situation.reach
        return bool(self.situation.reach)

    def _port(self) -> int | None:
        places = [place for place in map(host_and_port, self._network.maddrs) if place is not None]
        return places[0][1] if places else None

    def _others_in(self, book: list[str]) -> list[str]:
        others = []
        for maddr in book:
            with contextlib.suppress(ConfigError):
                if peer_id_of(maddr) != self._network.peer_id:
                    others.append(maddr)
        return others

    def _remember(self, maddrs: list[str]) -> None:
        with contextlib.suppress(HomeError):  # a full disk: the address book is a convenience
            self._home.remember(maddrs)


async def _quietly(publishing: Coroutine[Any, Any, None]) -> None:
    """It is done again within the minute (participant.py)."""
    with contextlib.suppress(Exception):
        await publishing


def covers(statuses: Iterable[Status], num_fragments: int) -> bool:
    """Do these peers hold every fragment of the run between them? A newcomer that has not heard of a fragment's holders
    would take its own start for the newest state."""
    held = {fragment for status in statuses for fragment in status.held()}
    return held.issuperset(range(num_fragments))
