"""A run of adapters: a chain of stages against one process, a round of two peers, and the base that all must share."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.averaging.layout import layout_of
from swarm.config import (
    AveragingConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    canonical_json,
    run_from_json,
)
from swarm.data.batch import Batch
from swarm.errors import ConfigError
from swarm.model import working
from swarm.model.build import build_model
from swarm.model.lora import frozen_tensors, merged
from swarm.model.partial import join_stages
from swarm.network.keys import Keypair
from swarm.pipeline.compute import StageCompute
from swarm.train import pieces, run_source
from swarm.train.inner import InnerOptimizer
from swarm.train.optimizers import Optimizers
from swarm.train.run_source import Held, hold, load_states
from swarm.train.settings import Settings
from tests.unit.averaging.four_peers import meet, open_round
from tests.unit.averaging.simulation import Peer, World, play

NUM = 3
GPTJ: dict[str, Any] = {
    "model_type": "gptj", "n_layer": NUM, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 32,
    "vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256,
}
TEXTS = [torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]
CPU = torch.device("cpu")


def run_with(base: str = "nf4", **lora: Any) -> RunConfig:
    return RunConfig(
        name="test", fragments=NUM, data=DataConfig(stdlib=True),
        train=TrainConfig(sequence_length=16, batch_sequences=2, learning_rate=0.01, clip_norm=0.0),
        averaging=AveragingConfig(bits=4, outer_learning_rate=1.0, outer_momentum=0.5),
        model=ModelConfig(config=GPTJ, lora=LoraConfig(**{"rank": 4, "base": base, **lora})),
    )


def stirred(held: Held) -> Held:
    """Adapters that do something: with B zero, A has no gradient."""
    for name, parameter in held.model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return held


def compute_of(held: Held) -> StageCompute:
    trained = {tensor.name for fragment in held.fragments for tensor in fragment.tensors}
    parameters = {name: p for name, p in held.stage.held() if name in trained}
    return StageCompute(held.stage, {f.index: f for f in held.fragments}, parameters)


def chain(run: RunConfig, cuts: list[int], settings: Settings) -> tuple[list[StageCompute], list[float]]:
    stages = []
    for part in zip(cuts, cuts[1:], strict=False):
        held = stirred(hold(run, part=part))
        settings.prepare(held.model)
        stages.append(compute_of(held))
        stages[-1].pieces.at_once = settings.at_once or None
    losses = []
    for key, tokens in enumerate(TEXTS):
        values = tokens
        for stage, start, end in zip(stages[:-1], cuts, cuts[1:], strict=False):
            values = stage.forward(key, values, start=start, end=end, tokens=tokens.numel())
        loss, gradient = stages[-1].loss(key, values, tokens, start=cuts[-2], end=cuts[-1])
        for stage in reversed(stages[:-1]):
            assert gradient is not None
            gradient = stage.backward(key, gradient)
        losses.append(loss)
    return stages, losses


def taken(stages: list[StageCompute]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for stage in stages:
        for key in range(len(TEXTS)):
            stage.commit(key)
        for fragment in stage.fragments:
            found |= stage.take(fragment)[0]
    return found


@pytest.mark.parametrize("settings", [Settings(), Settings(recompute=True), Settings(recompute=True, at_once=1)])
@pytest.mark.parametrize("base", ["nf4", "fp32"])
def test_a_chain_of_stages_has_the_gradients_of_one_process(base: str, settings: Settings) -> None:
    run = run_with(base)
    model = stirred(hold(run)).model
    losses = [model(input_ids=tokens, labels=tokens).loss for tokens in TEXTS]
    (sum(losses) / len(TEXTS)).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    stages, found_losses = chain(run, [0, 1, NUM], settings)
    assert found_losses == pytest.approx([float(loss.detach()) for loss in losses], abs=1e-5)
    found = taken(stages)
    assert found.keys() == wanted.keys() and len(found) == NUM * 6 * 2
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-9, name


def test_computing_blocks_twice_changes_no_bit_in_a_stage() -> None:
    """Under writes as well: the second forward has the weights of the first."""
    found = []
    for settings in (Settings(), Settings(recompute=True)):
        run = dataclasses.replace(run_with(), model=ModelConfig(config=GPTJ))
        held = hold(run, part=(0, 2))
        settings.prepare(held.model)
        stage = compute_of(held)
        left = stage.forward(0, TEXTS[0], start=0, end=2, tokens=32)
        stage.before_write()
        with torch.no_grad():
            for parameter in held.model.parameters():
                parameter.add_(1.0)
        stage.backward(0, torch.ones_like(left))
        stage.commit(0)
        found.append({name: g for fragment in (0, 1) for name, g in stage.take(fragment)[0].items()})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_microbatches_add_up_to_the_step_of_the_batch() -> None:
    """Gradient accumulation, block by block computed twice, one sequence at a time."""
    run = dataclasses.replace(run_with(), model=ModelConfig(config=GPTJ))
    found = []
    for settings in (Settings(), Settings(recompute=True, at_once=1)):
        held = hold(run)
        settings.prepare(held.model)
        inner = InnerOptimizer(held.model, held.fragments, run, at_once=settings.at_once)
        loss = inner.gradients(Batch(TEXTS[0]))
        found.append((loss, {n: p.grad.clone() for n, p in held.model.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_everything_meets_in_one_type() -> None:
    run = run_with()
    stages, losses = chain(run, [0, 1, NUM], Settings(halved=True, recompute=True))
    assert losses == pytest.approx(chain(run, [0, 1, NUM], Settings())[1], rel=0.01)
    assert all(gradient.isfinite().all() for gradient in taken(stages).values())
    held = hold(run, part=(0, 1))
    Settings(halved=True).prepare(held.model)
    for name, parameter in held.model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert (working.rest_of(parameter) is not None) == parameter.requires_grad, name


def test_a_round_moves_the_adapters_of_both_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two peers train fragment 1 on different text; the real protocol averages it."""
    async def at_once(function: Callable[..., object], *arguments: object) -> object:
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)  # a thread takes real time, in which a made-up clock jumps ahead
    run = run_with()
    start = hold(run, part=(1, 2))
    layout = layout_of(start.fragments[0])
    assert layout.num_parameters == sum(p.numel() for p in start.model.parameters() if p.requires_grad)
    assert layout.num_parameters < 0.6 * sum(p.numel() for p in build_model(run).transformer.h[1].parameters())
    base = {name: tensor.clone() for name, tensor in frozen_tensors(start.model)}

    async def told() -> None:
        world = World(run, layout, seed=1)
        peers = [Peer(world, Keypair(bytes([number]) * 32)) for number in (1, 2)]
        models = []
        for number, peer in enumerate(peers):
            frozen = {name: tensor for name, tensor in hold(run, part=(1, 2)).stage.model.named_buffers()}
            shared = {**frozen, **dict(frozen_tensors(start.model)), **peer.parameters}
            stage = join_stages(run, start.fragments[0].blocks, shared)
            models.append(stage.model)
            inner = Optimizers(run)
            inner.add(start.fragments[0], peer.parameters)
            before = {name: p.detach().clone() for name, p in peer.parameters.items()}
            stage(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(number))).square().mean().backward()
            assert inner.step(0.01)
            assert all(not torch.equal(p, before[name]) for name, p in peer.parameters.items())
            peer.averager.serving = True
            peer.trained += 100
            peer.averager.trained(100)
        meet(peers)
        commit = await open_round(peers)
        assert commit is not None and len(commit.contributors) == 2
        await asyncio.sleep(10.0)  # of a made-up clock: until the other one has it, too
        assert peers[0].head[0] == peers[1].head[0] == 1 and peers[0].head[1] == peers[1].head[1]
        for model in models:
            for name, tensor in frozen_tensors(model):
                assert torch.equal(tensor, base[name]), name
        [one], [other] = (peer.averager.states() for peer in peers)
        assert torch.equal(one.weights, other.weights) and one.weights.numel() == layout.numel

    play(told())


def test_a_start_names_base_and_adapters(tmp_path: Path) -> None:
    build_model(dataclasses.replace(run_with(), model=ModelConfig(config=GPTJ), seed=7)).save_pretrained(
        tmp_path / "model", max_shard_size="10KB"
    )
    file = tmp_path / "run.yaml"
    file.write_text(
        f"name: test\nfragments: {NUM}\ndata: {{stdlib: true}}\n"
        f"model: {{source: {tmp_path / 'model'}, lora: {{rank: 2, targets: [q_proj, v_proj]}}}}\n"
    )
    assert run_source.base_folder(str(file), None) == str(tmp_path / "model")
    run, held = run_source.new_run(str(file), choose=lambda run: (1, 2))
    assert [f.index for f in held.fragments] == [1], "a part may start it: each peer reads the base for itself"
    assert len(run.base_digests) == len(run.initial_digests) == NUM and run.model.source is None
    assert run_from_json(canonical_json(run), run_id=run.run_id) == run
    joined = hold(run, weights_from=str(tmp_path / "model"))
    assert joined.base_digests == dict(enumerate(run.base_digests))
    assert all(run_source.matches_start(run, joined).values())
    piece, start = pieces.build(run, 2, device=CPU, settings=Settings(base=str(tmp_path / "model")))
    assert start.is_named and set(piece.parameters) == {tensor.name for tensor in piece.spec.tensors}
    with pytest.raises(ConfigError, match="frozen base of fragment 0 is not the one") as caught:
        hold(run)
    assert "--base" in caught.value.do


def test_where_the_base_is_is_remembered(tmp_path: Path) -> None:
    run, plain = run_with(), dataclasses.replace(run_with(), model=ModelConfig(config=GPTJ))
    assert run_source.remember_base(run, tmp_path, None) is None
    assert run_source.remember_base(run, tmp_path, str(tmp_path)) == str(tmp_path)
    assert run_source.remember_base(run, tmp_path, None) == str(tmp_path)
    with pytest.raises(ConfigError, match="--base is not for this run"):
        run_source.remember_base(plain, tmp_path, str(tmp_path))


def test_pieces_carry_their_own_part_of_the_base() -> None:
    held = hold(run_with(), part=(0, NUM))
    apart = pieces.split(held)
    names = [name for piece in apart for name in piece.tensors if name in dict(frozen_tensors(held.model))]
    assert len(names) == len(set(names)) == len(list(frozen_tensors(held.model))), "each in one piece"
    assert "transformer.wte.weight" in apart[0].tensors and "lm_head.weight" in apart[-1].tensors
    stage = pieces.stage_of(run_with(), apart[1:])
    values = torch.randn(1, 4, 16)
    with torch.no_grad():
        assert torch.equal(stage(values), held.stage(values, start=1, end=NUM))


def test_what_was_trained_comes_back_from_states_and_merges() -> None:
    run = run_with()
    held = stirred(hold(run))
    flat = {i: layout.flatten(dict(held.stage.held())) for i, layout in held.layouts.items()}
    fresh = hold(run)
    load_states(fresh, [dataclasses.replace(fresh.states[i], weights=values) for i, values in flat.items()])
    with torch.no_grad():
        wanted = held.model(input_ids=TEXTS[0]).logits
        assert torch.equal(fresh.model(input_ids=TEXTS[0]).logits, wanted)
        torch.testing.assert_close(merged(fresh.model)(input_ids=TEXTS[0]).logits, wanted, rtol=1e-4, atol=1e-4)
