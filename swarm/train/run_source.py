"""Which run: started here, found in the swarm, or resumed from the home folder. And what of it this peer holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from swarm.averaging import outer
from swarm.averaging.global_state import GlobalState, initial_state
from swarm.averaging.layout import Layout, layout_of
from swarm.config import RunConfig, canonical_json, load_run, run_from_json
from swarm.errors import ConfigError, SwarmError
from swarm.host.home import Home, atomic_write
from swarm.host.presets import preset_path
from swarm.model import working
from swarm.model.architecture import architecture, is_folder
from swarm.model.build import Model, build_model, resolve
from swarm.model.families import check_segments
from swarm.model.fragments import FragmentSpec, block_of_each, cut
from swarm.model.lora import base_digest, frozen_tensors
from swarm.model.partial import build_stage
from swarm.model.skeleton import skeleton
from swarm.model.stage import Stage

DEMO = "runs/demo.yaml"


@dataclass
class Held:
    """The model as this peer holds it: all of its fragments or some. Mappings are by their index in the run."""

    model: Model
    stage: Stage
    """the same modules: what of the model is here"""
    all_fragments: tuple[FragmentSpec, ...]
    fragments: tuple[FragmentSpec, ...]
    """those held"""
    layouts: dict[int, Layout]
    states: dict[int, GlobalState]
    """at version 0, as this machine draws or reads them"""
    base_digests: dict[int, str] = field(default_factory=dict)
    """of the frozen base, where there is one"""


def hold(run: RunConfig, *, part: tuple[int, int] | None = None, weights_from: str | None = None) -> Held:
    """Build fragments [first, end) of the run's model, and nothing else; all of them without `part`.

    `weights_from`: folder whose weights are the start. Raises ConfigError where there are no such fragments, or where
    the frozen base that is found here is not the run's."""
    lora = run.model.lora is not None
    part = part or (0, run.fragments)
    if part == (0, run.fragments) and not lora:
        model = build_model(run, weights_from=weights_from)
        fragments = held = cut(model, run.fragments)
        stage = Stage(model, 0, fragments[-1].blocks[1])
    else:
        fragments = cut(skeleton(run), run.fragments)
        held = fragments[slice(*part)]
        if not held or part[1] > run.fragments:
            raise ConfigError(
                f"there are no fragments {part[0]}:{part[1]}", why=f"the run has {run.fragments}, counted from 0",
                do=f"choose from 0:{run.fragments}",
            )
        stage = build_stage(run, (held[0].blocks[0], held[-1].blocks[1]), weights_from=weights_from)
    layouts = {fragment.index: layout_of(fragment) for fragment in held}
    parameters = dict(stage.held())
    num_buffers = outer.num_buffers(run)
    states = {i: initial_state(i, layout.flatten(parameters), num_buffers) for i, layout in layouts.items()}
    digests = _base_digests(stage, held) if lora else {}
    _check_base(run, digests)
    return Held(stage.model, stage, fragments, held, layouts, states, digests)


def _base_digests(stage: Stage, held: Iterable[FragmentSpec]) -> dict[int, str]:
    block_of = block_of_each(stage.model)
    tensors = list(frozen_tensors(stage.model))
    return {
        fragment.index: base_digest(
            (name, tensor) for name, tensor in tensors if fragment.blocks[0] <= block_of[name] < fragment.blocks[1]
        ) for fragment in held
    }


def _check_base(run: RunConfig, digests: Mapping[int, str]) -> None:
    for index, digest in digests.items():
        if run.base_digests and run.base_digests[index] != digest:
            raise ConfigError(
                f"the frozen base of fragment {index} is not the one that this run's adapters are for",
                why=f"its digest is {digest}, the run's {run.base_digests[index]}",
                do="give the folder of the model that the run was made from (--base DIR)",
            )


def load_states(held: Held, states: Iterable[GlobalState]) -> None:
    """Set the weights of these fragments, which are held, to these global states."""
    parameters = dict(held.model.named_parameters())
    with torch.no_grad():
        for state in states:
            for name, values in held.layouts[state.fragment].views(state.weights):
                working.write_all(parameters[name], values)


def check_model(run: RunConfig) -> None:
    """Raises ConfigError where the run's rows are packed and its model would see over the borders in them."""
    if run.is_mixture:
        check_segments(architecture(run), sequence_length=run.train.sequence_length)


def new_run(
    file: str | None, *, choose: Callable[[RunConfig], tuple[int, int] | None] = lambda run: None,
    base: str | None = None,
) -> tuple[RunConfig, Held]:
    """A run config made complete for publication, its start included, and what this peer holds of the model: the
    fragments [first, end) that `choose` names, or all. `base`: folder of a frozen base. Raises ConfigError."""
    draft = load_run(file if file is not None else preset_path(DEMO))
    run = resolve(draft)
    check_model(run)
    folder = base or (draft.model.source if run.model.source is None else None)
    part = choose(run)
    lora = run.model.lora is not None
    if part not in (None, (0, run.fragments)) and folder is not None and not lora:
        raise ConfigError(
            "a run from weights in a folder must be started by a peer that holds all of it",
            why=f"nobody else could read the other fragments' weights from {folder}",
            do="start it on a machine that fits it whole, without --fragments, or name a model of the hub",
        )
    held = hold(run, part=part, weights_from=folder)
    digests = {index: state.digest for index, state in held.states.items()}
    bases = dict(held.base_digests)
    for index in range(run.fragments):  # one at a time: together they may not fit
        if index not in digests:
            other = hold(run, part=(index, index + 1), weights_from=folder)
            digests[index] = other.states[index].digest
            bases |= other.base_digests
    return dataclasses.replace(
        run, initial_digests=[digests[index] for index in range(run.fragments)],
        base_digests=[bases[index] for index in sorted(bases)],
    ), held


def base_folder(file: str | None, given: str | None) -> str | None:
    """Where this machine has the frozen base of a run that it starts: `given`, or the folder that the run names.
    Raises ConfigError."""
    draft = load_run(file if file is not None else preset_path(DEMO))
    check_has_base(draft, given)
    source = draft.model.source if draft.model.lora is not None else None
    return given or (source if source is not None and is_folder(source) else None)


def remember_base(run: RunConfig, folder: Path, given: str | None) -> str | None:
    """Where the frozen base is: `given`, kept in the run's `folder` for the next start, or what was kept there. None:
    the run has no base, or it is on the hub or drawn. Raises ConfigError."""
    check_has_base(run, given)
    file = folder / "base.txt"
    if given is not None:
        atomic_write(file, str(Path(given).expanduser().resolve()).encode())
    return file.read_text(encoding="utf-8") if file.is_file() else None


def check_has_base(run: RunConfig, given: str | None) -> None:
    """Raises ConfigError where a frozen base is `given` to a run that has none, or is no folder."""
    if given is not None and run.model.lora is None:
        raise ConfigError(
            "--base is not for this run", why="it trains all weights, and has no frozen base", do="leave it out"
        )
    if given is not None and not Path(given).expanduser().is_dir():
        raise ConfigError(
            f"there is no folder {given}", why="--base is where this machine has the run's frozen model",
            do="check the path",
        )


def matches_start(run: RunConfig, held: Held) -> dict[int, bool]:
    """For each fragment held: is what this machine drew the start that the run config names?"""
    named = run.initial_digests
    return {index: not named or state.digest == named[index] for index, state in held.states.items()}


def remember(run: RunConfig, home: Home) -> Path:
    """Keep the run in the home folder, to be resumed by a start without arguments. Returns the run's folder."""
    folder = home.run_folder(run.run_id)
    atomic_write(folder / "run.json", canonical_json(run))
    home.remember_run(run.run_id)
    return folder


def remembered(home: Home, run_id: str | None = None) -> RunConfig:
    """The run of the last start in this home folder (or `run_id`). Raises SwarmError where there is none."""
    run_id = run_id or home.last_run_id
    if run_id is None:
        raise ConfigError(
            f"there is no run to resume in {home.path}",
            why="neither --new-swarm nor --initial-peers was given",
            do="start one with --new-swarm, or join one with --initial-peers and the address a friend sent you",
        )
    file = home.run_folder(run_id) / "run.json"
    try:
        return run_from_json(file.read_bytes(), run_id=run_id)
    except OSError as error:
        raise SwarmError(f"cannot read {file}", why=str(error), do="join again with --initial-peers") from None
