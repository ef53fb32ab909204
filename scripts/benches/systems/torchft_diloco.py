"""torchft 0.2: DiLoCo (streaming, a fragment at a time) with a lighthouse that knows who takes part.

https://github.com/meta-pytorch/torchft. Every peer is a replica group of one process. What it needs beyond its
documentation: a TCPStore of its own for each group, and a host name that the others can reach. The Manager takes one,
its checkpoint server asks socket.gethostname(), so that is answered with the address, in this process only.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benches.systems import process
from benches.systems.system import Script, Setup

if TYPE_CHECKING:
    from benches.systems.workload import Workload

PORT = 29510
TIMEOUT_S = 60.0
JOIN_S = 30.0
"""that the lighthouse waits for a living peer that is not there yet; less than TIMEOUT_S, or the others give up"""
DELAY_STEPS, ALPHA = 5, 0.5
"""Streaming DiLoCo's own (https://arxiv.org/abs/2501.18512): steps that train on while a fragment travels, and how much
of them is kept beside what arrives"""
LEAVE_S = 5.0
QUIET = "RUST_LOG=warn"
"""it writes several lines a round otherwise"""
LIGHTHOUSE = Path(sys.executable).parent / "torchft_lighthouse"


class Torchft(Script):
    def available(self) -> str:
        if importlib.util.find_spec("torchft") is None:
            return 'torchft is not installed: pip install -e ".[bench]"'
        return "" if LIGHTHOUSE.exists() else f"{LIGHTHOUSE} is missing: torchft's wheel brings it"

    def helpers(self, setup: Setup, ips: list[str]) -> list[tuple[int, list[str]]]:
        lighthouse = [
            "env", QUIET, str(LIGHTHOUSE), "--bind", f"0.0.0.0:{PORT}", "--min_replicas", "1",
            "--quorum_tick_ms", "100", "--join_timeout_ms", str(round(JOIN_S * 1000)),
        ]
        return [(0, lighthouse)]


SYSTEMS = [
    Torchft(
        "torchft",
        "streaming DiLoCo on gloo, fp32 (its quantisation needs CUDA); the run's fragments, tokens a round and outer"
        f" step; delay {DELAY_STEPS} steps, alpha {ALPHA} (the paper's), one bucket a fragment; lighthouse:"
        f" min_replicas 1, join {JOIN_S:.0f} s, heartbeats 5 s (default)",
        "torchft_diloco.py",
    )
]


def steps_per_fragment(tokens_per_round: int, *, fragments: int, step_tokens: int, num_peers: int) -> int:
    """Inner steps of a peer between two fragments: all fragments once in about a round's tokens of the swarm."""
    return max(1, round(tokens_per_round / (step_tokens * num_peers * fragments)))


def fragment_modules(work: Workload) -> list[Any]:
    """The run's fragments as modules: torchft only asks them for their parameters."""
    from torch import nn

    modules = []
    for fragment in work.fragments:
        module = nn.Module()
        for tensor in fragment.tensors:
            module.register_parameter(tensor.name.replace(".", "/"), work.inner.parameters[tensor.name])
        modules.append(module)
    return modules


def main() -> None:
    options = process.parser(__doc__).parse_args()
    stop, lines = process.Stop(), process.Lines()
    ip, num_peers = options.ips[options.number], len(options.ips)
    socket.gethostname = lambda: ip  # before torchft is imported: it is the default of an argument, too
    os.environ["GLOO_SOCKET_IFNAME"] = process.interface_of(ip)
    os.environ.update([QUIET.split("=")])
    import torch
    from torch.distributed import TCPStore
    from torchft import Manager, ProcessGroupGloo
    from torchft.local_sgd import DiLoCo

    from benches.systems.workload import Workload
    from swarm.averaging.outer_settings import outer_settings

    work = Workload(options.run, number=options.number, until_tokens=options.until_tokens)
    averaging, timeout = work.run.averaging, timedelta(seconds=TIMEOUT_S)
    store = TCPStore(ip, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    group = ProcessGroupGloo(timeout=timeout)
    manager = Manager(
        pg=group, min_replica_size=1, use_async_quorum=False, timeout=timeout, quorum_timeout=timeout,
        connect_timeout=timeout, rank=0, world_size=1, store_addr=ip, store_port=store.port,
        lighthouse_addr=f"http://{options.ips[0]}:{PORT}", replica_id=f"peer-{options.number}", hostname=ip,
        init_sync=False,  # all draw the same weights from the run's seed
        load_state_dict=lambda state: _load(work, state),
        state_dict=lambda: {"model": work.model.state_dict(), "inner": work.adamw.state_dict()},
    )
    modules = fragment_modules(work)
    steps = steps_per_fragment(
        averaging.tokens_per_round, fragments=len(modules), step_tokens=work.step_tokens, num_peers=num_peers
    )
    rate, momentum = outer_settings(work.run)
    outer = [
        torch.optim.SGD(module.parameters(), lr=rate, momentum=momentum, nesterov=momentum > 0) for module in modules
    ]
    delay = min(DELAY_STEPS, steps - 1)  # it has to be shorter than the interval
    diloco = DiLoCo(
        manager, modules, work.adamw, outer, sync_every=steps * len(modules), use_bucketization=True,
        fragment_sync_delay=delay, fragment_update_alpha=ALPHA if delay else 0.0,
    )
    process.gather(options.folder, options.number, num_peers)  # or the first would commit alone what others then copy
    commits, since, reason = 0, 0, ""
    lines.ready()
    with diloco:
        while not stop.asked and not reason and lines.swarm_tokens < work.end_tokens:
            try:
                work.step(lines.swarm_tokens + since * work.step_tokens * num_peers)
            except (RuntimeError, TimeoutError) as error:  # the lighthouse or a quorum did not answer in time
                reason = f"torchft gave up: {str(error).splitlines()[0][:200]}"
                continue
            lines.tokens += work.step_tokens
            since += 1
            if manager.batches_committed() != commits:
                commits, since = manager.batches_committed(), 0
                lines.swarm_tokens = commits * steps * work.step_tokens
        diloco._restore_parameters()  # the global weights: what the last commits led to
    work.save(options.weights)
    reason = reason or ("asked to" if stop.asked else f"{lines.swarm_tokens} tokens")
    lines.left(f"{reason}; {manager.current_step()} commits")
    process.within(LEAVE_S, lambda: manager.shutdown(wait=False))
    process.exit_now()


def _load(work: Workload, state: dict[str, Any]) -> None:
    work.model.load_state_dict(state["model"])
    work.adamw.load_state_dict(state["inner"])


if __name__ == "__main__":
    main()
