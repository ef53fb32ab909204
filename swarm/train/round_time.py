"""How long a round takes: K members on their lines, from the opening until the last one has applied the result.

    legs          opening, push, result, commit: each the longest way between two members
    sending       2 (K - 1) / K of the encoded fragment up each line, and as much down, TCP's own bytes included; the
                  slowest line or path counts. TCP begins with ten packets a connection and doubles each round trip
                  (RFC 5681, 6928): rounds come after pauses, in which it forgets what the line can do
    arithmetic    encode, add up, decode, outer step, hashes. A fragment travels in parts, so that most of what comes
                  before the result is hidden behind the sending; of the outer step nothing is

The protocol: averaging/round.py. Constants were measured, as said beside them. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarm.averaging import plan
from swarm.network.codec import BLOCK
from swarm.train.lines import Line, Lines

LEGS = 4
"""opening, push, result, commit"""
TCP_OVER_PAYLOAD = 1.036
"""bytes on the wire: 1500 for each 1448 of payload, besides encryption and frames"""
SHARE = 0.56
"""of what lines could carry is used while all members send to all, in both directions"""
FIRST_BYTES = 10 * 1448
"""of one connection after a pause, in the first round trip"""
MAX_UNDER_WAY_BYTES = 3.5e6
"""of one connection, a round trip: Linux' usual buffers; 280 Mbit/s at 100 ms"""
CONTRIBUTE_NS, ENCODE_NS, REDUCE_NS, DECODE_NS = 10.0, 11.0, 12.0, 4.0
"""CPU time a value of the fragment, one core of an EPYC, 10 M values: a copy of the drift; what is sent, and what is
lost of it; everybody's values of one's own parts decoded, held against each other, added up and encoded; the results"""
APPLY_NS, BUFFER_NS = 16.0, 8.5
"""the outer step with one hash, and what is moved in the working weights; for each vector of outer momentum"""


@dataclass(frozen=True)
class RoundTime:
    """Seconds."""

    legs_s: float
    sending_s: float
    line_s: float
    """in which the slowest line is full: `sending_s` without TCP's start, beside which others have room"""
    arithmetic_s: float
    """that no sending hides"""
    wire_bytes: float
    """that each member sends"""
    cpu_s: float
    """of one core, at each member"""

    @property
    def total_s(self) -> float:
        return self.legs_s + self.sending_s + self.arithmetic_s


def round_time(
    lines: Lines, *, round_bytes: int, num_values: int, buffers: int = 1, cores: float = 1.0
) -> RoundTime:
    """Of one fragment of `num_values`, encoded in `round_bytes`, among machines with these lines. `buffers`: vectors of
    outer momentum. `cores`: that each member has for its rounds, at most one; training goes on beside that."""
    count, slow = len(lines), 1e-9 * num_values / min(1.0, cores)
    before = (CONTRIBUTE_NS + ENCODE_NS + REDUCE_NS) * slow
    after = (DECODE_NS + APPLY_NS + BUFFER_NS * buffers) * slow
    cpu_s = (before + after) * min(1.0, cores)
    if count < 2:
        return RoundTime(0.0, 0.0, 0.0, before + after, 0.0, cpu_s)
    pieces = pieces_of(num_values, count)
    exposed = (CONTRIBUTE_NS + (ENCODE_NS + REDUCE_NS) / pieces) * slow
    hidden = before - exposed
    each = TCP_OVER_PAYLOAD * 2 * round_bytes / count
    loads = _loads(lines, each)
    sending_s = max(send_s(size, rate, rtt_s=rtt_s, connections=others) for size, rate, rtt_s, others in loads)
    line_s = max(size / rate for size, rate, _, _ in loads)
    legs_s = LEGS * max(lines.latency_s(a, b) for a, b in _pairs(lines))
    return RoundTime(legs_s, max(sending_s, hidden), line_s, exposed + after, each * (count - 1), cpu_s)


def pieces_of(num_values: int, count: int) -> int:
    """Parts in which each member's run of blocks travels."""
    num_blocks = max(1, -(-num_values // BLOCK))
    parts = plan.split(num_blocks, [str(member) for member in range(count)])
    return max(1, len(parts) // min(count, num_blocks))


def send_s(size: float, rate: float, *, rtt_s: float, connections: int = 1) -> float:
    """Seconds until `size` bytes have left at `rate` bytes/s, over so many connections that were silent before."""
    if rtt_s <= 0:
        return size / rate
    most = min(rate * rtt_s, connections * MAX_UNDER_WAY_BYTES)
    window, seconds = min(float(connections * FIRST_BYTES), most), 0.0
    while window < min(size, most):
        size -= window
        seconds += rtt_s
        window = min(2 * window, most)
    return seconds + size / (most / rtt_s)


def _loads(lines: Lines, each: float) -> list[tuple[float, float, float, int]]:
    """(bytes, bytes/s, seconds there and back, connections) of every line, up and down, and of every path. `each`:
    bytes from any member to any other."""
    others = len(lines) - 1
    found = []
    for line in lines.lines:
        rtt_s = 2 * max(lines.latency_s(line, other) for other in lines.lines if other is not line)
        for bits_per_s in (line.up_bits_per_s, line.down_bits_per_s):
            found.append((each * others, SHARE * (bits_per_s or math.inf) / 8, rtt_s, others))
    for a, b in _pairs(lines):
        found.append((each, SHARE * (lines.bits_per_s(a, b) or math.inf) / 8, 2 * lines.latency_s(a, b), 1))
    return found


def _pairs(lines: Lines) -> list[tuple[Line, Line]]:
    return [(a, b) for index, a in enumerate(lines.lines) for b in lines.lines[index + 1:]]
