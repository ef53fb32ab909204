"""Networking off: what one peer trains when nobody else is there. Everything else is measured against it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benches.systems import process
from benches.systems.system import Script

SYSTEMS = [Script("alone", "networking off: the same model, text, inner optimizer and one thread", "alone.py")]


def main() -> None:
    options = process.parser(__doc__).parse_args()
    stop, lines = process.Stop(), process.Lines()
    from benches.systems.workload import Workload

    work = Workload(options.run, number=options.number, until_tokens=options.until_tokens)
    lines.ready()
    while not stop.asked and lines.tokens < work.end_tokens:
        work.step(lines.tokens)
        lines.tokens += work.step_tokens
        lines.swarm_tokens = lines.tokens
    work.save(options.weights)
    lines.left("asked to" if stop.asked else f"{lines.tokens} tokens")


if __name__ == "__main__":
    main()
