"""The product itself: `python -m swarm.peer`, as a friend would start it."""

from __future__ import annotations

import sys
from pathlib import Path

from benches.systems.system import THREADS, Setup, run_file

PORT = 31337
"""and upwards: the peers of a loopback swarm share one address"""


class Ours:
    name = "swarm"
    settings = "as shipped: the run's own bits, rounds and outer step"

    def available(self) -> str:
        return ""

    def helpers(self, setup: Setup, ips: list[str]) -> list[tuple[int, list[str]]]:
        return []

    def command(self, setup: Setup, number: int, ips: list[str], join: list[str]) -> list[str]:
        start = ["--new-swarm", "--run", str(run_file(setup))] if number == 0 else ["--initial-peers", *join]
        until = [] if setup.until_tokens is None else ["--until-tokens", str(setup.until_tokens)]
        return [
            sys.executable, "-m", "swarm.peer", "--ui", "json", "--home", str(self._home(setup, number)),
            "--threads", str(THREADS), "--listen", f"/ip4/{ips[number]}/tcp/{PORT + number}", *start, *until,
        ]

    def weights(self, setup: Setup, number: int) -> Path:
        """The global weights of the newest checkpoint in its home, written out like everybody's."""
        from benches.systems.workload import save_weights
        from swarm.asking.states import from_home

        home = self._home(setup, number)
        held = from_home(home, say=lambda text: print(text, file=sys.stderr)).load()
        file = setup.folder / f"weights-{number}.safetensors"
        save_weights(held.model, file)
        return file

    def _home(self, setup: Setup, number: int) -> Path:
        return setup.folder / f"peer-{number}"


SYSTEMS = [Ours()]
