"""Segments and prefixes through the chain: each stage makes the mask itself, and all is as in one process (I6)."""

from __future__ import annotations

import itertools

import pytest
import torch

from swarm.data.batch import Batch, Segment
from swarm.model.prefix import model_inputs, segment_mask, targets_of
from swarm.pipeline import wire
from swarm.pipeline.compute import StageCompute
from swarm.pipeline.messages import Verdict
from swarm.train.run_source import hold
from tests.unit.averaging.simulation import play
from tests.unit.pipeline import chains
from tests.unit.pipeline.chains import A_TARGET, Peer, Visitor, World, finish, largest_error, sums
from tests.unit.pipeline.test_real_stages import CUTS, NUM, RUN
from tests.unit.pipeline.toy import VOCABULARY, Toy, microbatches

Segments = tuple[tuple[Segment, ...], ...]
TOKENS = torch.randint(0, 257, (4, 16), generator=torch.Generator().manual_seed(1))
SEGMENTS: Segments = (((0, 16),), ((5, 16),), ((0, 3), (4, 6), (2, 5), (2, 2)), ((15, 16),))
"""15, 11, 7 and 1 targets"""


def part_of_real(part: tuple[int, int]) -> StageCompute:
    held = hold(RUN, part=part)
    return StageCompute(held.stage, {f.index: f for f in held.fragments}, dict(held.stage.held()))


def in_one_real_process(tokens: torch.Tensor, segments: Segments) -> tuple[float, dict[str, torch.Tensor]]:
    model = hold(RUN).model
    loss = model(
        input_ids=tokens, labels=targets_of(tokens, segments), **model_inputs(model, segments)
    ).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_has_the_bits_of_one_process(cut: tuple[int, ...]) -> None:
    wanted_loss, wanted = in_one_real_process(TOKENS, SEGMENTS)
    spans = list(itertools.pairwise(cut))
    stages = [part_of_real(span) for span in spans]
    values, shape = TOKENS, (4, 16, 32)
    for stage, (start, end) in zip(stages[:-1], spans, strict=False):
        left = stage.forward(0, values, start=start, end=end, tokens=64, segments=SEGMENTS)
        values = wire.decode_values(wire.encode_values(left, 32), shape, 32)
    loss, gradient = stages[-1].loss(0, values, TOKENS, start=spans[-1][0], end=NUM, segments=SEGMENTS)
    for stage in reversed(stages[:-1]):
        assert gradient is not None
        gradient = stage.backward(0, wire.decode_values(wire.encode_values(gradient, 32), shape, 32))
    assert loss == wanted_loss
    found = {
        name: values for stage in stages for names in stage._pending[0].gradients.values()
        for name, values in names.items()
    }
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == wanted.keys()
    return all(float((found[n] - wanted[n]).norm()) <= 1e-5 * float(wanted[n].norm()) + 1e-9 for n in wanted)


def test_in_pieces_the_mean_is_by_targets() -> None:
    """A mean of the pieces' means would be another loss; a piece without any target is nothing."""
    tokens = torch.cat([TOKENS, TOKENS[:1]])
    segments: Segments = (*SEGMENTS, ((16, 16),))
    wanted_loss, wanted = in_one_real_process(tokens, segments)
    stage = part_of_real((0, NUM))
    stage.pieces.at_once = 1
    loss, _ = stage.loss(0, tokens, tokens, start=0, end=NUM, segments=segments)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    names = {name: values for found in stage._pending[0].gradients.values() for name, values in found.items()}
    assert close(names, wanted)
    asked, _ = stage.loss(1, tokens, tokens, start=0, end=NUM, segments=segments, keep=False)
    assert asked == pytest.approx(wanted_loss, rel=1e-6)


def test_several_microbatches_make_the_gradient_of_the_mean_over_all_targets() -> None:
    """15, 11, 7, 1 and no targets: the books count tokens all the same (I2)."""
    _, wanted = in_one_real_process(TOKENS, SEGMENTS)
    first, last = part_of_real((0, 2)), part_of_real((2, NUM))
    whole = Batch(TOKENS, SEGMENTS)
    for key, part in enumerate([*whole.split(1), Batch(TOKENS[:1], (((16, 16),),))]):
        values = first.forward(key, part.tokens, start=0, end=2, tokens=16, segments=part.segments)
        loss, gradient = last.loss(key, values, part.tokens, start=2, end=NUM, segments=part.segments)
        assert gradient is not None and torch.isfinite(gradient).all()
        first.backward(key, gradient)
        if not part.num_targets:
            assert loss == 0.0 and not gradient.any()
        for stage in (first, last):
            stage.commit(key)
    for stage in (first, last):
        found = {}
        for fragment in stage.fragments:
            assert stage.targets(fragment) == whole.num_targets == 34
            gradients, tokens = stage.take(fragment)
            assert tokens == 5 * 16 and stage.targets(fragment) == stage.tokens(fragment) == 0
            found |= gradients
        assert close(found, {name: wanted[name] for name in found})


class Looking(Toy):
    """A toy whose tokens look at each other, as far as the mask lets them, and know where they are."""

    def forward(
        self, values: torch.Tensor, *, start: int, end: int, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        length = values.shape[1]
        mask = segment_mask((((0, length),),)) if attention_mask is None else attention_mask
        places = torch.arange(length)[None] if position_ids is None else position_ids
        looks = torch.softmax(mask[:, 0], dim=-1)
        hidden = self.model.embedding(values) if start == 0 else values
        for block in self.model.blocks[start:end]:
            hidden = hidden + torch.tanh(block(looks @ hidden) + 0.1 * places[:, :, None])
        return self.model.head(hidden) if end == len(self.model.blocks) else hidden


def looked_at(whole: Looking, batch: Batch) -> torch.Tensor:
    mask, offsets = None, None
    if batch.segments is not None:
        mask = segment_mask(batch.segments)
        offsets = torch.tensor([[at for _, size in row for at in range(size)] for row in batch.segments])
    return whole(batch.tokens, start=0, end=3, attention_mask=mask, position_ids=offsets)


PACKED: list[Segments | None] = [
    (((0, 6),), ((2, 6),), ((5, 6),)), (((3, 6),),) * 3, (((1, 2), (0, 4)), ((0, 6),), ((4, 5), (1, 1))),
    (((0, 2), (0, 2), (2, 2)), ((0, 6),), ((0, 3), (1, 3))), (((6, 6),), ((0, 3), (3, 3)), ((5, 6),)), None,
]


@pytest.mark.parametrize("as_origin", [False, True])
def test_segments_travel_with_the_microbatch(as_origin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "Toy", Looking)
    texts = [Batch(*both) for both in zip(microbatches(6, seed=1, sequences=3), PACKED, strict=True)]
    whole = Looking(3)
    losses = []
    for batch in texts:
        loss = whole.mean_loss(looked_at(whole, batch), targets_of(batch.tokens, batch.segments))
        (loss * batch.num_targets * A_TARGET).backward()
        losses.append(float(loss.detach()))
    wanted = {name: p.grad for name, p in whole.model.named_parameters() if p.grad is not None}

    async def story() -> None:
        world = World(3, seed=1)
        peers = [Peer(world, f"peer{i}", i, i + 1) for i in range(3)]
        if as_origin:
            await finish([peers[0].origin(texts)])
            assert sorted(peers[0].losses) == pytest.approx(sorted(losses), rel=1e-5)
        else:
            for number, batch in enumerate(texts):
                answer = await peers[0].chain.begin_own(number, batch)
                assert answer.loss == pytest.approx(losses[number], rel=1e-6)
                for peer in peers:
                    own = [Verdict(number=number, start=peer.first, end=peer.end)]
                    assert await peer.chain.judge(peers[0].id, own) == []
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


def test_a_step_of_an_origin_has_the_mean_over_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "Toy", Looking)
    texts = [Batch(*both) for both in zip(microbatches(6, seed=1, sequences=3), PACKED, strict=True)]
    whole, total = Looking(3), 0.0
    for batch in texts:
        loss = whole.mean_loss(looked_at(whole, batch), targets_of(batch.tokens, batch.segments))
        total += float(loss.detach()) * batch.num_targets

    async def story() -> None:
        world = World(3, seed=1)
        peers = [Peer(world, f"peer{i}", i, i + 1) for i in range(3)]
        loss = await peers[0].origin([])[0].step(texts, version=0)
        assert loss == pytest.approx(total / sum(batch.num_targets for batch in texts), rel=1e-5)

    play(story())


def test_a_guest_is_told_what_comes_after_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "Toy", Looking)
    (tokens,) = microbatches(1, seed=2)
    prefixed = Batch(tokens, (((6, 6),), ((4, 6),)))
    packed = Batch(tokens, (((2, 3), (0, 3)), ((4, 6),)))
    whole = Looking(3)
    with torch.no_grad():
        causal = looked_at(whole, Batch(tokens))[:, -1:]
        wanted = looked_at(whole, prefixed)[:, -1:]
        loss = whole.mean_loss(looked_at(whole, packed), targets_of(tokens, packed.segments))

    async def story() -> None:
        world = World(3, seed=2)
        for index in range(3):
            Peer(world, f"peer{index}", index, index + 1)
        asking = Visitor(world, "guest").guest
        assert torch.equal(await asking.logits(prefixed), wanted)
        assert torch.equal(await asking.logits(Batch(tokens)), causal)
        assert not torch.equal(wanted, causal) and wanted.shape == (2, 1, VOCABULARY)
        assert await asking.loss(packed) == pytest.approx(float(loss), rel=1e-6)

    play(story())
