"""The state that a peer begins with: from its checkpoints and spare copies, from other peers, or the run's start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm.averaging import outer
from swarm.averaging.averager import Averager
from swarm.averaging.context import Context
from swarm.averaging.layout import layout_of
from swarm.averaging.rebuild import Rebuilder
from swarm.events import Warning
from swarm.model.fragments import find_blocks
from swarm.model.skeleton import skeleton
from swarm.network.network import Network
from swarm.train import checkpoint, run_source
from swarm.train.run_source import Held
from swarm.train.spare_disk import SpareDisk, room_bytes


@dataclass
class TakenOver:
    averager: Averager
    text: str
    """which versions, and from where"""
    stream: dict[str, Any] = field(default_factory=dict)
    """where this peer was in its data"""


def take_over(
    held: Held, context: Context, network: Network, folder: Path, *, spare_disk: int | None, spares_fit: bool = True
) -> TakenOver:
    """Bring what this peer holds to the swarm's newest state. `folder`: of the run; `spare_disk`: bytes for spares, as
    in `PeerConfig`; `spares_fit`: there is memory to follow rounds with them. Raises SwarmError where a newer state
    exists and nobody can give it."""
    run, num_buffers = context.run, outer.num_buffers(context.run)

    def warn(text: str) -> None:
        context.emit(Warning(text))

    layouts = {fragment.index: layout_of(fragment) for fragment in held.all_fragments}
    numels = {index: layout.numel for index, layout in layouts.items()}
    disk = SpareDisk(
        folder / "spares", room_bytes=room_bytes(spare_disk, folder), numels=numels, num_buffers=num_buffers, warn=warn
    )
    saved = checkpoint.load_newest(
        folder / "checkpoints", numels={index: numels[index] for index in held.layouts},
        num_fragments=run.fragments, num_buffers=num_buffers, warn=warn,
    )
    states = {state.fragment: state for state in saved.states} if saved is not None else {}
    for state in checkpoint.older(
        folder / "checkpoints", numels={i: numel for i, numel in numels.items() if i not in states},
        num_fragments=run.fragments, num_buffers=num_buffers,
    ):
        known = disk.heads().get(state.fragment)
        if state.fragment in held.layouts:
            states[state.fragment] = state
        elif known is None or known.tokens < state.tokens:
            disk.write(state)  # of what it held before, it is a keeper now
    if not spares_fit:
        disk.offer_nothing()
    trusted = run_source.matches_start(run, held) | dict.fromkeys(states, True)
    held.states |= states
    run_source.load_states(held, states.values())

    async def join() -> tuple[Averager, int]:
        averager = Averager(context, held.layouts, held.states, dict(held.model.named_parameters()))
        averager.keep_spares(disk, layouts)
        averager.trust(trusted)
        averager.synchroniser.rebuild = Rebuilder(
            context, averager.synchroniser, held.all_fragments, layouts,
            own=lambda: {state.fragment: state for state in averager.states()},
            blocks_at=lambda: find_blocks(skeleton(run))[0],
        ).rebuild
        return averager, await averager.synchroniser.join()

    averager, downloaded = network.run(join())
    versions = ", ".join(str(state.version) for state in averager.states())
    spare = [state.fragment for state in averager.states() if state.digest != held.states[state.fragment].digest]
    rebuilt = averager.synchroniser.rebuilt
    if rebuilt:
        origin = f"rebuilt fragment {', '.join(map(str, rebuilt))} from its neighbours"
    elif downloaded:
        origin = f"downloaded {downloaded} fragment{'' if downloaded == 1 else 's'} from others"
    else:
        own = "this peer's checkpoint" if states else "a spare copy of this peer's"
        origin = f"from {own}" if states or spare else "the run's start, drawn from its seed"
    one = ", on the word of the only one there" if averager.synchroniser.attested_by_one else ""
    return TakenOver(averager, f"versions {versions}: {origin}{one}", saved.stream if saved is not None else {})
