"""How benchmarks show their figures: medians with min and max, markdown as the README has it. And the arithmetic on
what peers said: tokens come in lumps, a commit at a time, so a rate goes from one commit to another.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[float, float]
"""(monotonic seconds, tokens)"""


@dataclass(frozen=True)
class Rate:
    tokens_per_s: float
    """between the first and the last commit of the window; 0 where there are fewer than two"""
    commits: int


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Of repeats: what every figure of a JSON file looks like. Six digits: more would be noise."""
    values = [float(f"{value:.6g}") for value in values]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def shown(spread_of: dict[str, Any] | None, *, digits: int = 2, scale: float = 1.0) -> str:
    """0.87 (0.85-0.88); just 0.87 of a single measurement, nothing of none."""
    if spread_of is None:
        return ""
    median, least, most = (f"{spread_of[key] * scale:,.{digits}f}" for key in ("median", "min", "max"))
    return median if len(spread_of["values"]) == 1 else f"{median} ({least}-{most})"


def spreads(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """[{figure: value}, ...], one of each repeat -> {figure: spread}, of what all of them have as a number."""
    keys = [
        key for key in rows[0] if all(type(row.get(key)) in (int, float) for row in rows)
    ] if rows else []
    return {key: spread([row[key] for row in rows]) for key in keys}


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def rises(series: Iterable[Sequence[Point]]) -> list[Point]:
    """Where the most advanced of several peers got further, over time."""
    found: list[Point] = []
    most = 0.0
    for at, tokens in sorted(point for points in series for point in points):
        if tokens > most:
            most = tokens
            found.append((at, tokens))
    return found


def rate(points: Sequence[Point], *, began: float, ended: float) -> Rate:
    """Of `rises`, in the window."""
    inside = [point for point in points if began <= point[0] <= ended]
    if len(inside) < 2:
        return Rate(0.0, len(inside))
    (first_at, first), (last_at, last) = inside[0], inside[-1]
    return Rate((last - first) / (last_at - first_at), len(inside))


def level(points: Sequence[Point], at: float) -> float:
    """Of `rises`: how far they were by then."""
    return max((tokens for when, tokens in points if when <= at), default=0.0)


def longest_gap(times: Iterable[float], *, began: float, ended: float) -> float:
    """The longest time in the window in which nothing happened."""
    inside = [began, *sorted(at for at in times if began < at < ended), ended]
    return max(later - earlier for earlier, later in zip(inside, inside[1:], strict=False))


def tokens_at(points: Sequence[Point], at: float) -> float:
    """What a peer had trained by then, on the line between what it said before and after; its start counts as 0."""
    before: Point | None = None
    for point in points:
        if point[0] >= at:
            if before is None:
                return 0.0
            share = (at - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1] if before else 0.0
