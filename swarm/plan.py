"""python -m swarm.plan: what a run needs, before anybody starts it.

How many peers of 6, 8, 12 and 24 GB of GPU memory (or of --memory) are enough, what each of them holds, and what each
sends over the whole run, beside what data parallelism would. The same planner as peers use; no weights, no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swarm.config import ModelConfig, RunConfig, load_run
from swarm.errors import ConfigError, SwarmError
from swarm.units import format_bytes, format_count, parse_bytes

if TYPE_CHECKING:
    from swarm.train.need import Costs, Machine, Need

USUAL = ("6GB+28GB", "8GB+28GB", "12GB+28GB", "24GB+56GB")
"""GPU + main memory that a peer may take: computers with 32 and 64 GB. A GPU sold as 6 GB has 6 GiB, of which about
0.4 GB go to its context and the screen"""
SMALLEST_BYTES = 100_000_000
KNOWN: dict[str, dict[str, Any]] = {
    "eleutherai/gpt-j-6b": {
        "model_type": "gptj", "n_layer": 28, "n_embd": 4096, "n_head": 16, "rotary_dim": 64, "n_positions": 2048,
        "vocab_size": 50400, "bos_token_id": 50256, "eos_token_id": 50256, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""shapes that need not be asked for on the hub"""


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    try:
        result = plan(options)
    except SwarmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(result) if options.json else "\n".join(lines(result, tables=options.tables)))
    return 0


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as plain data. Raises ConfigError."""
    if options.replicas < 1:
        raise ConfigError("--replicas must be 1 or more", why=f"got {options.replicas}")
    machines = [machine_of(text) for text in options.memory or USUAL]
    run = known(load_run(options.run))
    from swarm.train.need import PUBLISHED_BYTES, PUBLISHED_DDP_BYTES, costs_of, ddp_bytes, need_of  # imports torch
    from swarm.train.place import planner_of

    costs, planner = costs_of(run), planner_of(run, on_gpu=False, main_bytes=0, gpu_bytes=0)
    needs = [need_of(planner, machine) for machine in machines]
    return {
        "run": run.name, "fragments": run.fragments, "replicas": options.replicas, "tokens": costs.total_tokens,
        "trained_parameters": costs.parameters, "adapters": run.model.lora is not None, "rounds": costs.rounds,
        "forward_bytes_per_token": costs.forward_bytes, "back_bytes_per_token": costs.back_bytes,
        "round_bytes": sum(costs.round_bytes),
        "ddp_bytes": ddp_bytes(costs, replicas=options.replicas),
        "published": {"ddp_bytes": PUBLISHED_DDP_BYTES, "bytes": PUBLISHED_BYTES},
        "machines": [described(need, costs, replicas=options.replicas) for need in needs],
    }  # fmt: skip


def known(run: RunConfig) -> RunConfig:
    """The run with its model's shape written out, where we know it: the hub need not be reached for a plan."""
    shape = KNOWN.get((run.model.source or "").lower())
    if shape is None:
        return run
    return dataclasses.replace(run, model=ModelConfig(config=shape, lora=run.model.lora))


def machine_of(text: str) -> Machine:
    """ "6GB+12GB": GPU and main memory; "16GB": of a machine that computes on its CPU. Raises ConfigError."""
    from swarm.train.need import Machine

    gpu, plus, main = text.rpartition("+")
    try:
        sizes = parse_bytes(gpu) if plus else 0, parse_bytes(main)
    except ValueError as error:
        raise ConfigError(
            f"--memory {text} cannot be understood", why=str(error),
            do="give GPU+main memory, such as 6GB+12GB, or main memory alone for a peer without a GPU, such as 16GB",
        ) from None
    if min(sizes[not plus:]) < SMALLEST_BYTES:
        raise ConfigError(
            f"--memory {text} is too little for anything", why=f"the program itself takes {format_bytes(750_000_000)}",
            do="give a unit, as in 6GB+12GB",
        )
    name = f"{format_bytes(sizes[0])} GPU, {format_bytes(sizes[1])} main" if plus else f"CPU, {format_bytes(sizes[1])}"
    return Machine(name, sizes[1], sizes[0])


def described(need: Need, costs: Costs, *, replicas: int) -> dict[str, Any]:
    from swarm.train.need import traffic_of

    peers = []
    for place in need.places:
        traffic = traffic_of(costs, place.part, replicas=replicas)
        peers.append({
            "fragments": list(place.part), "settings": place.planner.settings.text, "in_flight": place.in_flight,
            "gpu_bytes": place.plan.gpu_bytes, "main_bytes": place.plan.main_bytes, "table": place.plan.table(),
            "averaging_bytes": traffic.averaging, "pipeline_bytes": traffic.pipeline, "sent_bytes": traffic.total,
        })  # fmt: skip
    return {
        "machine": need.machine.name, "main_bytes": need.machine.main_bytes, "gpu_bytes": need.machine.gpu_bytes,
        "peers": peers, "too_large": list(need.too_large), "short_of": need.short_of,
    }  # fmt: skip


def lines(result: dict[str, Any], *, tables: bool = False) -> list[str]:
    """For people."""
    what = "adapters of" if result["adapters"] else "weights:"
    found = [
        f"{result['run']}: {what} {format_count(result['trained_parameters'])} parameters in {result['fragments']} "
        f"fragments, {format_count(result['tokens'])} tokens, {result['rounds']} rounds of each fragment", "",
        "Enough to hold every fragment once:",
    ]  # fmt: skip
    for machine in result["machines"]:
        peers = machine["peers"]
        others = f", and others for {_listed(machine['too_large'])}" if machine["too_large"] else ""
        enough = f"{_count(len(peers), 'peer')}{others}" if peers else "too little for any fragment"
        found.append(f"  {machine['machine']}: {enough}")
        for same in _grouped(peers):
            one = same[0]
            held = "{}:{}".format(one["fragments"][0], same[-1]["fragments"][1])
            each = one["fragments"][1] - one["fragments"][0]
            who = held if len(same) == 1 else f"{held}, {_count(each, 'fragment')} each"
            needs = f"{format_bytes(one['gpu_bytes'])} GPU, " if one["gpu_bytes"] else ""
            found.append(
                f"    {who}: {needs}{format_bytes(one['main_bytes'])} main, "
                f"{_count(one['in_flight'], 'microbatch')} at once, "
                f"sends {format_bytes(max(peer['sent_bytes'] for peer in same))} in all "
                f"({format_bytes(one['averaging_bytes'])} rounds, {format_bytes(one['pipeline_bytes'])} stages)"
            )
            found += [f"      {one['settings']}", *(_indented(one["table"]) if tables else [])]
        if machine["too_large"] and (tables or not peers):
            found += [f"    fragment {machine['too_large'][0]} alone would take", *_indented(machine["short_of"])]
    published = [
        f"  GPT-JT, as published          {format_bytes(result['published']['ddp_bytes'])} with data parallelism, "
        f"{format_bytes(result['published']['bytes'])} as it was trained",
    ] if result["run"].startswith("gpt-jt") else []
    return [
        *found, "",
        "Sent by a machine in the whole run, with "
        f"{_count(result['replicas'], 'peer')} for each fragment (as much comes in):",
        f"  a round of the whole model    {format_bytes(result['round_bytes'])} a contribution",
        f"  between stages                {result['forward_bytes_per_token']:.0f} bytes a token on, "
        f"{result['back_bytes_per_token']:.0f} back",
        f"  data parallelism in bf16      {format_bytes(result['ddp_bytes'])}, of what is trained here",
        *published,
    ]  # fmt: skip


def _grouped(peers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbours that hold as much in the same way are one line, with the first one's figures."""
    groups: list[list[dict[str, Any]]] = []
    for peer in peers:
        def kind(one: dict[str, Any]) -> tuple[Any, ...]:
            return one["fragments"][1] - one["fragments"][0], one["settings"], one["main_bytes"], one["gpu_bytes"]

        if groups and kind(groups[-1][0]) == kind(peer):
            groups[-1].append(peer)
        else:
            groups.append([peer])
    return groups


def _indented(text: str) -> list[str]:
    return [f"      | {line}" for line in text.splitlines()]


def _count(number: int, what: str) -> str:
    plural = what + ("es" if what.endswith("ch") else "s")
    return f"{number} {what if number == 1 else plural}"


def _listed(fragments: list[int]) -> str:
    shown = ", ".join(map(str, fragments[:6])) + (" ..." if len(fragments) > 6 else "")
    return f"fragment{'' if len(fragments) == 1 else 's'} {shown}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m swarm.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, metavar="FILE", help="the run config, a YAML file")
    parser.add_argument(
        "--memory", nargs="+", metavar="SIZE",
        help="kinds of machines: GPU+main memory that a peer may take, such as 6GB+12GB, or main memory alone for a "
        f"peer without a GPU, such as 16GB (default: {' '.join(USUAL)})",
    )
    parser.add_argument("--replicas", type=int, default=4, metavar="N", help="peers that hold each fragment (4)")
    parser.add_argument("--tables", action="store_true", help="what takes the memory, row by row")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    return parser


if __name__ == "__main__":
    from swarm.peer import quiet_libraries

    quiet_libraries(False)
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
