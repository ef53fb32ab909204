"""A run's global weights, from the disk of a peer or from a live swarm: what is exported, evaluated and talked to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from swarm.averaging.global_state import GlobalState
from swarm.config import RunConfig, run_from_json
from swarm.errors import ConfigError, HomeError, StateError
from swarm.host.home import Home
from swarm.model.build import Model
from swarm.model.lora import merged
from swarm.monitor.journal import FILE_NAME
from swarm.observer import Observer
from swarm.train import checkpoint, report, run_source
from swarm.train.run_source import Held

Say = Callable[[str], None]


@dataclass(frozen=True)
class Weights:
    """All fragments of a run. `held.model` has the start's weights until they are loaded (`load`)."""

    run: RunConfig
    held: Held
    states: list[GlobalState]
    names: list[str] = field(default_factory=list)
    """of peers that trained and gave a name, as far as known"""

    def model(self) -> Model:
        """With these weights, as plain transformers has it; adapters are merged into what they adapt."""
        return merged(self.load().model)

    @property
    def tokens(self) -> int:
        """Of the swarm, in the fragment that has fewest."""
        return min(state.tokens for state in self.states)

    def load(self) -> Held:
        run_source.load_states(self.held, self.states)
        return self.held


def from_folder(path: Path, *, run_id: str | None = None, base: str | None = None, say: Say) -> Weights:
    """The newest whole checkpoint in a home folder, or in a run's folder or its `checkpoints`; or the checkpoint that a
    path names (.../checkpoints/000042). `say` gets what a person should know.

    `base`: folder of the frozen base of a run with adapters, where it is not the one that the peer used. Raises
    SwarmError."""
    folder = path.expanduser().resolve()
    for run_folder in (folder, folder.parent, folder.parent.parent):
        if (run_folder / "run.json").is_file() and not (folder / "runs").is_dir():
            run = _read_run(run_folder / "run.json")
            only = folder if (folder / checkpoint.MANIFEST).is_file() else None
            return _newest(run, run_folder, only=only, base=base, say=say)
    return from_home(path, run_id=run_id, base=base, say=say)


def from_home(path: Path, *, run_id: str | None = None, base: str | None = None, say: Say) -> Weights:
    """The newest whole checkpoint in a home folder. Raises SwarmError."""
    home = Home.open(path, exclusive=False)
    if run_id is None and home.last_run_id is None:
        raise HomeError(
            f"there is no run in {home.path}", why="no peer with this home folder has started or joined one",
            do="give the --home of a peer that has, or --initial-peers to ask a live swarm",
        )
    run = run_source.remembered(home, run_id)
    return _newest(run, home.run_folder(run.run_id), only=None, base=base, say=say)


def from_swarm(
    initial_peers: list[str], *, run_id: str | None = None, base: str | None = None, say: Say,
    join_timeout_s: float = 20.0,
) -> Weights:
    """Every fragment at its newest attested version, from the peers that hold it. Raises SwarmError."""
    with Observer(initial_peers, run_id=run_id, join_timeout_s=join_timeout_s) as observer:
        run_source.check_has_base(observer.run, base)
        held = run_source.hold(observer.run, weights_from=base)
        observer.ask_everybody()
        states = []
        for index, layout in held.layouts.items():
            say(f"fragment {index + 1} of {len(held.layouts)}")
            num_buffers = len(held.states[index].buffers)
            states.append(observer.fetch(index, numel=layout.numel, num_buffers=num_buffers))
        for note in observer.notes:
            say(note)
        return Weights(observer.run, held, states, given_names(observer))


def given_names(observer: Observer) -> list[str]:
    """Names of the trainers that are there now, but for those that were made up from a peer's id."""
    return report.new_names(((seen.peer_id, seen.status) for seen in observer.seen()), [])


def journal_names(path: Path) -> list[str]:
    """Names of those who trained, from what a peer wrote down while it lived (`Contributors`)."""
    names: set[str] = set()
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if '"contributors"' in line:
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                    event = json.loads(line)
                    if event["event"] == "contributors":
                        names |= {str(name) for name in event["names"]}
    return sorted(names)


def _read_run(path: Path) -> RunConfig:
    try:
        return run_from_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}", why=str(error.strerror or error), do="check the folder") from None


def _newest(run: RunConfig, run_folder: Path, *, only: Path | None, base: str | None, say: Say) -> Weights:
    folder = run_folder / "checkpoints"
    run_source.check_has_base(run, base)
    held = run_source.hold(run, weights_from=base or run_source.remember_base(run, run_folder, None))
    numels = {index: layout.numel for index, layout in held.layouts.items()}
    num_buffers = len(held.states[0].buffers)
    if only is not None:
        saved: checkpoint.Checkpoint | None = checkpoint.load(
            only, numels=numels, num_fragments=run.fragments, num_buffers=num_buffers
        )
    else:
        saved = checkpoint.load_newest(
            folder, numels=numels, num_fragments=run.fragments, num_buffers=num_buffers, warn=say
        )
    if saved is None:
        raise StateError(
            f"there is no checkpoint of {run.run_id} in {folder}",
            why="a peer writes one each minute and when it leaves",
            do="wait for the first one, or ask the live swarm with --initial-peers",
        )
    if len(saved.states) < run.fragments:
        raise StateError(
            f"the newest checkpoint in {folder} is not the whole model",
            why=f"that peer holds {len(saved.states)} of its {run.fragments} fragments; others hold the rest",
            do="ask the live swarm with --initial-peers",
        )
    return Weights(run, held, saved.states, journal_names(run_folder / FILE_NAME))
