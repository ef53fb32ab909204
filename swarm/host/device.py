"""Which device to train on, and how much memory this computer has left; what a run takes of it is in memory.py.

torch is the only source of truth for devices: what it cannot use does not exist. Every choice travels with its reason,
because "why is it on the CPU?" is the first thing people ask.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from swarm.errors import ConfigError
from swarm.units import format_bytes


def choose_device(name: str, threads: int) -> tuple[torch.device, str]:
    """The device for `name` (auto | cpu | cuda | cuda:N | mps) and why; sets torch's CPU threads where `threads` > 0.

    Raises ConfigError where a device was asked for that torch cannot use. "auto" never fails.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    if name == "auto":
        return _best_device()
    kind = name.partition(":")[0]
    if kind == "cpu":
        return torch.device("cpu"), f"{_cpu()} (--device {name})"
    problem, do = _cuda_problem(name) if kind == "cuda" else _mps_problem()
    if problem:
        raise ConfigError(f"--device {name} cannot be used", why=problem, do=do)
    return torch.device(name), f"{_accelerator(torch.device(name))} (--device {name})"


def available_bytes() -> int:
    """Main memory a new program can take: what the system has left, or the container's limit where that is less."""
    left = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(left, max(0, int(limit.read_text()) - int(used.read_text())))
    except (OSError, ValueError):  # no container, or "max"
        return left


def memory_line(device: torch.device | None = None) -> str:
    """ "3.1 GB of 8.2 GB free", and the same of the GPU's memory."""
    line = f"{format_bytes(available_bytes())} of {format_bytes(psutil.virtual_memory().total)} free"
    if device is not None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        line += f"; GPU {format_bytes(free)} of {format_bytes(total)} free"
    return line


def _best_device() -> tuple[torch.device, str]:
    problem, _ = _cuda_problem("cuda")
    if not problem:
        return torch.device("cuda"), f"{_accelerator(torch.device('cuda'))} (the fastest torch finds here)"
    if not _mps_problem()[0]:
        return torch.device("mps"), f"{_accelerator(torch.device('mps'))} (the fastest torch finds here)"
    return torch.device("cpu"), f"{_cpu()} ({problem})"


def _cpu() -> str:
    return f"CPU, {torch.get_num_threads()} threads"


def _accelerator(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Apple GPU"


def _cuda_problem(name: str) -> tuple[str, str]:
    """Why `name` cannot be used and what to do about it; ("", "") where it can. It is tried, not only looked up."""
    if torch.version.cuda is None and torch.version.hip is None:
        do = 'use --device auto, or install a torch with CUDA: pip install --force-reinstall "torch>=2.6,<2.14"'
        return f"torch {torch.__version__} was built without CUDA", do
    if not torch.cuda.is_available():
        return "torch finds no CUDA device", "use --device auto, or check the driver with nvidia-smi"
    count, index = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
    if index >= count:
        return f"there are {count}, cuda:0 to cuda:{count - 1}", "use one of these, or --device auto"
    try:
        torch.ones(1, device=f"cuda:{index}").add_(1).item()
    except RuntimeError as error:  # a card that is too old for this build, or held by somebody else
        return f"torch cannot compute on it: {str(error).splitlines()[0]}", "use --device auto or another card"
    return "", ""


def _mps_problem() -> tuple[str, str]:
    if not torch.backends.mps.is_available():
        return "torch finds no Apple GPU", "use --device auto"
    return "", ""
