"""How a run would go on given machines and lines: speed and its bound, rounds and whether they hide, days, money.

K chains of the machines that hold every fragment once (need.py), all of one kind; chain k has the k-th line. Of each
chain the least counts of

    computing      what a stage's machine gets done: `passes` forwards a token, and one more where blocks are computed
                   twice
    the line       hidden states and gradients through each machine's line, in the time that rounds leave of it
    memory         microbatches that a stage has room for, over the time until their gradients are back

Rounds are opened by tokens, or earlier by `max_round_s`, and go on beside training; where lines cannot keep up with
them they only come later, and cover more tokens. Pure. Not counted: peers that come and go, the ramp of rounds at a
fresh start, and that text has to be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swarm.config import AveragingConfig
from swarm.train.hardware import Computer
from swarm.train.lines import Line, Lines
from swarm.train.need import Costs
from swarm.train.place import Place
from swarm.train.round_time import TCP_OVER_PAYLOAD, RoundTime, round_time

STREAM_SHARE = 0.75
"""of a line is used by microbatches that stream through it: 0.70 and 0.79 measured on home-100 (README, a model in
stages)"""
MOST_FOR_ROUNDS = 0.5
"""of a line, while microbatches need it too: TCP shares it between them"""
KWH_JOULES = 3.6e6
COMPUTING, LINE, MEMORY = "computing", "lines", "memory for microbatches"


@dataclass(frozen=True)
class Stage:
    """What one machine of a chain does."""

    part: tuple[int, int]
    compute_tokens_per_s: float
    sent_bytes: float
    """a token, TCP's own included"""
    received_bytes: float
    in_flight: int


@dataclass(frozen=True)
class Chain:
    """Tokens a second of a chain, and what each bound alone would allow."""

    computing: float
    line: float
    memory: float

    @property
    def tokens_per_s(self) -> float:
        return min(self.computing, self.line, self.memory)

    @property
    def bound_by(self) -> str:
        bounds = {COMPUTING: self.computing, LINE: self.line, MEMORY: self.memory}
        return min(bounds, key=lambda name: bounds[name])


@dataclass(frozen=True)
class Outlook:
    machines: int
    chains: tuple[Chain, ...]
    rounds: tuple[RoundTime, ...]
    """of each fragment"""
    due_s: float
    """until a fragment has the tokens of a round"""
    wanted_s: float
    """until a round is opened: `due_s`, or `max_round_s`"""
    period_s: float
    """from one round of a fragment to the next, as it comes to be: no less than what rounds take"""
    round_share: float
    """of the time, in which rounds of a machine's fragments fill the slowest line, the busiest machine's"""
    core_share: float
    """of one core, for the arithmetic of rounds, likewise"""
    num_rounds: int
    """of each fragment"""
    sent_bytes: float
    """by the machine that sends most, in the whole run, TCP's own bytes included"""
    seconds: float
    kwh: float

    @property
    def tokens_per_s(self) -> float:
        return sum(chain.tokens_per_s for chain in self.chains)

    @property
    def hidden(self) -> bool:
        """Are rounds through before the next ones are wanted?"""
        return self.period_s <= self.wanted_s

    @property
    def opened_by_time(self) -> bool:
        """Does `max_round_s` open rounds before their tokens are there?"""
        return self.wanted_s < self.due_s and self.period_s < self.due_s

    def price(self, *, per_kwh: float = 0.0, per_hour: float = 0.0) -> float:
        """`per_hour`: of one machine."""
        return self.kwh * per_kwh + self.machines * self.seconds / 3600 * per_hour


def outlook(
    costs: Costs, places: Sequence[Place], computer: Computer, lines: Lines, averaging: AveragingConfig, *,
    buffers: int, cores: float = 1.0,
) -> Outlook:
    """`places`: of a chain that holds every fragment; `lines`: of each chain. `buffers`, `cores`: see `round_time`."""
    rounds = tuple(
        round_time(lines, round_bytes=size, num_values=values, buffers=buffers, cores=cores)
        for size, values in zip(costs.round_bytes, costs.round_values, strict=True)
    )
    stages = [stage_of(costs, place, computer) for place in places]
    line_s = max(sum(one.line_s for one in rounds[slice(*stage.part)]) for stage in stages)
    cpu_s = max(sum(one.cpu_s for one in rounds[slice(*stage.part)]) for stage in stages)

    def due_s(tokens_per_s: float) -> float:
        return averaging.tokens_per_round / tokens_per_s

    def chains_at(tokens_per_s: float) -> tuple[Chain, ...]:
        share = line_s / min(due_s(tokens_per_s), averaging.max_round_s)
        free = 1 - min(share, MOST_FOR_ROUNDS)
        return tuple(
            chain_of(
                stages, line, free=free, microbatch_tokens=costs.microbatch_tokens,
                crossing_bytes=TCP_OVER_PAYLOAD * (costs.forward_bytes + costs.back_bytes),
            ) for line in lines.lines
        )

    speed = _fixed_point(lambda rate: sum(chain.tokens_per_s for chain in chains_at(rate)))
    chains, due = chains_at(speed), due_s(speed)
    seconds, wanted_s = costs.total_tokens / speed, min(due, averaging.max_round_s)
    period_s = max(wanted_s, line_s, cpu_s, *(one.total_s for one in rounds))
    num_rounds = math.ceil(seconds / period_s - 1e-6)
    sent = max(
        num_rounds * sum(one.wire_bytes for one in rounds[slice(*stage.part)])
        + stage.sent_bytes * costs.total_tokens * max(chain.tokens_per_s for chain in chains) / speed
        for stage in stages
    )
    machines = len(stages) * len(lines)
    return Outlook(
        machines, chains, rounds, due_s=due, wanted_s=wanted_s, period_s=period_s, round_share=line_s / wanted_s,
        core_share=cpu_s / wanted_s, num_rounds=num_rounds, sent_bytes=sent, seconds=seconds,
        kwh=machines * computer.watts * seconds / KWH_JOULES,
    )


def stage_of(costs: Costs, place: Place, computer: Computer) -> Stage:
    first, end = place.part
    settings = place.planner.settings
    flop = sum(costs.forward_flop[first:end]) * (costs.passes + settings.recompute)
    on, back = end < len(costs.round_bytes), first > 0
    return Stage(
        place.part, computer.flop_per_s(halved=settings.halved) / flop,
        TCP_OVER_PAYLOAD * (costs.forward_bytes * on + costs.back_bytes * back),
        TCP_OVER_PAYLOAD * (costs.forward_bytes * back + costs.back_bytes * on), max(1, place.in_flight),
    )


def chain_of(
    stages: Sequence[Stage], line: Line, *, free: float, microbatch_tokens: int, crossing_bytes: float
) -> Chain:
    """Machines that all have such a line, of which microbatches get `free` of the time. `crossing_bytes`: of a token,
    from one stage to the next and back."""
    up, down = (STREAM_SHARE * free * (rate or math.inf) / 8 for rate in (line.up_bits_per_s, line.down_bits_per_s))
    through = [min(up / stage.sent_bytes, down / stage.received_bytes) for stage in stages if stage.sent_bytes]
    roomy, back_s = [], 0.0
    for stage in reversed(stages):  # until a microbatch's gradient is back: the work here and further on, and the ways
        back_s += microbatch_tokens / stage.compute_tokens_per_s
        roomy.append(stage.in_flight * microbatch_tokens / back_s)
        back_s += 4 * line.latency_s + microbatch_tokens * crossing_bytes / min(up, down)
    return Chain(
        min(stage.compute_tokens_per_s for stage in stages), min(through, default=math.inf),
        min(roomy) if len(stages) > 1 else math.inf,
    )


def _fixed_point(speed_at: Callable[[float], float]) -> float:
    """Where a falling function meets the rate that it is asked for: the faster a swarm, the more rounds it has."""
    low, high = 0.0, speed_at(1e-9)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if speed_at(middle) > middle else (low, middle)
    return high
