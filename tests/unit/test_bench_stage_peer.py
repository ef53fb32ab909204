"""The parts that `bench.py pipeline` puts into peers: computing of a given speed, and what they tell."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.averaging.simulation import play
from tests.unit.pipeline import chains
from tests.unit.pipeline.chains import Peer, World, finish
from tests.unit.pipeline.toy import HIDDEN, Toy, fragments_of, in_one_process, microbatches

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches.systems import emulated, stage_peer
from benches.systems.emulated import Emulated, Padded, Times

NUM = 3


class Clock:
    """Sleeping is all that takes time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(emulated, "time", made)
    return made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(stage_peer, "tell", lambda event, **values: lines.append({"event": event, **values}))
    return lines


def stage(kind: type[Any], first: int, end: int, *, forward_s: float = 1.0, backward_s: float = 2.0) -> Any:
    """Fragments [first, end) of a toy."""
    toy = Toy(NUM)
    toy.model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=HIDDEN))
    fragments = {index: spec for index, spec in fragments_of(NUM).items() if first <= index < end}
    names = {tensor.name for spec in fragments.values() for tensor in spec.tensors}
    parameters = {name: values for name, values in toy.model.named_parameters() if name in names}
    made = kind(toy, fragments, parameters)
    type(made).times = Times(forward_s, backward_s)
    return made


def test_padded_computing_is_real_and_lasts_as_long_as_was_said(clock: Clock) -> None:
    texts = microbatches(4, seed=3)
    wanted, losses = in_one_process(NUM, texts)
    first, last = stage(Padded, 0, 1), stage(Padded, 1, 3)
    for key, tokens in enumerate(texts):
        began = clock.now_s
        values = first.forward(key, tokens, start=0, end=1, tokens=tokens.numel())
        assert clock.now_s == began + 1
        loss, gradient = last.loss(key, values, tokens, start=1, end=3)
        assert clock.now_s == began + 1 + 2 * (1 + 2), "two fragments, forward and backward"
        assert first.backward(key, gradient) is None
        assert clock.now_s == began + 1 + 6 + 2
        assert loss == pytest.approx(losses[key], rel=1e-6)
        first.commit(key)
        last.commit(key)
    for part in (first, last):
        for fragment in part.fragments:
            gradients, tokens = part.take(fragment)
            for name, values in gradients.items():
                assert torch.allclose(values * tokens, wanted[name], rtol=1e-4, atol=1e-6)


def test_computing_that_is_slower_than_was_said_is_not_made_slower_yet(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = stage(Padded, 0, 1)
    run = emulated.StageCompute._run

    def slowly(*args: Any, **options: Any) -> torch.Tensor:
        clock.sleep(5)
        return run(*args, **options)

    monkeypatch.setattr(emulated.StageCompute, "_run", slowly)
    (tokens,) = microbatches(1, seed=1)
    slow.forward(1, tokens, start=0, end=1, tokens=tokens.numel())
    assert clock.now_s == 5


def test_emulated_computing_passes_on_what_comes_and_keeps_the_books(clock: Clock) -> None:
    first, last = stage(Emulated, 0, 1), stage(Emulated, 1, 3)
    (tokens,) = microbatches(1, seed=1)
    values = first.forward(7, tokens, start=0, end=1, tokens=tokens.numel())
    assert values.shape == (*tokens.shape, HIDDEN) and first.in_flight == 1
    loss, gradient = last.loss(7, values, tokens, start=1, end=3)
    assert loss == 1.0 and gradient is not None and torch.equal(gradient, values)
    assert first.backward(7, gradient) is None
    assert clock.now_s == 1 + 2 * 3 + 2
    for part in (first, last):
        assert part.in_flight == 1, "until the verdict"
        part.commit(7)
        assert part.in_flight == 0
        assert [part.take(fragment) for fragment in part.fragments] == [({}, tokens.numel())] * len(part.fragments)


def test_what_turns_took_too_long_is_taken_off_the_next_ones(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Emulated, "turns_s", 0.0)
    monkeypatch.setattr(Emulated, "owed_s", 0.0)
    queue = emulated.Calibrated(clock.monotonic)
    part = stage(Emulated, 0, 1)
    (tokens,) = microbatches(1, seed=1)

    def turn(key: int, packing_s: float) -> None:
        part.forward(key, tokens, start=0, end=1, tokens=tokens.numel())
        clock.sleep(packing_s)

    async def story() -> list[float]:
        ends = []
        for key, packing_s in enumerate((0.25, 0.25, 0.25, 1.75, 0.25, 0.25)):
            done = queue(lambda key=key, packing_s=packing_s: turn(key, packing_s), urgency=2)  # type: ignore[misc]
            assert queue.run_next()
            await done
            ends.append(clock.now_s)
        return ends

    ends = asyncio.run(story())
    assert ends == [1.25, 2.25, 3.25, 5.75, 6.0, 7.0], "a second each; who stalled catches up, by a second at most"
    assert Emulated.owed_s == pytest.approx(0.25)


def test_emulated_computing_forgets(clock: Clock) -> None:
    first = stage(Emulated, 0, 1)
    (tokens,) = microbatches(1, seed=1)
    first.forward(1, tokens, start=0, end=1, tokens=tokens.numel(), keep=False)
    assert first.in_flight == 0
    for key in (2, 3):
        first.forward(key, tokens, start=0, end=1, tokens=tokens.numel())
    first.backward(3, torch.zeros(1))
    first.forget(2)
    first.forget(3)
    assert first.in_flight == 0 and first.tokens(0) == 0


def test_a_commit_is_told_with_the_fragments_it_was_of(clock: Clock, told: list[dict[str, Any]]) -> None:
    part = stage(stage_peer.told(Emulated, Times(0.5, 0.5)), 1, 3)
    (tokens,) = microbatches(1, seed=1)
    values = torch.zeros(*tokens.shape, HIDDEN)
    part.loss(("P", 5, 1), values, tokens, start=1, end=3)
    part.commit(("P", 5, 1))
    part.loss(9, values, tokens, start=1, end=3)
    part.commit(9)  # the hub's
    assert told == [{"event": "committed", "origin": "P", "number": 5, "start": 1, "end": 3}]
    assert part.tokens(1) == 2 * tokens.numel()


def test_an_origin_tells_the_path_and_a_chain_tells_who_was_asked_instead(
    monkeypatch: pytest.MonkeyPatch, told: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(chains, "Chain", stage_peer.ToldChain)
    monkeypatch.setattr(chains, "Origin", stage_peer.ToldOrigin)

    async def story() -> None:
        world = World(2, seed=1)
        first, one, other = Peer(world, "origin", 0, 1), Peer(world, "one", 1, 2), Peer(world, "other", 1, 2)
        asyncio.get_running_loop().call_later(0.5, one.kill)
        await finish([first.origin(microbatches(40, seed=2))])
        rerouted = [line for line in told if line["event"] == "rerouted"]
        assert len(rerouted) == first.chain.onward.reroutes > 0
        assert {(line["failed"], line["asked"]) for line in rerouted} == {(one.id, other.id)}
        done = {line["number"]: line["path"] for line in told if line["event"] == "done"}
        assert sorted(done) == list(range(40))
        assert {tuple(map(tuple, path)) for path in done.values()} == {
            ((first.id, 0, 1), (holder.id, 1, 2)) for holder in (one, other)
        }

    play(story())


def test_what_is_put_in_can_be_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("StageCompute", "Chain", "Origin"):
        monkeypatch.setattr(stage_peer.serving, name, None)
    monkeypatch.setattr(stage_peer.calls, "serve", stage_peer.calls.serve)
    flags = ["--forward-s", "0.1", "--backward-s", "0.2"]
    stage_peer.install(stage_peer.parser().parse_args(flags))
    parts: Any = stage_peer.serving
    assert issubclass(parts.StageCompute, Padded) and parts.StageCompute.times == Times(0.1, 0.2)
    assert (parts.Chain, parts.Origin) == (stage_peer.ToldChain, stage_peer.ToldOrigin)
    for name in ("in_flight", "each_s", "on_done"):
        monkeypatch.setattr(stage_peer.Hub, name, getattr(stage_peer.Hub, name))
    stage_peer.install(stage_peer.parser().parse_args([*flags, "--emulate", "--hub", "3", "9", "--each-s", "2"]))
    assert issubclass(parts.StageCompute, Emulated) and parts.Origin is stage_peer.Hub
    assert stage_peer.Hub.in_flight == [3, 9] and stage_peer.Hub.each_s == 2.0
    assert stage_peer.calls.serve is stage_peer.serve_hub
