"""One peer's life in a swarm: find the run, take over its state, train, leave.

    join    device, memory, network, reachable, state: the checklist, each with its reason and its seconds
    train   the training thread and the averager, until told to finish or the tokens are reached
    leave   the last contribution goes into a round, others get what they lack, a checkpoint is written

Whatever fails on the way raises a SwarmError; `close` ends everything from any state.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from swarm.averaging.averager import Averager
from swarm.averaging.context import Context
from swarm.averaging.elsewhere import said_tokens
from swarm.config import PeerConfig, RunConfig
from swarm.data.text_stream import TextStream
from swarm.errors import HomeError, NetworkError, SwarmError
from swarm.events import Bus, Check, Contributors, Ready, Warning
from swarm.host.device import choose_device
from swarm.host.freed import return_freed_memory
from swarm.host.home import Home
from swarm.host.keep import AMPLE, LITTLE
from swarm.network import join
from swarm.network.keys import Keypair, friendly_name
from swarm.network.maddr import join_command
from swarm.network.network import Network
from swarm.network.reachability import PUBLIC
from swarm.network.records import Status
from swarm.pipeline.loading import next_fragment
from swarm.pipeline.snapshot import NO_STAGE, Holder
from swarm.train import checkpoint, handover, report, run_source, surroundings, takeover
from swarm.train.arrival import Arrival
from swarm.train.assembly import assemble
from swarm.train.boundary import Boundary
from swarm.train.checkpoint import Checkpoint
from swarm.train.mover import Mover
from swarm.train.place import Place, choose
from swarm.train.run_source import Held
from swarm.train.stage_trainer import StageTrainer
from swarm.train.trainer import Trainer, limit_threads

PROGRESS_S = 1.0
CHECKPOINT_S = 60.0
LOOK_AGAIN_S = 15.0

log = logging.getLogger(__name__)


class Participant:
    def __init__(
        self, config: PeerConfig, home: Home, bus: Bus, *, clock: Callable[[], float] = time.time,
        on_run: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """`on_run` gets the run's folder as soon as the run is known."""
        self.config, self.home, self.bus = config, home, bus
        self.keypair = Keypair(home.key_bytes())
        self.network = Network(self.keypair, clock=clock)
        self.name = config.name or friendly_name(self.keypair.peer_id)
        self.run: RunConfig
        self.held: Held | None = None
        self.averager: Averager | None = None
        self.trainer: Trainer | StageTrainer | None = None
        self.mover: Mover | None = None
        """of a peer with a part of the model"""
        self.on_step: Callable[[float, int], None] = lambda loss, tokens: None
        """called after each inner step with its loss and tokens, on the training thread"""
        self._on_run = on_run
        self._place: Place | None = None
        self._device = torch.device("cpu")
        self._moving: concurrent.futures.Future[None] | None = None
        self._boundary = Boundary()
        self._stream: TextStream | None = None
        self._saved_stream: dict[str, Any] = {}
        self._gaps: list[int] = []
        """fragments that nobody held when this was last looked at"""
        self._names: set[str] = set()
        """of those who have trained, as far as they gave one"""
        self._leaving = self._stopped = False
        """about to go; and training is over, too"""
        self._folder: Path
        self._written: tuple[int, list[int]] | None = None
        """tokens of the newest checkpoint, and the fragments in it"""
        self._closed = threading.Lock()

    # -- join -------------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """From nothing to a peer that holds the swarm's state. Raises SwarmError; then call `close`."""
        config = self.config
        limit_threads(config.threads)
        began = time.monotonic()
        device, reason = choose_device(config.device, config.threads)
        self._device = device
        self._check("device", f"{device}: {reason}", began)

        began = time.monotonic()
        if config.new_swarm:
            base = run_source.base_folder(config.run, config.base)
            self.config = config = dataclasses.replace(config, base=base)
            self.run, self.held = run_source.new_run(
                config.run, choose=lambda run: self._find_place(run, device).part, base=base
            )
        elif not config.initial_peers:
            self.run = run_source.remembered(self.home, config.run_id)
        arrival = self._arrival = Arrival(config, self.home, self.network)
        arrival.connect()
        if not hasattr(self, "run"):
            self.run = self.network.run(
                join.find_run(self.network.dht, run_id=config.run_id, deadline_s=config.join_timeout_s)
            )
        self._folder = run_source.remember(self.run, self.home)
        base = run_source.remember_base(self.run, self._folder, config.base)
        self.config = config = dataclasses.replace(config, base=base)
        self._on_run(self._folder)
        peers = self.network.run(arrival.arrive(self.run, self.status))
        self._check("network", f"run {self.run.run_id}, " + _count(peers, "other peer"), began)
        self._check("reachable", arrival.situation.text, time.monotonic() - arrival.situated_s)
        if config.role == "trainer":
            began = time.monotonic()
            if self.held is None:
                part = self._first_part(self._find_place(self.run, device))
                self.held = run_source.hold(self.run, part=part, weights_from=config.base)
            assert self._place is not None
            self._check("memory", f"{self._place.text}\n{self._place.plan.table()}", began)
            self.held.model.to(device)  # type: ignore[arg-type]
            self._place.planner.settings.prepare(self.held.model)
            self._take_over_state()
            if self.held.fragments[0].index == 0:  # who draws text; the others get it with the microbatches
                self._load_data()
            if config.new_swarm:
                self.write_checkpoint()  # weights that came from a folder are nowhere else yet
        self.network.submit(self._background())

    def _find_place(self, run: RunConfig, device: Any) -> Place:
        """Which fragments to hold; where there is no swarm yet, as if nobody else was there."""
        statuses = self.network.directory.alive() if hasattr(self.network, "directory") else {}
        self._place = choose(
            run, self.config, device=device, statuses=statuses, peer_id=self.network.peer_id
        )
        if self._place.planner.settings.keep.name == LITTLE.name:
            return_freed_memory()
        return self._place

    def _first_part(self, place: Place) -> tuple[int, int]:
        """What to build first: where others have the state, the fragment of its place that the swarm needs most, with
        which it serves while the others are loaded."""
        statuses = self.network.directory.alive()
        is_whole = place.part == (0, self.run.fragments)
        if is_whole or self.run.averaging.mode == "sync" or (self._folder / "checkpoints").exists() or not any(
            status.held() for status in statuses.values()
        ):
            return place.part
        snapshot = surroundings.snapshot(self.run, statuses, place.planner.fragments())
        me = Holder(self.network.peer_id, NO_STAGE, place.part, 0, 1.0)
        first = next_fragment(snapshot, me, set())
        assert first is not None
        return first, first + 1

    def _take_over_state(self) -> None:
        assert self.held is not None
        began = time.monotonic()
        network = self.network
        context = Context(
            self.run, self.keypair, network.endpoint, network.directory, self._boundary, self.bus.emit,
            keep=self._place.planner.settings.keep if self._place is not None else AMPLE,
        )
        taken = takeover.take_over(
            self.held, context, network, self._folder, spare_disk=self.config.spare_disk,
            spares_fit=self._place is None or self._place.spares_fit,
        )
        self.averager, self._saved_stream = taken.averager, taken.stream
        self._check("state", taken.text, began)

    async def _stream_later(self) -> TextStream:
        """The text, for a peer that comes to serve the first fragment while it runs."""
        if self._stream is None:
            await asyncio.to_thread(self._load_data)
        assert self._stream is not None
        return self._stream

    def _load_data(self) -> None:
        from swarm.train import text  # and with it `datasets`, a second or two that only who draws text needs

        self._stream = text.open_text(
            self.run, reader=self.keypair.peer_id, saved=self._saved_stream, cache=self.home.path / "cache",
            swarm_tokens=self.swarm_tokens, warn=lambda words: self.bus.emit(Warning(words)),
        )

    # -- train ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take part in the swarm and begin to train (a rendezvous peer only takes part)."""
        self.take_part()
        self.train()

    def take_part(self) -> None:
        """From now on this peer answers others and opens rounds; says how others can join."""
        network = self.network
        if self.averager is not None:
            network.run(self._start_averager())
        ways_in = network.maddrs if self._arrival.situation.reach in (PUBLIC, "") else self._arrival.public_maddrs()
        self.bus.emit(Ready(
            run_id=self.run.run_id, peer_id=network.peer_id, maddrs=network.maddrs, join=join_command(ways_in)
        ))

    def train(self) -> None:
        began = time.monotonic()
        if self.averager is not None:
            assert self.held is not None and self._place is not None
            may_move = self.config.fragment_span is None and self.run.averaging.mode != "sync"
            made = assemble(
                self.run, self.held, self._place, self.averager, self.network, self._boundary, device=self._device,
                stream=self._stream, load_stream=self._stream_later, may_move=may_move, emit=self.bus.emit,
            )
            self.trainer, self.mover = made.trainer, made.mover
            self.trainer.on_step = self.on_step
            self.trainer.start()
            self.network.submit(self.network.directory.tell_all())  # that it serves, or others wait for a heartbeat
            if self.mover is not None:
                self.held = None  # what the mover lets go of shall leave memory
                self._moving = self.network.submit(self.mover.run_forever())
        stop = "stop with Ctrl+C (it finishes the round first)"
        self._check("training", f'you are "{self.name}"; {stop}', began)

    async def _start_averager(self) -> None:
        assert self.averager is not None
        self.averager.start()
        await self.network.directory.tell_all()

    def finished(self) -> str | None:
        """Why it is time to leave, or None. Raises what ended training, if something did."""
        if self.trainer is not None and self.trainer.error is not None:
            error = self.trainer.error
            raise SwarmError(
                "training has ended with an error", why=f"{type(error).__name__}: {error}",
                do="start again: the same command resumes; -v shows where it happened",
            ) from error
        if not self.network.daemon_alive():
            raise NetworkError(
                "libp2p's daemon has ended", why="something killed p2pd", do="start again: the same command resumes"
            )
        tokens = self.swarm_tokens()
        if self.config.until_tokens is not None and tokens >= self.config.until_tokens:
            return f"the swarm has trained {tokens} tokens"
        if self.trainer is not None and tokens >= self.run.train.total_tokens:
            return f"the run is complete: {tokens} tokens"
        return None

    def swarm_tokens(self) -> int:
        if self.averager is not None:
            return self.averager.swarm_tokens()
        return min(said_tokens(self.network.directory.alive().values()).values(), default=0)

    def status(self) -> Status:
        """What this peer tells the others."""
        trainer, averager, mover = self.trainer, self.averager, self.mover
        spares = averager.spares if averager is not None and averager.serving else None
        place = self._place.part if self._place is not None else None
        serving = place if trainer and not self._stopped else None
        return Status(
            run_id=self.run.run_id, name=self.name, role=self.config.role, maddrs=self._arrival.own_maddrs()[:8],
            reach=self._arrival.situation.reach,
            heads=averager.heads() if averager else [], pending=averager.pending() if averager else [],
            spares=spares.announced() if spares else [], spare_room_bytes=spares.room_bytes if spares else 0,
            tokens=trainer.tokens if trainer else 0,
            tokens_per_s=trainer.tokens_per_s if trainer and not self._stopped else 0.0,
            serving=mover.said_serving() if mover and serving else serving and list(serving),
            target=mover.said_target() if mover else None if trainer or place is None else list(place),
            speed=trainer.speed if trainer else 0.0, claim=mover.said_claim() if mover else None,
            loss=trainer.loss if trainer else None, leaving=self._leaving,
        )

    async def _background(self) -> None:
        """Progress once a second, a checkpoint once a minute, the run config before it expires."""
        loop = asyncio.get_running_loop()
        published = written = looked = loop.time()
        while True:
            await asyncio.sleep(PROGRESS_S)
            try:
                self._emit_progress()
            except Exception:  # a line on the screen is not worth the checkpoints that come after it here
                log.exception("cannot tell the progress")
            if loop.time() - looked > LOOK_AGAIN_S:
                looked = loop.time()
                with contextlib.suppress(Exception):  # it is asked again soon
                    if await self._arrival.look_again():
                        self.bus.emit(Check("reachable", self._arrival.situation.text, 0.0))
            if loop.time() - published > join.CONFIG_TTL_S / 3:
                published = loop.time()
                with contextlib.suppress(Exception):  # the next one comes soon, and others keep copies
                    alive = list(self.network.directory.alive())
                    await join.publish_run(self.network.dht, self.run, alive, self.network.peer_id)
            if loop.time() - written > CHECKPOINT_S and not self._leaving:
                written = loop.time()
                await asyncio.to_thread(self.write_checkpoint)

    def _emit_progress(self) -> None:
        others = self.network.directory.alive()
        event = report.progress(
            self.trainer, self.averager, others.values(), self.network.endpoint, swarm_tokens=self.swarm_tokens()
        )
        if event is not None:
            self.bus.emit(event)
        names = report.new_names([*others.items(), (self.keypair.peer_id, self.status())], self._names)
        if names:
            self._names |= set(names)
            self.bus.emit(Contributors(names))
        if self.averager is not None and self.averager.serving and not self._leaving:  # others may have gone before
            missing = report.gaps(self.run.fragments, self.averager.held(), others)
            if missing != self._gaps:
                self._gaps = missing
                self.bus.emit(report.gap_warning(missing))

    def write_checkpoint(self) -> None:
        """Save the global state as it is now; a full disk is a warning, and training goes on."""
        states = self.averager.states() if self.averager is not None else []
        newest = (min((state.tokens for state in states), default=-1), [state.fragment for state in states])
        if not states or newest == self._written:
            return
        try:
            place = self._stream.state() if self._stream else {}
            folder = self._folder / "checkpoints"
            checkpoint.write(folder, Checkpoint(states, place), num_fragments=self.run.fragments)
            self._written = newest
        except HomeError as error:  # not its advice, which is for a peer that starts
            self.bus.emit(Warning(f"a checkpoint was not written, training goes on: {error.what} ({error.why})"))

    # -- leave ------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Finish: the contribution at hand goes into a round, state is handed over, a checkpoint is written."""
        self._leaving = True
        self._stop_moving()
        if self.trainer is not None:
            self.network.run(handover.tell_all(self.network.directory))  # others send elsewhere from now on
            self._stop_training(self.trainer)
            self._stopped = True
        if self.averager is not None:
            self.averager.leaving = True
            lost = self.network.run(handover.hand_over(self.averager, self.network.directory))
            if lost:
                limit_s = handover.SETTLE_S
                self.bus.emit(Warning(f"{lost} tokens of this peer did not get into a round within {limit_s:.0f} s"))
            self.write_checkpoint()
        with contextlib.suppress(Exception):
            self._emit_progress()

    def close(self) -> None:
        """End everything, from any state; nothing is left behind. Safe to call twice."""
        with self._closed:
            self._stop_moving()
            if self.trainer is not None:
                self._stop_training(self.trainer)
                self.write_checkpoint()  # nothing new to write after `leave`; after an error it is what resumes
            if self.averager is not None:
                with contextlib.suppress(Exception):
                    self.network.run(self.averager.stop(), timeout_s=10)
                self.averager = None
            if self._stream is not None:
                self._stream.close()
            self.network.stop()

    def _stop_training(self, trainer: Trainer | StageTrainer) -> None:
        if self._stream is not None:
            self._stream.close()  # it may be waiting for text
        trainer.stop()

    def _stop_moving(self) -> None:
        if self._moving is not None:
            self._moving.cancel()
            self._moving = None

    def _check(self, name: str, text: str, began: float) -> None:
        self.bus.emit(Check(name, text, round(time.monotonic() - began, 1)))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


