"""What a value costs on the wire and on one core, and what of it is lost, by bits; bitsandbytes beside it.

Speeds are in GB of fp32 a CPU-second with one thread: other work on the machine does not count, but it slows memory. On
a GPU (--device cuda: as activations travel) they are by the clock, from values there to bytes in main memory and back.
Errors are relative L2: of one encoding, of normal values and of such with heavy tails (Student's t, 3 degrees of
freedom); and what error feedback still owes after some rounds of the same values with noise, over a contribution's
norm. If that grew with the rounds, something would never be said.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benches import table as tables
from swarm.errors import ConfigError
from swarm.host.device import choose_device
from swarm.network import codec

NAME = "codec"
HELP = "GB a CPU-second, error and bytes of values by bits on the wire"

BITS = (2, 4, 8, 32)
ROUNDS = 20
FEEDBACK_BLOCKS = 100
RoundTrip = Callable[[torch.Tensor], torch.Tensor]
"""values -> what the receiver has of them"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS), choices=BITS, help="which ones (all)")
    parser.add_argument("--device", default="cpu", help="where the values are (cpu)")
    parser.add_argument("--values", type=int, default=4_000_000, metavar="N", help="at a time (4,000,000)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="of each timing (9)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises ConfigError where there is nothing to measure."""
    if options.values < 1 or options.repeats < 1:
        raise ConfigError("--values and --repeats must be positive", do="leave them out, or give larger ones")
    num_blocks = -(-(min(options.values, 200_000) if options.quick else options.values) // codec.BLOCK)
    repeats = min(options.repeats, 2) if options.quick else options.repeats
    device, _ = choose_device(options.device, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        normal, heavy = (values.to(device) for values in samples(num_blocks))
        rows = [ours(bits, normal, heavy, repeats=repeats) for bits in options.bits]
        rows += rivals(normal, heavy, repeats=repeats)
    finally:
        torch.set_num_threads(before)
    return {"values": num_blocks * codec.BLOCK, "rounds": ROUNDS, "device": options.device, "rows": rows}


def samples(num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [num_blocks * 256]: normal, Student's t."""
    dice = torch.Generator().manual_seed(0)
    normal, other, *three = (torch.randn(num_blocks * codec.BLOCK, generator=dice) for _ in range(5))
    return normal, other / torch.stack(three).square().mean(dim=0).sqrt()


def ours(bits: int, normal: torch.Tensor, heavy: torch.Tensor, *, repeats: int) -> dict[str, Any]:
    def round_trip(values: torch.Tensor) -> torch.Tensor:
        return decode(codec.encode(values, 0, bits), len(values) // codec.BLOCK)

    def decode(data: bytes, num_blocks: int) -> torch.Tensor:
        return codec.decode(data, num_blocks, 0, bits, device=normal.device)

    data = codec.encode(normal, 0, bits)
    num_blocks = len(normal) // codec.BLOCK
    if not torch.equal(decode(data, num_blocks).cpu(), codec.decode(data, num_blocks, 0, bits)):
        raise AssertionError("values are read differently on this device (I1)")
    return {
        "codec": f"{bits} bits" if bits < 32 else "fp32",
        "encode": speed(lambda: codec.encode(normal, 0, bits), normal, repeats),
        "encode_and_read": speed(lambda: codec.encode_and_read(normal, 0, bits), normal, repeats),
        "decode": speed(lambda: decode(data, num_blocks), normal, repeats),
        **errors(round_trip, normal, heavy), "bytes_a_value": round(len(data) / len(normal), 4),
    }


def rivals(normal: torch.Tensor, heavy: torch.Tensor, *, repeats: int) -> list[dict[str, Any]]:
    """bitsandbytes' blocks of 256 with an fp32 scale each; nothing where it is not installed. On a GPU the bytes go to
    main memory and come back."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return []

    def of(name: str, encode: Callable[[torch.Tensor], Any], decode: Callable[[Any], torch.Tensor]) -> dict[str, Any]:
        def sent(values: torch.Tensor) -> Any:
            codes, *rest = encode(values)
            return (codes.cpu(), *rest)

        def received(encoded: Any) -> torch.Tensor:
            codes, *rest = encoded
            return decode((codes.to(normal.device), *rest))

        encoded = sent(normal)
        return {
            "codec": name, "encode": speed(lambda: sent(normal), normal, repeats), "encode_and_read": None,
            "decode": speed(lambda: received(encoded), normal, repeats),
            **errors(lambda values: received(sent(values)).view(-1), normal, heavy),
            "bytes_a_value": round(encoded[0].numel() * encoded[0].element_size() / len(normal) + 4 / codec.BLOCK, 4),
        }

    return [
        of("bitsandbytes nf4", lambda values: functional.quantize_4bit(values, blocksize=codec.BLOCK, quant_type="nf4"),
           lambda encoded: functional.dequantize_4bit(*encoded)),
        of("bitsandbytes 8 bits", lambda values: functional.quantize_blockwise(values, blocksize=codec.BLOCK),
           lambda encoded: functional.dequantize_blockwise(*encoded)),
    ]


def speed(work: Callable[[], object], values: torch.Tensor, repeats: int) -> dict[str, Any]:
    """GB of fp32 `values` a CPU-second (on a GPU: a second), spread over repeats; one before them warms up."""
    def clock() -> int:
        if values.device.type == "cpu":
            return time.process_time_ns()
        torch.cuda.synchronize()
        return time.perf_counter_ns()

    work()
    found = []
    for _ in range(repeats):
        began = clock()
        work()
        found.append(values.numel() * 4 / max(1, clock() - began))
    return tables.spread(found)


def errors(round_trip: RoundTrip, normal: torch.Tensor, heavy: torch.Tensor) -> dict[str, Any]:
    few = FEEDBACK_BLOCKS * codec.BLOCK
    return {
        "error_normal": _relative(round_trip(normal) - normal, normal),
        "error_heavy": _relative(round_trip(heavy) - heavy, heavy),
        "owed_normal": owed(round_trip, normal[:few]), "owed_heavy": owed(round_trip, heavy[:few]),
    }


def owed(round_trip: RoundTrip, values: torch.Tensor, rounds: int = ROUNDS) -> float:
    """What error feedback holds after so many rounds of `values` and as much noise, over a contribution's norm."""
    dice, feedback, contribution = torch.Generator().manual_seed(1), torch.zeros_like(values), values
    noise = values.square().mean().sqrt()
    for _ in range(rounds):
        contribution = values + noise * torch.randn(len(values), generator=dice).to(values.device)
        wanted = contribution + feedback
        feedback = wanted - round_trip(wanted)
    return _relative(feedback, contribution)


def _relative(error: torch.Tensor, values: torch.Tensor) -> float:
    return float(f"{float(error.norm() / values.norm()):.3g}")


def table(result: dict[str, Any]) -> str:
    lines = [
        [row["codec"], *(tables.shown(row[key]) for key in ("encode", "encode_and_read", "decode")),
         *(f"{row[key]:.4f}" for key in ("error_normal", "error_heavy", "owed_normal", "owed_heavy", "bytes_a_value"))]
        for row in result["rows"]
    ]
    header = ["codec", "encode, GB/s", "encode and read, GB/s", "decode, GB/s", "error normal", "error heavy-tailed",
              f"owed after {result['rounds']} rounds, normal", "owed, heavy-tailed", "bytes a value"]
    return f"{result['values']:,} values, one thread, {result['device']}\n\n" + tables.markdown(header, lines)
