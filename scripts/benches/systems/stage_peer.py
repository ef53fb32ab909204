"""The product's peer with other parts in it, for `bench.py pipeline`: stage_peer.py FLAGS -- FLAGS OF swarm.peer

What is changed: how long computing takes (emulated.py), on request how microbatches travel (hub.py), and what is told.
Besides the product's own JSON lines it prints, with the monotonic clock's time `at`:

    {"event": "done", "number": N, "path": [[peer, start, end], ...]}     one of its own; these peers' gradients count
    {"event": "committed", "origin": P, "number": N, "start": A, "end": B}     it has added up its gradients of one
    {"event": "rerouted", "failed": P, "noticed_at": T, "asked": P}     another peer was asked, and has answered
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benches.systems.emulated import Calibrated, Emulated, Padded, Times
from benches.systems.hub import Hub
from benches.systems.hub import serve as serve_hub
from swarm import peer
from swarm.errors import NetworkError, PeerRefused
from swarm.pipeline import calls
from swarm.pipeline.chain import Chain
from swarm.pipeline.messages import Gradient, Hop, Verdict
from swarm.pipeline.onward import Handover
from swarm.pipeline.origin import Origin
from swarm.pipeline.routing import Holder
from swarm.train import serving


def tell(event: str, **values: Any) -> None:
    """One write, so that the product's own lines are not torn; nothing is lost when this process is killed."""
    line = json.dumps({"event": event, "at": round(time.monotonic(), 4), **values})
    os.write(sys.stdout.fileno(), line.encode() + b"\n")


class ToldOrigin(Origin):
    def _verdicts(self, number: int, answer: Gradient) -> dict[str, list[Verdict]]:
        path = [[hop.peer_id, hop.start, hop.end] for hop in answer.path]
        tell("done", number=number, path=path, credit=self.credit.now)
        return super()._verdicts(number, answer)


class ToldChain(Chain):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._failures: dict[Hashable, tuple[str, float]] = {}
        self._ask = self.onward.ask
        self.onward.ask = self._ask_and_tell  # type: ignore[method-assign]

    async def _ask_and_tell(
        self, here: Holder, going: Handover, body: bytes, known: list[Hop]
    ) -> tuple[Gradient, bytes]:
        key = going.microbatch.key
        try:
            answer = await self._ask(here, going, body, known)
        except PeerRefused:
            raise
        except NetworkError:
            self._failures.setdefault(key, (here.peer_id, time.monotonic()))
            raise
        if key in self._failures:
            failed, noticed_at = self._failures.pop(key)
            tell("rerouted", failed=failed, noticed_at=round(noticed_at, 4), asked=here.peer_id)
        return answer


def told(compute: type[Any], times: Times) -> type[Any]:
    """That kind of computing, at that speed, whose commits are told."""

    class Told(compute):
        def commit(self, key: Hashable) -> None:
            fragments = sorted(self._pending[key].gradients)
            super().commit(key)
            if isinstance(key, tuple) and len(key) == 3:  # the chain's; the hub's need no books
                tell("committed", origin=key[0], number=key[1], start=fragments[0], end=fragments[-1] + 1)

    Told.times = times
    return Told


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--forward-s", type=float, required=True, metavar="S", help="of a microbatch, a fragment")
    made.add_argument("--backward-s", type=float, required=True, metavar="S")
    made.add_argument("--emulate", action="store_true", help="compute nothing; else compute, and sleep for the rest")
    made.add_argument("--hub", type=int, nargs="+", metavar="W", help="hub and spoke, so many microbatches under way")
    made.add_argument("--each-s", type=float, default=10.0, metavar="S", help="of each of these")
    return made


def install(options: argparse.Namespace) -> None:
    """Put the parts in."""
    times = Times(options.forward_s, options.backward_s)
    parts: Any = serving
    parts.StageCompute = told(Emulated if options.emulate else Padded, times)
    parts.Chain, parts.Origin = ToldChain, ToldOrigin
    if options.emulate:
        parts.WorkQueue = Calibrated
    if options.hub:
        Hub.in_flight, Hub.each_s = options.hub, options.each_s
        Hub.on_done = staticmethod(  # type: ignore[method-assign, assignment]
            lambda number, in_flight: tell("done", number=number, path=[], credit=in_flight)
        )
        parts.Origin = Hub
        calls.serve = serve_hub


def main(arguments: list[str]) -> int:
    split = arguments.index("--")
    install(parser().parse_args(arguments[:split]))
    return peer.main(arguments[split + 1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
