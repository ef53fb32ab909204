"""How a peer gets from one stage to another without a break: what to load next, and what to serve meanwhile.

Fragment by fragment, those that nobody serves first. A newcomer serves the first one as soon as it has it, and grows.
A peer that moves keeps its old stage until what it has of the new one is worth more, or the old one is in the way:
make before break. What is loaded and not served yet lies in host memory or on the disk.

Petals and SWARM stop serving, load everything, and start again.
"""

from __future__ import annotations

from collections.abc import Collection, Set

import numpy as np

from swarm.pipeline.snapshot import NO_STAGE, Fragments, Holder, Snapshot, Stage


def next_fragment(snapshot: Snapshot, me: Holder, have: Set[int]) -> int | None:
    """What to load next on the way to `me.target`; None when it has all of it.

    First a fragment that nobody else serves; else one beside what it has there; of several, the one of lowest rate.
    """
    missing = [fragment for fragment in range(*me.target) if fragment not in have]
    if not missing:
        return None
    rates = snapshot.served_rates(me)
    inside = {fragment for fragment in have if me.target[0] <= fragment < me.target[1]}
    beside = [fragment for fragment in missing if fragment - 1 in inside or fragment + 1 in inside]
    gaps = [fragment for fragment in missing if rates[fragment] == 0]
    return min(gaps or beside or missing, key=lambda fragment: (rates[fragment], fragment not in beside, fragment))


def stage_to_serve(snapshot: Snapshot, me: Holder, have: Collection[int]) -> Stage:
    """Of the stages that can be made of what it has, the one that is worth most now; its target once it is complete."""
    if all(fragment in have for fragment in range(*me.target)):
        return me.target
    options = windows(have, me.room_bytes, snapshot.fragments)
    wider = [option for option in options if option[0] <= me.serving[0] and me.serving[1] <= option[1]]
    if len(options) == 1 and (wider or me.serving == NO_STAGE):
        return options[0]
    worths = snapshot.worths(me, np.array(options, dtype=np.int64).reshape(-1, 2), serving=True).tolist()

    def value(index: int) -> tuple[float, int]:
        first, end = options[index]
        return round(worths[index], 9), min(end, me.target[1]) - max(first, me.target[0])

    return options[max(range(len(options)), key=value)] if options else NO_STAGE


def windows(have: Collection[int], room_bytes: int, fragments: Fragments) -> list[Stage]:
    """Runs of consecutive fragments that it has and that fit, none inside another."""
    found: list[Stage] = []
    for first in sorted(have):
        end, size = first, 0
        while end in have and size + fragments.sizes_bytes[end] <= room_bytes:
            size += fragments.sizes_bytes[end]
            end += 1
        if end > max(first, found[-1][1] if found else 0):
            found.append((first, end))
    return found
