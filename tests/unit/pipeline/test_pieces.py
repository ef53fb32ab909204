"""Out of memory at a stage: the same gradients from ever smaller pieces, with one word about it each time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from swarm.pipeline.compute import StageCompute
from swarm.pipeline.pieces import Pieces, share, spans
from tests.unit.averaging.simulation import play
from tests.unit.pipeline.chains import Peer, World, finish, largest_error, sums
from tests.unit.pipeline.toy import Toy, fragments_of, in_one_process, microbatches

NUM = 3


class Small:
    """Part of a toy on a device that has room for `limit` sequences at once, forward or backward."""

    def __init__(self, first: int, end: int, *, forward: int = 1000, backward: int = 1000) -> None:
        toy = Toy(NUM)
        fragments = {index: spec for index, spec in fragments_of(NUM).items() if first <= index < end}
        names = {tensor.name for spec in fragments.values() for tensor in spec.tensors}
        self.parameters = {name: p for name, p in toy.model.named_parameters() if name in names}
        self.compute = StageCompute(toy, fragments, self.parameters)  # type: ignore[arg-type]
        self.first, self.end = first, end
        self.said: list[str] = []
        self.compute.pieces.warn = self.said.append
        self.calls = with_room(toy.model.blocks[first], forward=forward, backward=backward)  # type: ignore[index]


def with_room(module: torch.nn.Module, *, forward: int, backward: int) -> list[tuple[str, int]]:
    """Let a module of the stage run out of memory with more sequences; returns a list that its calls go into."""
    calls: list[tuple[str, int]] = []

    def come_back(gradient: torch.Tensor) -> None:
        calls.append(("backward", len(gradient)))
        if len(gradient) > backward:
            raise torch.OutOfMemoryError("no room for these gradients")

    def hook(_: torch.nn.Module, __: Any, left: torch.Tensor) -> None:
        calls.append(("forward", len(left)))
        if len(left) > forward:
            raise torch.OutOfMemoryError("no room for these activations")
        if left.requires_grad:
            left.register_hook(come_back)

    module.register_forward_hook(hook)
    return calls


def through(parts: list[Small], key: int, tokens: torch.Tensor) -> float:
    """One microbatch down the stages and back, and committed."""
    values = tokens
    for part in parts[:-1]:
        values = part.compute.forward(key, values, start=part.first, end=part.end, tokens=tokens.numel())
    loss, gradient = parts[-1].compute.loss(key, values, tokens, start=parts[-1].first, end=parts[-1].end)
    for part in reversed(parts[:-1]):
        assert gradient is not None
        gradient = part.compute.backward(key, gradient)
    for part in parts:
        part.compute.commit(key)
        assert part.compute.in_flight == 0
    return loss


def gradients_of(parts: list[Small]) -> dict[str, torch.Tensor]:
    found = {}
    for part in parts:
        for fragment in part.compute.fragments:
            gradients, tokens = part.compute.take(fragment)
            found |= {name: values * tokens for name, values in gradients.items()}
    return found


@pytest.mark.parametrize(("where", "forward", "backward"), [
    (0, 4, 1000), (0, 1000, 4), (1, 4, 1000), (1, 1000, 4), (2, 4, 1000), (2, 1000, 4), (2, 4, 1), (1, 2, 1),
])
@pytest.mark.parametrize("sequences", [8, 7])
def test_the_gradients_are_those_of_the_whole(where: int, forward: int, backward: int, sequences: int) -> None:
    texts = microbatches(4, seed=1, sequences=sequences)
    wanted, losses = in_one_process(NUM, texts)
    room = [{"forward": forward, "backward": backward} if index == where else {} for index in range(NUM)]
    parts = [Small(index, index + 1, **room[index]) for index in range(NUM)]
    assert [through(parts, key, tokens) for key, tokens in enumerate(texts)] == pytest.approx(losses, rel=1e-6)
    assert largest_error(gradients_of(parts), wanted) < 1e-6
    assert [bool(part.said) for part in parts] == [index == where for index in range(NUM)]


def test_it_is_said_once_and_the_smaller_size_stays() -> None:
    texts = microbatches(5, seed=2, sequences=8)
    parts = [Small(0, 1), Small(1, 3, forward=3)]
    for key, tokens in enumerate(texts):
        through(parts, key, tokens)
    assert parts[1].said == [
        f"out of memory: going on with {at_once} of a microbatch's sequences at once" for at_once in (4, 2)
    ]
    calls = [size for kind, size in parts[1].calls if kind == "forward"]
    assert calls == [8, 4] + [2] * 4 * 5, "it runs out in the first microbatch only"
    assert parts[0].said == [] and {size for _, size in parts[0].calls} == {8}


def test_in_pieces_only_one_piece_has_a_graph_and_goes_forward_again_for_it() -> None:
    (tokens,) = microbatches(1, seed=3, sequences=4)
    part = Small(0, 1, forward=2)
    values = part.compute.forward(0, tokens, start=0, end=1, tokens=tokens.numel())
    assert part.calls == [("forward", 4), ("forward", 2), ("forward", 2)]
    assert part.compute.in_flight == 1 and part.compute._graphs[0].left is None
    part.calls.clear()
    part.compute.backward(0, torch.ones_like(values))
    assert part.calls == [("forward", 2), ("backward", 2)] * 2


def test_pieces_use_the_weights_of_the_forward_that_was_sent_on() -> None:
    (tokens,) = microbatches(1, seed=4, sequences=4)
    wanted, _ = in_one_process(NUM, [tokens])
    parts = [Small(0, 1, forward=2), Small(1, 2, backward=2), Small(2, 3)]
    values = tokens
    for part in parts[:2]:
        values = part.compute.forward(0, values, start=part.first, end=part.end, tokens=tokens.numel())
        part.compute.before_write()
        with torch.no_grad():
            for parameter in part.parameters.values():
                parameter.add_(1.0)
    _, gradient = parts[2].compute.loss(0, values, tokens, start=2, end=3)
    for part in (parts[1], parts[0]):
        assert gradient is not None
        gradient = part.compute.backward(0, gradient)
    for part in parts:
        part.compute.commit(0)
    assert largest_error(gradients_of(parts), wanted) < 1e-6


def test_where_one_sequence_is_too_much_it_is_the_error_that_it_is_and_nothing_stays() -> None:
    (tokens,) = microbatches(1, seed=5, sequences=4)
    for room in ({"forward": 0}, {"backward": 0}):
        part = Small(0, 3, **room)
        with pytest.raises(torch.OutOfMemoryError):
            part.compute.loss(0, tokens, tokens, start=0, end=3)
        assert part.compute.in_flight == 0 and part.compute.pieces.at_once == 1
        places = {p.data_ptr() for p in part.parameters.values()}
        part.compute.before_write()
        assert {p.data_ptr() for p in part.parameters.values()} == places, "no graph needs the old weights"


def test_questions_are_answered_in_pieces_as_well() -> None:
    (tokens,) = microbatches(1, seed=6, sequences=5)
    wanted = Toy(NUM)(tokens, start=0, end=NUM).detach()
    part = Small(0, 3, forward=2)
    loss, nothing = part.compute.loss(0, tokens, tokens, start=0, end=3, keep=False)
    assert nothing is None and loss == pytest.approx(in_one_process(NUM, [tokens])[1][0], rel=1e-6)
    logits = part.compute.logits(0, tokens, start=0, end=3, positions=2)
    torch.testing.assert_close(logits, wanted[:, -2:])
    assert part.compute.in_flight == 0 and len(part.said) == 1, "5 sequences, and then 2"


def test_a_chain_with_a_stage_that_runs_out_of_memory_loses_nothing() -> None:
    texts = microbatches(20, seed=7, sequences=6)
    wanted, losses = in_one_process(3, texts)

    async def story() -> None:
        world = World(3, seed=7, twice=0.2)
        peers = [Peer(world, f"peer{i}", *stage) for i, stage in enumerate([(0, 1), (1, 2), (1, 3), (2, 3)])]
        for peer, room in ((peers[1], {"forward": 2, "backward": 1000}), (peers[2], {"forward": 1000, "backward": 1})):
            with_room(peer.stage.model.blocks[1], **room)  # type: ignore[index]
        clock = asyncio.get_running_loop().time
        began = clock()
        made = peers[0].origin(texts)
        await finish([made])
        assert made[0].lost_tokens == 0 and clock() - began < 60
        assert sorted(peers[0].losses) == pytest.approx(sorted(losses), rel=1e-5)
        assert largest_error(sums(world), wanted) < 1e-5
        assert [peer.compute.pieces.at_once for peer in peers] == [None, 1, 1, None]

    play(story())


@pytest.mark.parametrize(("sequences", "at_once", "edges"), [
    (4, 4, [0, 4]), (4, 2, [0, 2, 4]), (5, 2, [0, 2, 4, 5]), (1, 1, [0, 1]), (3, 1, [0, 1, 2, 3]),
])
def test_pieces_are_all_of_it(sequences: int, at_once: int, edges: list[int]) -> None:
    found = spans(sequences, at_once)
    assert [(span.start, span.stop) for span in found] == list(zip(edges, edges[1:], strict=False))
    assert sum(share(span, sequences) for span in found) == pytest.approx(1.0)


@contextmanager
def room_for(limit: int) -> Iterator[tuple[Callable[[int], int], list[int]]]:
    tried: list[int] = []

    def compute(at_once: int) -> int:
        tried.append(at_once)
        if at_once > limit:
            raise torch.OutOfMemoryError("full")
        return at_once

    yield compute, tried


def test_it_is_halved_until_it_fits() -> None:
    pieces = Pieces()
    with room_for(3) as (compute, tried):
        assert pieces.as_it_fits(13, compute) == 3 and pieces.as_it_fits(20, compute) == 3
        assert pieces.as_it_fits(2, compute) == 2
        assert tried == [13, 6, 3, 3, 2]


def test_other_errors_are_left_alone() -> None:
    pieces = Pieces()
    with pytest.raises(ZeroDivisionError):
        pieces.as_it_fits(4, lambda at_once: 1 // 0)
    assert pieces.at_once is None
