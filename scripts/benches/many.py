"""Many real peers on this one machine, several to a process: do they all meet, form rounds and lose nobody?

Every peer has a libp2p daemon, sockets, a DHT node and an averager of its own (many_peers.py), and finds the others
through the first one. They learn made-up things of a tiny fragment; then they stop, and what is left goes into last
rounds. One row: how long until everybody had met everybody, rounds, how many took part in one, how long one took, and
whether in the end all agree (I1) and every token is in a commit (I2). On a small machine this measures the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import psutil
from forked import LOADED

from benches import table as tables
from swarm.errors import ConfigError, SwarmError

NAME = "many"
HELP = "64 real peers on this machine, several to a process: all meet, and rounds lose nobody"

QUICK_PEERS, QUICK_SECONDS = 8, 10.0
UP_S, SETTLE_S, STOP_S, LOOK_S = 600.0, 300.0, 60.0, 0.2
FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(LOADED)  # nobody has to import anything again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", type=int, default=64, metavar="N", help="how many (64)")
    parser.add_argument("--processes", type=int, default=8, metavar="N", help="that they share (8)")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="S", help="of learning, from then on (120)")
    parser.add_argument("--round-s", type=float, default=10.0, metavar="S", help="of learning from round to round (10)")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 4, 8, 32), help="on the wire (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the peers' identities")


class Process:
    """Some of the peers, and what they said last."""

    def __init__(self, serve: Callable[..., None], task: object) -> None:
        self.end, theirs = FORKED.Pipe()
        self.process = FORKED.Process(target=serve, args=(task, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.maddrs: list[str] = []
        self.newest: dict[int, dict[str, Any]] = {}
        self.rounds: dict[int, list[dict[str, Any]]] = defaultdict(list)

    def listen(self) -> None:
        """To what has been said meanwhile."""
        with contextlib.suppress(EOFError, OSError):
            while self.end.poll():
                said = self.end.recv()
                self.maddrs = said.get("maddrs", self.maddrs)
                for peer in said.get("peers", ()):
                    self.rounds[peer["number"]] += peer.pop("rounds")
                    self.newest[peer["number"]] = peer

    def tell(self, word: object) -> None:
        with contextlib.suppress(OSError):
            self.end.send(word)

    def usage(self) -> tuple[float, float]:
        """(CPU-seconds, bytes of memory) of it and its daemons."""
        cpu_s = memory = 0.0
        with contextlib.suppress(psutil.Error):
            here = psutil.Process(self.process.pid)
            for each in (here, *here.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    cpu_s += sum(each.cpu_times()[:2])
                    memory += each.memory_info().rss
        return cpu_s, memory

    def stop(self) -> None:
        """Once it has been told to."""
        deadline = time.monotonic() + STOP_S
        while self.process.is_alive() and time.monotonic() < deadline:
            self.listen()  # or its last words would fill the pipe, and it would wait
            self.process.join(LOOK_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises ConfigError for what cannot be measured, SwarmError where peers do not come up."""
    count, seconds = options.peers, options.seconds
    if options.quick:
        count, seconds = min(count, QUICK_PEERS), min(seconds, QUICK_SECONDS)
    if not 1 <= options.processes or not 2 <= count or not 0 < options.round_s <= 600 or seconds <= 0:
        raise ConfigError("--peers must be at least 2, --processes at least 1, --round-s 0 to 600", do="change them")
    from benches.many_peers import Task, serve  # takes seconds, which the other benchmarks need not wait

    num_processes = min(options.processes, count)
    every_s = max(0.5, options.round_s / 10)
    tokens = round(count * 100 / every_s * options.round_s)
    shares = [count * (i + 1) // num_processes - count * i // num_processes for i in range(num_processes)]
    swarm: list[Process] = []
    began = time.monotonic()
    try:
        for number, share in enumerate(shares):
            task = Task(sum(shares[:number]), share, options.seed, every_s, tokens, options.bits)
            swarm.append(Process(serve, task))
        for process in swarm:  # one after the other, or a small machine has no time for any of them
            process.tell([maddr for other in swarm for maddr in other.maddrs])
            _wait(swarm, lambda process=process: bool(process.maddrs), UP_S, "peers to come up")
        print(f"{count} peers are up after {time.monotonic() - began:.0f} s", flush=True)
        _wait(swarm, lambda: _least_known(swarm) == count - 1, UP_S, "everybody to meet everybody")
        met, (used_s, _) = time.monotonic(), _usage(swarm)
        for process in swarm:
            process.tell("learn")
        sent = sum(peer["bytes_sent"] for peer in _newest(swarm))
        print(f"everybody has met everybody after {met - began:.0f} s", flush=True)
        least_known = count
        while time.monotonic() - met < seconds:
            _listen(swarm)
            least_known = min(least_known, _least_known(swarm))
            time.sleep(LOOK_S)
        learnt_s = time.monotonic() - met
        used_later_s, memory = _usage(swarm)
        sent = sum(peer["bytes_sent"] for peer in _newest(swarm)) - sent
        for process in swarm:
            process.tell("settle")
        settled = _wait(swarm, lambda: _is_settled(_newest(swarm)), SETTLE_S, "the last rounds", must=False)
        return {
            "peers": count, "processes": num_processes, "met_s": met - began, "learnt_s": learnt_s, "settled": settled,
            "bytes_sent_per_peer_s": sent / count / learnt_s, "cores": (used_later_s - used_s) / learnt_s,
            "memory_bytes": memory, "least_known": least_known,
            **summary(_newest(swarm), [rounds for process in swarm for rounds in process.rounds.values()], since=met),
        }
    finally:
        for process in swarm:
            process.tell("stop")
        for process in swarm:
            process.stop()


def summary(
    peers: list[dict[str, Any]], rounds_of_peers: list[list[dict[str, Any]]], *, since: float
) -> dict[str, Any]:
    """Of what each peer said in the end, and of its rounds; those that ended before `since` are not counted, for not
    all had met."""
    digests, contributors = defaultdict(set), {}
    applied: dict[int, list[float]] = defaultdict(list)
    for rounds in rounds_of_peers:
        for each in rounds:
            digests[each["version"]].add(each["digest"])
            if each["at"] >= since:
                contributors[each["version"]] = each["contributors"]
                applied[each["version"]].append(each["seconds"])
    tokens = max(peer["tokens"] for peer in peers)
    trained, pending = (sum(peer[key] for peer in peers) for key in ("trained", "pending"))
    heads = {(peer["version"], peer["digest"]) for peer in peers}
    return {
        "rounds": len(contributors), "whole_rounds": sum(n == len(peers) for n in contributors.values()),
        "contributors": tables.spread(list(contributors.values())) if contributors else None,
        "round_s": tables.spread([max(taken) for taken in applied.values()]) if applied else None,
        "heads": len(heads), "truths_of_a_version": max(map(len, digests.values()), default=0),
        "trained_tokens": trained, "committed_tokens": tokens, "pending_tokens": pending,
        "lost_tokens": trained - tokens - pending,
        "left_behind": sum(peer["version"] < max(p["version"] for p in peers) for peer in peers),
    }


def _newest(swarm: list[Process]) -> list[dict[str, Any]]:
    return [peer for process in swarm for peer in process.newest.values()]


def _least_known(swarm: list[Process]) -> int:
    """Other peers that are alive to the one that knows fewest."""
    return min((peer["known"] for peer in _newest(swarm)), default=0)


def _is_settled(peers: list[dict[str, Any]]) -> bool:
    return not any(peer["pending"] for peer in peers) and len({(p["version"], p["digest"]) for p in peers}) == 1


def _usage(swarm: list[Process]) -> tuple[float, float]:
    usages = [process.usage() for process in swarm]
    return sum(cpu_s for cpu_s, _ in usages), sum(memory for _, memory in usages)


def _listen(swarm: list[Process]) -> None:
    for process in swarm:
        process.listen()
        if not process.process.is_alive():
            raise SwarmError("a process with peers has ended", why="its error is above", do="try fewer peers")


def _wait(
    swarm: list[Process], condition: Callable[[], bool], limit_s: float, what: str, *, must: bool = True
) -> bool:
    """False: it did not come about in time. Raises SwarmError where it must."""
    deadline = time.monotonic() + limit_s
    while not condition():
        _listen(swarm)
        if time.monotonic() > deadline:
            if not must:
                return False
            raise SwarmError(
                f"waited {limit_s:.0f} s for {what}",
                why=f"{len(_newest(swarm))} peers are up, and one knows only {_least_known(swarm)} others",
                do="try fewer peers, or a machine with more cores",
            )
        time.sleep(LOOK_S)
    return True


def table(result: dict[str, Any]) -> str:
    header = [
        "peers", "all met after, s", "rounds", "of all peers", "contributors", "round, s", "lost tokens",
        "left behind", "heads in the end", "least known", "kB/s a peer", "cores", "GB",
    ]
    row = [
        result["peers"], f"{result['met_s']:.0f}", result["rounds"], result["whole_rounds"],
        tables.shown(result["contributors"], digits=0), tables.shown(result["round_s"], digits=1),
        result["lost_tokens"], result["left_behind"], result["heads"],
        result["least_known"],
        f"{result['bytes_sent_per_peer_s'] / 1e3:.1f}", f"{result['cores']:.2f}", f"{result['memory_bytes'] / 1e9:.1f}",
    ]
    return tables.markdown(header, [row])
