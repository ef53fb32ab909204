"""What a model in stages does over home links: three parts, each in a file of its own.

    speed    tokens per second of four stages, against a hub and against the bound (pipeline_speed.py)
    churn    what is left of speed and work while holders of stages are killed (pipeline_churn.py)
    loss     what int8 between stages costs, and paths that change with every microbatch (pipeline_loss.py)
"""

from __future__ import annotations

import argparse
from typing import Any

from benches import options as common
from benches import pipeline_churn, pipeline_loss, pipeline_speed

NAME = "pipeline"
HELP = "a model in stages over WAN links: speed against a hub, churn, and loss"

PARTS = {"speed": pipeline_speed, "churn": pipeline_churn, "loss": pipeline_loss}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS), help="what to measure (all)")
    common.add_run(parser)
    for part in PARTS.values():
        part.add_arguments(parser)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    return {name: PARTS[name].measure(options) for name in options.part}


def table(result: dict[str, Any]) -> str:
    return "\n\n".join(f"{name}\n\n{PARTS[name].table(figures)}" for name, figures in result.items())
