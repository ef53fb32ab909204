"""A model that fits on none of its peers, trained by four of them: each one's peak of memory against its plan.

0.7 B parameters of GPT-J's shape, random weights, four peers on loopback with 4 GB each and a quarter of the blocks.
Some inner steps go through the chain, and rounds of what they changed follow. The peak is VmHWM of the peer's own
process as Linux keeps it (p2pd, 30 MB, is another process), and of the GPU, with --device cuda, what nvidia-smi counts
for it: the CUDA context and the program on it are in there (some 0.5 GB), which the plan leaves to the system. Inner
steps are of one sequence, and the outer step is without momentum: with more sequences, sums of gradients come on top,
with momentum 4 bytes a parameter.

Three of the kinds of stage that GPT-J-6B makes, on a GPU; and adapters on a frozen base in nf4:

    --device cuda --blocks 8 --width 4096 --vocabulary 50400 --sequence 2048 --stages 0:2 2:6 6:8 --max-memory 28GB
    --weights bf16 --optimizer-bits 8      or: --lora
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_swarm import LocalPeer, LocalSwarm

from swarm.config import PeerConfig, RunConfig, load_run
from swarm.errors import ConfigError, SwarmError
from swarm.train.place import choose
from swarm.units import format_bytes, parse_bytes

NAME = "memory"
HELP = "a model that fits on no peer: peak memory of each against its plan"
PEERS = 4
HEAD, GPTJ_HEAD, GPTJ_WIDTH = 64, 256, 4096
"""values of an attention head; as in GPT-J, where the model is as wide"""
START_S, STEP_S = 1200.0, 300.0
LOOK_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-memory", default="4GB", help="of each peer (4GB)")
    parser.add_argument("--device", default="cpu", help="of each peer; several can share a GPU (cpu)")
    parser.add_argument("--weights", default="auto", choices=("auto", "bf16", "fp32"), help="of each peer (auto)")
    parser.add_argument("--optimizer-bits", default="auto", choices=("auto", "8", "32"), help="of each peer (auto)")
    parser.add_argument("--stages", nargs="+", metavar="A:B", help="fragments of each peer (four equal parts)")
    parser.add_argument("--lora", action="store_true", help="train adapters only, on a frozen base in nf4")
    parser.add_argument("--vocabulary", type=int, default=257, help="rows of the embedding and of the head (257)")
    parser.add_argument("--blocks", type=int, default=56, help="of the model, a fragment each (56)")
    parser.add_argument("--width", type=int, default=1024, help="of the hidden states (1024)")
    parser.add_argument("--sequence", type=int, default=96, help="tokens of a sequence (96)")
    parser.add_argument("--steps", type=int, default=3, help="inner steps, each of one sequence (3)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.blocks, options.width, options.max_memory = 8, 64, "1GB"
    with tempfile.TemporaryDirectory(prefix="swarm-memory-") as name:
        folder = Path(name)
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(document(options)))
        run, limit = load_run(file), parse_bytes(options.max_memory)
        said: dict[int, str] = {}

        def hear(peer: LocalPeer, event: dict[str, Any]) -> None:
            if event["event"] == "check" and event["name"] == "memory":
                said[peer.number] = event["text"]

        with LocalSwarm(folder, on_event=hear) as swarm:
            peers = _train(swarm, file, run, options)
    for number, peer in enumerate(peers):
        told = said[number]
        peer |= {"plan": planned_bytes(told), "gpu_plan": planned_bytes(told, "GPU memory"), "table": told}
    return {
        "limit_bytes": limit, "whole": whole_plan(run, limit), "steps": options.steps, "peers": peers,
        "tokens_a_step": options.sequence, "device": options.device,
    }  # fmt: skip


def document(options: argparse.Namespace) -> dict[str, Any]:
    """The run config: a round of each fragment after each two steps."""
    heads = max(1, options.width // (GPTJ_HEAD if options.width >= GPTJ_WIDTH else HEAD))
    model = {
        "model_type": "gptj", "n_layer": options.blocks, "n_embd": options.width, "n_head": heads, "rotary_dim": 32,
        "n_positions": options.sequence, "vocab_size": options.vocabulary, "bos_token_id": 256, "eos_token_id": 256,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    return {
        "name": "memory", "model": {"config": model} | ({"lora": {"rank": 16}} if options.lora else {}),
        "data": {"stdlib": True}, "fragments": options.blocks,
        "train": {"sequence_length": options.sequence, "batch_sequences": 1, "learning_rate": 1e-4,
                  "total_tokens": 10**9},
        "averaging": {"tokens_per_round": 2 * options.sequence, "max_round_s": 3600.0, "outer_learning_rate": 1.0,
                      "outer_momentum": 0.0},
    }  # fmt: skip


def whole_plan(run: RunConfig, limit_bytes: int) -> dict[str, Any]:
    """What the whole model would take, as sparing as can be, and whether it fits."""
    config = PeerConfig(fragments=f"0:{run.fragments}", max_memory=limit_bytes, weights="bf16", optimizer_bits="8")
    try:
        place = choose(run, config, device=torch.device("cpu"), statuses={}, peer_id="nobody")
    except SwarmError as error:
        return {"fits": False, "table": error.why.strip()}
    return {"fits": True, "table": place.plan.table()}


def parts_of(options: argparse.Namespace, num_fragments: int) -> list[tuple[int, int]]:
    """Fragments [first, end) of each peer. Raises ConfigError where --stages does not say it."""
    if options.stages is None:
        each = num_fragments // PEERS
        return [(n * each, (n + 1) * each if n < PEERS - 1 else num_fragments) for n in range(PEERS)]
    found = []
    for text in options.stages:
        first, _, end = text.partition(":")
        if not (first.isdigit() and end.isdigit() and int(first) < int(end) <= num_fragments):
            raise ConfigError(f"--stages: {text!r} is not A:B", why=f"there are fragments 0:{num_fragments}")
        found.append((int(first), int(end)))
    return found


def _train(swarm: LocalSwarm, file: Path, run: RunConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    parts = parts_of(options, run.fragments)
    mine = [
        "--max-memory", options.max_memory, "--device", options.device, "--weights", options.weights,
        "--optimizer-bits", options.optimizer_bits,
    ]
    peaks, gpu_peaks = [0] * len(parts), [0] * len(parts)
    stepped: list[tuple[float, float]] = []
    """(time, tokens that all fragments have seen together)"""

    def look() -> None:
        on_gpu = {} if options.device == "cpu" else gpu_bytes()
        for peer in swarm.running():
            peaks[peer.number] = max(peaks[peer.number], peak_bytes(peer.process.pid))
            gpu_peaks[peer.number] = max(gpu_peaks[peer.number], on_gpu.get(peer.process.pid, 0))
        tokens = sum(peer.last("progress", "tokens") for peer in swarm.peers)
        if tokens and (not stepped or tokens > stepped[-1][1]):
            stepped.append((time.monotonic(), tokens))

    ways: list[str] = []
    for number, (first, end) in enumerate(parts):
        how = ["--initial-peers", *ways] if ways else ["--new-swarm", "--run", str(file)]
        peer = swarm.start_peer(*how, "--fragments", f"{first}:{end}", *mine)
        swarm.wait_for(lambda peer=peer: "ready" in peer.newest, timeout_s=START_S, what=f"peer {number} to be ready")
        ways = ways or [maddr for maddr in peer.last("ready", "maddrs", []) if "127.0.0.1" in maddr][:1]
        look()
    print(f"  all {len(parts)} peers are ready: {options.steps} steps", flush=True)
    began, deadline = time.monotonic(), time.monotonic() + STEP_S * options.steps + START_S
    wanted = [options.steps * options.sequence * (end - first) / run.fragments for first, end in parts]
    looked = 0.0
    while not all(_is_done(peer, tokens) for peer, tokens in zip(swarm.peers, wanted, strict=True)):
        swarm.wait_for(lambda: swarm.pump() or True, timeout_s=60.0, what="a word from the peers")
        if time.monotonic() - looked > LOOK_S:
            looked = time.monotonic()
            look()
        if looked > deadline:
            raise SwarmError(f"the peers did not train {options.steps} steps within {looked - began:.0f} s")
    look()
    seconds = time.monotonic() - began
    return [
        {
            "fragments": f"{first}:{end}",
            "peak_bytes": peaks[peer.number], "gpu_peak_bytes": gpu_peaks[peer.number],
            "tokens_per_s": round(speed(stepped), 1), "tokens": peer.last("progress", "tokens"),
            "rounds": len(peer.digests), "loss": peer.last("progress", "loss"), "seconds": round(seconds, 1),
        } for peer, (first, end) in zip(swarm.peers, parts, strict=True)
    ]  # fmt: skip


def _is_done(peer: LocalPeer, tokens: float) -> bool:
    return peer.last("progress", "tokens") >= tokens and len(peer.digests) > 0


def peak_bytes(pid: int) -> int:
    """The most that a process has had in main memory so far; 0 where it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def gpu_bytes() -> dict[int, int]:
    """pid -> bytes of GPU memory, of all that compute there. Raises SwarmError where nvidia-smi does not say."""
    words = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SwarmError("nvidia-smi does not say who uses the GPU", why=str(error), do="use --device cpu") from None
    return {int(pid): int(mebibytes) * 2**20 for pid, mebibytes in re.findall(r"^(\d+), (\d+)$", told, re.MULTILINE)}


def speed(stepped: list[tuple[float, float]]) -> float:
    """Tokens a second since the first step was done, which was slower; 0 where there was only one."""
    if len(stepped) < 2:
        return 0.0
    (began, first), (ended, last) = stepped[0], stepped[-1]
    return (last - first) / (ended - began)


def planned_bytes(table: str, of: str = "main memory") -> int:
    """The sum under a plan's table; 0 where there is none."""
    found = re.search(rf"^{of}\s+([0-9.]+ [kMGT]?B)", table, re.MULTILINE)
    return parse_bytes(found[1].replace(" ", "")) if found else 0


def table(result: dict[str, Any]) -> str:
    lines = [
        f"the whole model, as sparing as can be: {'fits' if result['whole']['fits'] else 'does not fit'} into "
        f"{format_bytes(result['limit_bytes'])}", "", result["whole"]["table"], "",
        f"peer 0: {result['peers'][0]['table']}", "",
        "| fragments | plan | peak of the process | of the plan | GPU plan | GPU peak | tokens | rounds |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for peer in result["peers"]:
        share = peer["peak_bytes"] / peer["plan"] if peer["plan"] else float("nan")
        lines.append(
            f"| {peer['fragments']} | {format_bytes(peer['plan'])} | {format_bytes(peer['peak_bytes'])} | {share:.0%} "
            f"| {format_bytes(peer['gpu_plan'])} | {format_bytes(peer['gpu_peak_bytes'])} | {peer['tokens']} "
            f"| {peer['rounds']} |"
        )
    return "\n".join([*lines, "", f"{result['peers'][0]['tokens_per_s']:g} tokens/s after the first step"])
