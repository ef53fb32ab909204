"""python -m swarm.plan: what a run needs and how it would go, before anybody starts it.

How many peers of 6, 8, 12 and 24 GB of GPU memory (or of --memory) are enough, what each of them holds, and what each
sends over the whole run, beside what data parallelism would. With lines (--line, --topology) also how fast the swarm
trains and what bounds it, how long rounds take and whether they hide, days, and money. The same planner as peers use;
no weights, no network.

    python -m swarm.plan --run peers/runs/gpt-jt.yaml
    python -m swarm.plan --run peers/runs/gpt-jt.yaml --line 40/100/30ms --gpu rtx-3090 --price-kwh 0.25
    python -m swarm.plan --run my-run.yaml --topology home-asym --replicas 2 --memory 16GB --flops 0.3T
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swarm.config import ModelConfig, RunConfig, load_run
from swarm.errors import ConfigError, SwarmError
from swarm.plan_report import lines
from swarm.train.hardware import UTILISATION
from swarm.units import format_bytes, parse_bytes, parse_count

if TYPE_CHECKING:
    from swarm.train.hardware import Computer
    from swarm.train.lines import Lines
    from swarm.train.need import Costs, Machine, Need

USUAL = ("6GB+28GB", "8GB+28GB", "12GB+28GB", "24GB+56GB")
"""GPU + main memory that a peer may take: computers with 32 and 64 GB. A GPU sold as 6 GB has 6 GiB, of which about
0.4 GB go to its context and the screen"""
MAIN_BESIDE = ((16, "28GB"), (24, "56GB"), (math.inf, "120GB"))
"""beside a GPU of up to so many GB"""
SMALLEST_BYTES = 100_000_000
REPLICAS = 4
PRICE_KWH = 0.3
"""an assumption: what homes in Europe pay, roughly, in euros"""
THIN_STEPS, THIN_BITS = 65, 2
"""what cost no quality in a run that went on from trained weights (504 times less than data parallelism)"""
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
    check(options)
    machines, found = machines_of(options), lines_of(options)
    replicas = options.replicas or min(REPLICAS, len(found) if found and len(found) > 1 else REPLICAS)
    found = found and found.first(replicas)
    run = known(load_run(options.run))
    from swarm.train.need import PUBLISHED_BYTES, PUBLISHED_DDP_BYTES, costs_of, ddp_bytes, need_of  # imports torch
    from swarm.train.place import planner_of

    if found is not None and run.averaging.mode == "sync":
        raise ConfigError(
            "speed and rounds are foretold for `local` runs only", why="a `sync` run waits for every round",
            do="leave out --line and --topology, or plan with averaging.mode: local",
        )
    costs, planner = costs_of(run), planner_of(run, on_gpu=False, main_bytes=0, gpu_bytes=0)
    needs = [need_of(planner, machine) for machine, _ in machines]
    described_machines = [
        {
            **described(need, costs, replicas=replicas),
            "outlook": found and foretold(run, costs, need, computer, found, options),
        } for need, (_, computer) in zip(needs, machines, strict=True)
    ]  # fmt: skip
    return {
        "run": run.name, "fragments": run.fragments, "replicas": replicas, "tokens": costs.total_tokens,
        "trained_parameters": costs.parameters, "adapters": run.model.lora is not None, "rounds": costs.rounds,
        "forward_bytes_per_token": costs.forward_bytes, "back_bytes_per_token": costs.back_bytes,
        "round_bytes": sum(costs.round_bytes), "lines": described_lines(found) if found else "",
        "prices": {"kwh": options.price_kwh, "gpu_hour": options.price_gpu_hour},
        "ddp_bytes": ddp_bytes(costs, replicas=replicas),
        "published": {"ddp_bytes": PUBLISHED_DDP_BYTES, "bytes": PUBLISHED_BYTES},
        "comparison": compared(run, costs, described_machines, replicas=replicas),
        "machines": described_machines,
    }  # fmt: skip


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for what can be seen without the run."""
    if options.replicas is not None and options.replicas < 1:
        raise ConfigError("--replicas must be 1 or more", why=f"got {options.replicas}")
    if options.line and options.topology:
        raise ConfigError("--line and --topology say the same thing", do="leave one of them out")
    if options.gpu and options.memory and len(options.gpu) > 1:
        raise ConfigError(
            "which GPU has which memory?", why="there are several --gpu and a --memory", do="leave --memory out"
        )
    for name in ("price_kwh", "price_gpu_hour"):
        if not 0 <= getattr(options, name) < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must not be negative", why=f"got {getattr(options, name)}")
    if not 0 < options.cores < math.inf:
        raise ConfigError("--cores must be over 0", why=f"got {options.cores}")


def machines_of(options: argparse.Namespace) -> list[tuple[Machine, Computer]]:
    """Kinds of machines, and what they compute with. Raises ConfigError."""
    from swarm.train.hardware import computer_of

    flops = None if options.flops is None else flops_of(options.flops)
    gpus = options.gpu or [None]

    def one(machine: Machine, gpu: str | None) -> tuple[Machine, Computer]:
        return machine, computer_of(
            gpu, gpu_bytes=machine.gpu_bytes, flops=flops, utilisation=options.utilisation, watts=options.watts
        )

    if options.gpu and not options.memory:
        return [one(machine_with(gpu), gpu) for gpu in gpus]
    return [one(machine_of(text), gpus[0]) for text in options.memory or USUAL]


def machine_with(gpu: str) -> Machine:
    """A computer that usually has such a GPU. Raises ConfigError."""
    from swarm.train.hardware import GIB, computer_of

    size = computer_of(gpu, gpu_bytes=0).gpu_bytes // GIB
    beside = next(main for most, main in MAIN_BESIDE if size <= most)
    return machine_of(f"{size}GB+{beside}")


def flops_of(text: str) -> float:
    """ "20T" -> 2e13. Raises ConfigError."""
    try:
        return float(parse_count(text))
    except ValueError as error:
        why, do = str(error), "write 20T for 20 TFLOP/s, say"
        raise ConfigError(f"--flops {text} cannot be understood", why=why, do=do) from None


def lines_of(options: argparse.Namespace) -> Lines | None:
    """As they were given. Raises ConfigError."""
    from swarm.train.lines import Lines, parse_line, read_topology

    if options.topology:
        return read_topology(options.topology)
    if not options.line:
        return None
    parsed = [parse_line(text) for text in options.line]
    return Lines(tuple(
        dataclasses.replace(line, name=f"{line.name} ({index + 1})") for index, line in enumerate(parsed)
    ))


def described_lines(found: Lines) -> str:
    kinds = dict.fromkeys(
        f"{line.up_bits_per_s / 1e6:g} up, {line.down_bits_per_s / 1e6:g} down" for line in found.lines
    )
    rtts = sorted({round(2e3 * found.latency_s(a, b)) for a in found.lines for b in found.lines if a is not b})
    apart = f", {rtts[0]}" + (f" to {rtts[-1]}" if len(rtts) > 1 else "") + " ms there and back" if rtts else ""
    return f"lines of {'; '.join(kinds)} Mbit/s{apart}" + (f" ({found.name})" if found.name else "")


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


def foretold(
    run: RunConfig, costs: Costs, need: Need, computer: Computer, found: Lines, options: argparse.Namespace
) -> dict[str, Any] | None:
    """None where such machines alone cannot hold the model. `found`: a line for each chain of them."""
    from swarm.averaging import outer
    from swarm.train.outlook import outlook

    if need.too_large or not need.places:
        return None
    seen = outlook(
        costs, need.places, computer, found, run.averaging, buffers=outer.num_buffers(run), cores=options.cores
    )
    slowest = min(seen.chains, key=lambda chain: chain.tokens_per_s)
    longest = max(seen.rounds, key=lambda one: one.total_s)
    sparest = min(need.places, key=lambda place: place.in_flight)
    halved = need.places[0].planner.settings.halved
    return {
        "machines": seen.machines, "computer": computer.name, "flop_per_s": computer.flop_per_s(halved=halved),
        "watts": computer.watts, "tokens_per_s": seen.tokens_per_s,
        "chains": [{"tokens_per_s": chain.tokens_per_s, "bound_by": chain.bound_by} for chain in seen.chains],
        "bound_by": slowest.bound_by, "least_in_flight": sparest.in_flight,
        **{
            f"{what}_tokens_per_s": _finite(sum(getattr(chain, what) for chain in seen.chains))
            for what in ("computing", "line", "memory")
        },
        "rounds": [{"seconds": one.total_s, **dataclasses.asdict(one)} for one in seen.rounds],
        "round_s": longest.total_s, "sending_s": longest.sending_s, "wire_bytes": longest.wire_bytes,
        "due_s": seen.due_s, "wanted_s": seen.wanted_s, "period_s": seen.period_s, "num_rounds": seen.num_rounds,
        "opened_by_time": seen.opened_by_time, "round_share": seen.round_share, "core_share": seen.core_share,
        "hidden": seen.hidden, "sent_bytes": seen.sent_bytes, "seconds": seen.seconds, "kwh": seen.kwh,
        "electricity": seen.price(per_kwh=options.price_kwh), "rent": seen.price(per_hour=options.price_gpu_hour),
    }  # fmt: skip


def compared(
    run: RunConfig, costs: Costs, machines: Sequence[dict[str, Any]], *, replicas: int
) -> list[dict[str, Any]]:
    """What is sent, beside data parallelism: GPT-JT as published, this run, its rounds as thin as they may be."""
    from swarm.train.need import PUBLISHED_BYTES, PUBLISHED_DDP_BYTES, costs_of, ddp_bytes, traffic_of

    ddp, whole = ddp_bytes(costs, replicas=replicas), (0, run.fragments)
    rows = [("GPT-JT, as published", PUBLISHED_BYTES, PUBLISHED_DDP_BYTES)] if run.name.startswith("gpt-jt") else []
    rows.append(("this run: rounds of all fragments", traffic_of(costs, whole, replicas=replicas).averaging, ddp))
    if run.averaging.mode == "local" and run.averaging.bits > THIN_BITS:
        thin = costs_of(dataclasses.replace(run, averaging=dataclasses.replace(
            run.averaging, bits=THIN_BITS, tokens_per_round=THIN_STEPS * replicas * costs.step_tokens,
            first_round_tokens=0, ramp_tokens=0,
        )))
        what = f"  with {THIN_BITS} bits, every {THIN_STEPS} steps of each peer"
        rows.append((what, traffic_of(thin, whole, replicas=replicas).averaging, ddp))
    for machine in machines:
        if len(machine["peers"]) > 1 and not machine["too_large"]:
            sent = max(peer["sent_bytes"] for peer in machine["peers"])
            rows.append((f"  rounds and stages, {machine['machine']}", sent, ddp))
    return [
        {"what": what, "bytes": sent, "ddp_bytes": plain, "times_less": plain / sent if sent else None}
        for what, sent, plain in rows
    ]  # fmt: skip


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m swarm.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", required=True, metavar="FILE", help="the run config, a YAML file")
    add(
        "--memory", nargs="+", metavar="SIZE",
        help="kinds of machines: GPU+main memory that a peer may take, such as 6GB+12GB, or main memory alone for a "
        f"peer without a GPU, such as 16GB (default: {' '.join(USUAL)})",
    )
    add("--replicas", type=int, metavar="N", help="peers that hold each fragment (4, or as many as there are lines)")
    add(
        "--line", action="append", metavar="UP/DOWN/RTT",
        help="a machine's line, as 20/100/30ms: Mbit/s up and down, and the time there and back to another peer. Once "
        "for all, or once for each peer of a fragment",
    )
    add("--topology", metavar="NAME", help="lines from a topology of the WAN lab, ready-made (home-100) or a file")
    add("--gpu", nargs="+", metavar="NAME", help="what they compute with, such as rtx-3060 (by memory)")
    add("--flops", metavar="F", help="FLOP/s that a machine gets done in training, such as 20T (by its GPU)")
    add(
        "--utilisation", type=float, default=UTILISATION, metavar="U",
        help=f"of a GPU's peak, in training ({UTILISATION})",
    )
    add("--cores", type=float, default=1.0, help="CPU cores that a peer has for its rounds (1)")
    add("--watts", type=float, help="that a machine draws (the GPU's limit and 100 W)")
    add("--price-kwh", type=float, default=PRICE_KWH, metavar="P", help=f"of electricity ({PRICE_KWH})")
    add("--price-gpu-hour", type=float, default=0.0, metavar="P", help="of a rented machine (none is rented)")
    add("--tables", action="store_true", help="what takes the memory, row by row")
    add("--json", action="store_true", help="print everything as one JSON object")
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
