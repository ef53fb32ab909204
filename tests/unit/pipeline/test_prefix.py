"""A bidirectional prefix through the chain: each stage makes the mask itself, and all is as in one process."""

from __future__ import annotations

import itertools

import pytest
import torch

from swarm.model.prefix import after_prefix, prefix_mask
from swarm.pipeline import wire
from swarm.pipeline.compute import StageCompute
from swarm.pipeline.messages import Verdict
from swarm.train.run_source import hold
from tests.unit.averaging.simulation import play
from tests.unit.pipeline import chains
from tests.unit.pipeline.chains import Peer, Visitor, World, largest_error, sums
from tests.unit.pipeline.test_real_stages import CUTS, NUM, RUN
from tests.unit.pipeline.toy import VOCABULARY, Toy, microbatches

TOKENS = torch.randint(0, 257, (3, 16), generator=torch.Generator().manual_seed(1))
PREFIXES = [0, 5, 15]


def part_of_real(part: tuple[int, int]) -> StageCompute:
    held = hold(RUN, part=part)
    return StageCompute(held.stage, {f.index: f for f in held.fragments}, dict(held.stage.held()))


def in_one_real_process(targets: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model = hold(RUN).model
    mask = prefix_mask(torch.tensor(PREFIXES), 16)
    loss = model(input_ids=TOKENS, labels=targets, attention_mask=mask).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("on_prefix", [False, True])
def test_every_cut_has_the_bits_of_one_process(cut: tuple[int, ...], on_prefix: bool) -> None:
    targets = TOKENS if on_prefix else after_prefix(TOKENS, torch.tensor(PREFIXES))
    wanted_loss, wanted = in_one_real_process(targets)
    spans = list(itertools.pairwise(cut))
    stages = [part_of_real(span) for span in spans]
    values, shape = TOKENS, (3, 16, 32)
    for stage, (start, end) in zip(stages[:-1], spans, strict=False):
        left = stage.forward(0, values, start=start, end=end, tokens=48, prefixes=PREFIXES)
        values = wire.decode_values(wire.encode_values(left, 32), shape, 32)
    loss, gradient = stages[-1].loss(0, values, targets, start=spans[-1][0], end=NUM, prefixes=PREFIXES)
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


def test_in_pieces_the_mean_is_by_targets() -> None:
    """The sequences have 15, 11 and 1 of them: a mean of the pieces' means would be another loss."""
    targets = after_prefix(TOKENS, torch.tensor(PREFIXES))
    wanted_loss, wanted = in_one_real_process(targets)
    stage = part_of_real((0, NUM))
    stage.pieces.at_once = 1
    loss, _ = stage.loss(0, TOKENS, targets, start=0, end=NUM, prefixes=PREFIXES)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    for names in stage._pending[0].gradients.values():
        for name, values in names.items():
            assert float((values - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm()) + 1e-9, name
    asked, _ = stage.loss(1, TOKENS, targets, start=0, end=NUM, prefixes=PREFIXES, keep=False)
    assert asked == pytest.approx(wanted_loss, rel=1e-6)


class Looking(Toy):
    """A toy whose tokens look at each other, as far as the mask lets them."""

    def forward(
        self, values: torch.Tensor, *, start: int, end: int, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        length = values.shape[1]
        mask = prefix_mask(torch.zeros(1, dtype=torch.int64), length) if attention_mask is None else attention_mask
        looks = torch.softmax(mask[:, 0], dim=-1)
        hidden = self.model.embedding(values) if start == 0 else values
        for block in self.model.blocks[start:end]:
            hidden = hidden + torch.tanh(block(looks @ hidden))
        return self.model.head(hidden) if end == len(self.model.blocks) else hidden


@pytest.mark.parametrize("on_prefix", [False, True])
def test_prefixes_travel_with_the_microbatch(on_prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "Toy", Looking)
    texts = microbatches(6, seed=1, sequences=3)
    prefixes = [[0, 2, 5], [3, 3, 3], [1, 0, 4], [0, 0, 0], [5, 5, 5], []]
    whole = Looking(3)
    losses = []
    for tokens, lengths in zip(texts, prefixes, strict=True):
        mask = prefix_mask(torch.tensor(lengths), 6) if lengths else None
        targets = after_prefix(tokens, torch.tensor(lengths)) if lengths and not on_prefix else tokens
        loss = whole.mean_loss(whole(tokens, start=0, end=3, attention_mask=mask), targets)
        (loss * tokens.numel()).backward()
        losses.append(float(loss.detach()))
    wanted = {name: p.grad for name, p in whole.model.named_parameters() if p.grad is not None}

    async def story() -> None:
        world = World(3, seed=1)
        peers = [Peer(world, f"peer{i}", i, i + 1) for i in range(3)]
        for number, (tokens, lengths) in enumerate(zip(texts, prefixes, strict=True)):
            answer = await peers[0].chain.begin_own(number, tokens, prefixes=lengths, loss_on_prefix=on_prefix)
            assert answer.loss == pytest.approx(losses[number], rel=1e-6)
            for peer in peers:
                own = [Verdict(number=number, start=peer.first, end=peer.end)]
                assert await peer.chain.judge(peers[0].id, own) == []
        assert largest_error(sums(world), wanted) < 1e-5

    play(story())


def test_a_guest_is_told_what_comes_after_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "Toy", Looking)
    (tokens,) = microbatches(1, seed=2)
    whole = Looking(3)
    with torch.no_grad():
        causal = whole(tokens, start=0, end=3)[:, -1:]
        mask = prefix_mask(torch.tensor([6, 4]), 6)
        wanted = whole(tokens, start=0, end=3, attention_mask=mask)[:, -1:]

    async def story() -> None:
        world = World(3, seed=2)
        for index in range(3):
            Peer(world, f"peer{index}", index, index + 1)
        asking = Visitor(world, "guest").guest
        assert torch.equal(await asking.logits(tokens, prefixes=[6, 4]), wanted)
        assert torch.equal(await asking.logits(tokens), causal)
        assert not torch.equal(wanted, causal) and wanted.shape == (2, 1, VOCABULARY)

    play(story())
