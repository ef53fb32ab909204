"""hivemind.Optimizer 1.1 with local updates: peers train on their own and average their parameters once an epoch.

https://learning-at-home.readthedocs.io/en/latest/modules/optim.html. An epoch is as many tokens of the swarm as a
round of the product has. The first peer writes its addresses to a file in the swarm's folder, and the others wait for
it: a laboratory's hosts share their disk. 8-bit codecs are not used: with numpy 2.4 hivemind 1.1.12 fails in them and
says nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benches.systems import process
from benches.systems.system import Script

if TYPE_CHECKING:
    from benches.systems.workload import Workload

MADDRS = "hivemind.maddrs"
MATCHMAKING_S = 3.0
TIMEOUT_S = 60.0
"""without timeouts a silent peer stops the others for ever"""
CHUNK_S = 30.0
"""of silence within an all-reduce; the default is the time for matchmaking, which a thin link can exceed"""
LINGER_S = 3.0
"""others may still be fetching from us what ends the last round; without it they would go on alone, for ever"""
SHUTDOWN_S = 15.0
PR_SET_PDEATHSIG = 1


class Hivemind(Script):
    def available(self) -> str:
        return "" if importlib.util.find_spec("hivemind") else "hivemind is not installed"


SYSTEMS = [
    Hivemind(
        "hivemind",
        f"use_local_updates, fp16, epoch = a round's tokens, matchmaking {MATCHMAKING_S:.0f} s (local runs: 3-5),"
        " target_group_size = peers (no waiting once all are there), averaging in the foreground",
        "hivemind_optimizer.py",
    )
]


class Contributions:
    """Whose tokens are in an average. A peer's count goes to the others with the round itself (`gather`)."""

    def __init__(self) -> None:
        self.averaged = 0
        """own tokens in averages"""
        self.pending = 0
        """own tokens since the last one"""
        self.rounds = 0
        self.failures = 0
        self._known: dict[str, int] = {}

    def offered(self) -> int:
        return self.averaged + self.pending

    def succeeded(self, counts: dict[str, int], mine: int) -> None:
        self.rounds += 1
        self.pending -= mine - self.averaged
        self.averaged = mine
        for peer, count in counts.items():
            self._known[peer] = max(count, self._known.get(peer, 0))

    def lost(self) -> None:
        """The peer fell behind and took over another's weights: what it did since the last average is gone."""
        self.pending = 0

    @property
    def swarm_tokens(self) -> int:
        return sum(self._known.values())


def counting_averager(base: Any, books: Contributions) -> Any:
    """hivemind's averager, except that it says which rounds really averaged. hivemind itself only logs it."""

    class Counting(base):  # type: ignore[misc]
        def schedule_step(self, *arguments: Any, **options: Any) -> Any:
            self.offer = books.offered()
            return super().schedule_step(*arguments, **{**options, "gather": self.offer})

        def _do(
            self, trigger: Any, optimizer_step: bool, zero_grad: bool, averaging_round: bool, control: Any, *rest: Any,
            **options: Any,
        ) -> None:
            if not averaging_round:
                super()._do(trigger, optimizer_step, zero_grad, False, control, *rest, **options)
                return
            before = [tensor.detach().clone() for tensor in self._local_tensors()]
            if control is None or control.triggered or control.done():
                control = self.schedule_step(timeout=options.get("timeout"))
            offer = self.offer
            super()._do(trigger, optimizer_step, zero_grad, True, control, *rest, **options)
            try:
                gathered = control.result(timeout=0)
            except Exception:
                gathered = {}
            # A group is no proof: a part whose reducer failed silently stays as it was
            with self.get_tensors() as after:
                complete = all(bool((a != b).any()) for a, b in zip(after, before, strict=True))
            if len(gathered) > 1 and complete:
                books.succeeded({str(peer): count for peer, count in gathered.items()}, offer)
            else:
                books.failures += 1

        def load_state_from_peers(self, **options: Any) -> Any:
            books.lost()
            return super().load_state_from_peers(**options)

    return Counting


def product_step(work: Workload, rate: Callable[[], float]) -> Any:
    """The inner optimizer in the shape that hivemind wants: clipping and schedule are a part of its step."""
    import torch

    class ProductStep(torch.optim.Optimizer):
        def __init__(self) -> None:  # not super's: parameters and state are AdamW's
            pass

        param_groups = property(lambda self: work.adamw.param_groups)  # type: ignore[assignment]
        state = property(lambda self: work.adamw.state)  # type: ignore[assignment]

        def step(self, closure: Any = None) -> None:
            work.take_step(rate())

        def zero_grad(self, set_to_none: bool = True) -> None:
            work.adamw.zero_grad(set_to_none)

        def state_dict(self) -> dict[str, Any]:
            return work.adamw.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            work.adamw.load_state_dict(state_dict)

    return ProductStep()


def main() -> None:
    options = process.parser(__doc__).parse_args()
    try:
        run(options)
    except BaseException:
        traceback.print_exc()
        _end_children()
        os._exit(1)


def run(options: argparse.Namespace) -> None:
    stop, lines, books = process.Stop(), process.Lines(), Contributions()
    os.register_at_fork(after_in_child=_in_child)
    import hivemind
    import hivemind.optim.optimizer as optim

    from benches.systems.workload import Workload

    dht = _dht(hivemind, options.folder / MADDRS, options.ips[options.number], first=options.number == 0)
    work = Workload(options.run, number=options.number, until_tokens=options.until_tokens)
    optim.TrainingStateAverager = counting_averager(optim.TrainingStateAverager, books)
    started = False

    def rate() -> float:  # hivemind takes a step of its own to fill AdamW's state: not one that decays weights
        return work.rate(books.swarm_tokens + books.pending * len(options.ips)) if started else 0.0

    length = work.run.train.sequence_length
    optimizer = optim.Optimizer(
        dht=dht, run_id="bench", optimizer=product_step(work, rate), use_local_updates=True,
        batch_size_per_step=work.run.train.batch_sequences,
        target_batch_size=max(1, round(work.run.averaging.tokens_per_round / length)),
        matchmaking_time=MATCHMAKING_S, averaging_timeout=TIMEOUT_S, allreduce_timeout=TIMEOUT_S,
        next_chunk_timeout=CHUNK_S, load_state_timeout=TIMEOUT_S,
        # in the background it gains nothing: with local updates the next step waits for it all the same
        delay_state_averaging=False,
        state_averaging_compression=hivemind.compression.Float16Compression(),
        averager_opts={"target_group_size": len(options.ips)},
    )
    started = True
    stop.listen()  # the averager has made this process ignore Ctrl+C
    lines.ready()
    while not stop.asked and lines.swarm_tokens < work.end_tokens:
        work.gradients()
        books.pending += work.step_tokens
        optimizer.step()
        lines.tokens += work.step_tokens
        lines.swarm_tokens = books.swarm_tokens
    work.save(options.weights)
    if not stop.asked:
        time.sleep(LINGER_S)
    process.within(SHUTDOWN_S, optimizer.shutdown)
    process.within(SHUTDOWN_S, dht.shutdown)
    _end_children()
    how = "asked to" if stop.asked else f"{lines.swarm_tokens} tokens"
    lines.left(f"{how}; {books.rounds} rounds averaged, {books.failures} did not")
    process.exit_now()


def _dht(hivemind: Any, file: Path, ip: str, *, first: bool) -> Any:
    """Started before torch is busy: it forks."""
    initial = [] if first else process.published(file).split()
    dht = hivemind.DHT(initial_peers=initial, host_maddrs=[f"/ip4/{ip}/tcp/0"], start=True)
    if first:
        process.publish(file, "\n".join(str(maddr) for maddr in dht.get_visible_maddrs()))
    return dht


def _in_child() -> None:
    """In the DHT's and the averager's process: end when asked to, and when this peer is killed (Linux)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_children() -> None:
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=SHUTDOWN_S)
    for pid in (os.getpid(), *(child.pid for child in children)):  # shared tensors outlive all who shared them
        for file in Path("/dev/shm").glob(f"torch_{pid}_*"):
            file.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
