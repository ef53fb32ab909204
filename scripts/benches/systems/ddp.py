"""torch DistributedDataParallel over gloo: the gradients of every step are averaged, the textbook way.

https://docs.pytorch.org/docs/stable/notes/ddp.html. One DDP step is one batch of each peer, and the AdamW of every
peer then does the same step on the same gradient, so the weights stay equal bit for bit. gloo all-reduces bfloat16
itself (seen with torch 2.13) and so does the documented hook, but DDP refuses it by its name where there is no NCCL.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benches.systems import process
from benches.systems.system import Script

if TYPE_CHECKING:
    from torch.distributed import TCPStore

STORE = "ddp.port"
TIMEOUT_S = 60.0
AGREE_S = 10.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DEFAULTS = "gloo, default buckets (25 MB), broadcast_buffers off; one step = one batch of each peer"

SYSTEMS = [
    Script("ddp-fp32", _DEFAULTS, "ddp.py", ("--wire", "fp32")),
    Script("ddp-bf16", f"{_DEFAULTS}; bf16_compress_hook: half the bytes", "ddp.py", ("--wire", "bf16")),
]


class Averaged:
    """The model as the inner optimizer knows it, with calls that go through DDP."""

    def __init__(self, ddp: Any) -> None:
        self._ddp = ddp
        self.device = ddp.module.device
        self.named_parameters = ddp.module.named_parameters

    def __call__(self, **inputs: Any) -> Any:
        return self._ddp(**inputs)


class AgreedEnd:
    """All ranks end after the same step, also when they are asked to while in different ones.

    A rank that just stops leaves the others in an all-reduce that waits for it. So each says which step it has begun,
    begins none until all have said it, and all go on to the newest of these. A thread waits for the signal: a handler
    in Python could not run while the main thread is inside an all-reduce.
    """

    def __init__(self, store: TCPStore, *, rank: int, num_ranks: int, num_steps: int) -> None:
        self.asked = False
        self._store, self._rank, self._num_ranks, self._last = store, rank, num_ranks, num_steps
        self._begun = 0
        self._deciding = False
        self._changed = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def begin(self) -> bool:
        """Whether there is another step."""
        with self._changed:
            self._changed.wait_for(lambda: not self._deciding)
            if self._begun >= self._last:
                return False
            self._begun += 1
            return True

    def _listen(self) -> None:
        signal.sigwait(SIGNALS)
        with self._changed:
            self.asked = self._deciding = True
            begun = self._begun
        newest = begun
        try:
            self._store.set(f"begun/{self._rank}", str(begun))
            keys = [f"begun/{rank}" for rank in range(self._num_ranks)]
            self._store.wait(keys, timedelta(seconds=AGREE_S))
            newest = max(int(self._store.get(key)) for key in keys)
        except RuntimeError:
            pass  # somebody is gone, or was not asked: the others will see that we have left
        with self._changed:
            self._last = min(self._last, newest)
            self._deciding = False
            self._changed.notify_all()


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # before there are threads, which inherit it
    made = process.parser(__doc__)
    made.add_argument("--wire", choices=["fp32", "bf16"], required=True, help="what travels")
    options = made.parse_args()
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    from benches.systems.workload import Workload
    from swarm.train.inner import InnerOptimizer

    rank, num_ranks, timeout = options.number, len(options.ips), timedelta(seconds=TIMEOUT_S)
    os.environ["GLOO_SOCKET_IFNAME"] = process.interface_of(options.ips[rank])  # its address is the one announced
    lines = process.Lines()
    work = Workload(options.run, number=rank, until_tokens=options.until_tokens)
    port = 0 if rank == 0 else int(process.published(options.folder / STORE))
    store = dist.TCPStore(
        options.ips[0], port, num_ranks, is_master=rank == 0, timeout=timeout, wait_for_workers=False
    )
    if rank == 0:
        process.publish(options.folder / STORE, str(store.port))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    warnings.filterwarnings("ignore", message="`broadcast_buffers`")  # its new name is not in all torch versions
    ddp = DistributedDataParallel(work.model, broadcast_buffers=False)
    if options.wire == "bf16":
        # in a lambda, because DDP goes by the hook's name; and it would not take annotations that are strings
        ddp.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    work.inner = InnerOptimizer(Averaged(ddp), work.fragments, work.run)  # type: ignore[arg-type]
    swarm_step_tokens = work.step_tokens * num_ranks
    end = AgreedEnd(
        store, rank=rank, num_ranks=num_ranks, num_steps=math.ceil(work.end_tokens / swarm_step_tokens)
    )
    lines.ready()
    reason = ""
    while not reason and end.begin():
        try:
            work.step(lines.swarm_tokens)
        except RuntimeError as error:  # from the all-reduce, before the step: the weights are those of the last one
            reason = f"a peer is gone, or silent for {TIMEOUT_S:.0f} s: {str(error).splitlines()[0][:200]}"
        else:
            lines.tokens += work.step_tokens
            lines.swarm_tokens += swarm_step_tokens
    work.save(options.weights)
    if not reason:  # who closes its sockets while another still reads would spoil that one's last step
        process.within(AGREE_S, dist.barrier)
    lines.left(reason or ("asked to" if end.asked else f"{lines.swarm_tokens} tokens"))
    process.exit_now()  # destroying a group that has lost a peer may wait for it


if __name__ == "__main__":
    main()
