"""Computing of a given speed, on machines that are not there: sleeps in place of a stage's forward and backward.

On a box with two cores four peers cannot compute at once as four home GPUs do. `Padded` computes for real and then
sleeps until the given time is over, where that is longer; `Emulated` computes nothing and sleeps, so that activations
can be as wide as those of a model that no two cores could run. Everything else is the product's.

Sleeps are calibrated: a turn at the processor also packs and unpacks values, and on a machine that plays four it wakes
up late, which came to 230 ms where 150 were asked for. `Calibrated` takes what a turn took too long off the next ones.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch

from swarm.model.fragments import FragmentSpec
from swarm.model.prefix import Segments
from swarm.model.stage import Stage
from swarm.pipeline.compute import StageCompute, _Pending
from swarm.pipeline.work import WorkQueue, _Item

MOST_OWED_S = 1.0
"""a machine that is too slow for what is asked of it stays too slow, and shows"""


@dataclass(frozen=True)
class Times:
    """of a microbatch, a fragment"""

    forward_s: float
    backward_s: float


class Padded(StageCompute):
    """Real computing that takes at least as long as `times` say."""

    times = Times(0.0, 0.0)

    def forward(
        self, key: Hashable, values: torch.Tensor, *, start: int, end: int, tokens: int, keep: bool = True,
        segments: Segments | None = None,
    ) -> torch.Tensor:
        until = time.monotonic() + self.times.forward_s * (end - start)
        left = super().forward(key, values, start=start, end=end, tokens=tokens, keep=keep, segments=segments)
        sleep_until(until)
        return left

    def loss(
        self, key: Hashable, values: torch.Tensor, ids: torch.Tensor, *, start: int, end: int, keep: bool = True,
        segments: Segments | None = None,
    ) -> tuple[float, torch.Tensor | None]:
        """The forward's time and the backward's."""
        until = time.monotonic() + (self.times.forward_s + self.times.backward_s * keep) * (end - start)
        found = super().loss(key, values, ids, start=start, end=end, keep=keep, segments=segments)
        sleep_until(until)
        return found

    def backward(self, key: Hashable, gradient: torch.Tensor | None) -> torch.Tensor | None:
        graph = self._graphs[key]
        until = time.monotonic() + self.times.backward_s * len(graph.fragments)
        found = super().backward(key, gradient)
        if gradient is not None:
            sleep_until(until)
        return found


class Emulated(StageCompute):
    """No computing: hidden states are passed on as they come, gradients too, and the loss is 1."""

    times = Times(0.0, 0.0)
    turns_s = 0.0
    """that its turns were to take until now; all of a process's, which has one processor"""
    owed_s = 0.0
    """that they took longer"""

    def __init__(
        self, stage: Stage, fragments: dict[int, FragmentSpec], parameters: Mapping[str, torch.nn.Parameter]
    ) -> None:
        super().__init__(stage, fragments, parameters)
        self._hidden = stage.model.config.get_text_config().hidden_size
        self._under_way: dict[Hashable, tuple[int, int, int]] = {}
        self._noise: dict[tuple[int, ...], torch.Tensor] = {}

    @property
    def in_flight(self) -> int:
        return len(self._under_way) + len(self._pending)

    def forward(
        self, key: Hashable, values: torch.Tensor, *, start: int, end: int, tokens: int, keep: bool = True,
        segments: Segments | None = None,
    ) -> torch.Tensor:
        self._sleep(self.times.forward_s * (end - start))
        if keep:
            self._under_way[key] = start, end, tokens
        return values if start else self._embedded(tuple(values.shape))

    def loss(
        self, key: Hashable, values: torch.Tensor, ids: torch.Tensor, *, start: int, end: int, keep: bool = True,
        segments: Segments | None = None,
    ) -> tuple[float, torch.Tensor | None]:
        left = self.forward(key, values, start=start, end=end, tokens=ids.numel(), keep=keep)
        return 1.0, self.backward(key, left) if keep else None

    def backward(self, key: Hashable, gradient: torch.Tensor | None) -> torch.Tensor | None:
        start, end, tokens = self._under_way.pop(key)
        self._sleep(self.times.backward_s * (end - start))
        self._pending[key] = _Pending(tokens, tokens, {fragment: {} for fragment in range(start, end)})
        return gradient if start else None

    def forget(self, key: Hashable) -> None:
        self._pending.pop(key, None)
        self._under_way.pop(key, None)

    @staticmethod
    def _sleep(seconds: float) -> None:
        Emulated.turns_s += seconds
        time.sleep(max(0.0, seconds - Emulated.owed_s))

    def _embedded(self, shape: tuple[int, ...]) -> torch.Tensor:
        if shape not in self._noise:
            self._noise[shape] = torch.randn(*shape, self._hidden, generator=torch.Generator().manual_seed(0))
        return self._noise[shape]


class Calibrated(WorkQueue):
    """The product's queue, whose turns with `Emulated` take in the mean what they are to take, all in all."""

    def _run(self, item: _Item, *, busy: bool) -> None:
        began, before_s = time.monotonic(), Emulated.turns_s
        super()._run(item, busy=busy)
        wanted_s = Emulated.turns_s - before_s
        if wanted_s:
            took_s = time.monotonic() - began
            Emulated.owed_s = min(max(0.0, Emulated.owed_s + took_s - wanted_s), MOST_OWED_S)


def sleep_until(at: float) -> None:
    time.sleep(max(0.0, at - time.monotonic()))
