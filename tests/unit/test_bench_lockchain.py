"""Stages in lock-step, for `bench.py pipeline --part loss`: they compute what one process does, and rounds add up."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from swarm.averaging.outer import learning_rate
from swarm.config import RunConfig, load_run
from swarm.data.batch import Batch
from swarm.data.sources import documents
from swarm.data.stream import PackedStream, tokenise
from swarm.data.tokenizer import load_tokenizer
from swarm.pipeline import wire
from swarm.train.inner import InnerOptimizer
from swarm.train.run_source import hold
from tests.swarm.support import GPTJ, write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches import pipeline_loss
from benches.lockchain import FP32, LockChain, schedule_of


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    torch.set_num_threads(1)
    return load_run(write_run(
        tmp_path, fragments=4, model={"config": {**GPTJ, "n_layer": 4}}, train={"total_tokens": 8_000},
        averaging={"tokens_per_round": 1_000},
    ))


@pytest.fixture
def tokens(run: RunConfig) -> torch.Tensor:
    return tokenise(documents(run.data)[0], load_tokenizer(run))


def one_process(run: RunConfig, tokens: torch.Tensor, *, num_steps: int, num_origins: int) -> dict[int, torch.Tensor]:
    """Plain inner steps of the whole model on the batches of all origins."""
    held = hold(run)
    inner = InnerOptimizer(held.model, held.fragments, run)
    length = run.train.sequence_length
    streams = [
        PackedStream(tokens, sequence_length=length, seed=run.seed, reader=f"origin-0-{number}")
        for number in range(num_origins)
    ]
    trained = 0
    for _ in range(num_steps):
        texts = [stream.next_batch(run.train.batch_sequences).tokens for stream in streams]
        inner.gradients(Batch(torch.cat(texts)))
        inner.step(learning_rate(run, trained))
        trained += num_origins * run.train.batch_sequences * length
    parameters = dict(held.model.named_parameters())
    return {index: layout.flatten(parameters) for index, layout in held.layouts.items()}


@pytest.mark.parametrize(("edges", "num_origins"), [((0, 4), 1), ((0, 1, 3, 4), 1), ((0, 2, 4), 3)])
def test_with_fp32_between_stages_it_is_one_process(
    run: RunConfig, tokens: torch.Tensor, edges: tuple[int, ...], num_origins: int
) -> None:
    chain = LockChain(run, edges, tokens, bits=FP32, num_origins=num_origins)
    for _ in range(6):
        chain.step()
    expected = one_process(run, tokens, num_steps=6, num_origins=num_origins)
    start = {index: state.weights for index, state in hold(run).states.items()}
    assert chain.tokens == 6 * num_origins * run.train.batch_sequences * run.train.sequence_length
    for index, weights in chain.weights().items():
        assert float((weights - expected[index]).norm() / (expected[index] - start[index]).norm()) < 2e-3


def test_int8_between_stages_is_what_the_codec_makes_of_it_both_ways(
    run: RunConfig, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = wire.encode_values
    monkeypatch.setattr(wire, "encode_values", lambda values, bits: sizes.append(bits) or encode(values, bits))
    exact, rough = (LockChain(run, (0, 2, 4), tokens, bits=bits) for bits in (FP32, 8))
    losses = [exact.step(), rough.step()]
    assert losses[0] == pytest.approx(losses[1], abs=1e-2) and losses[0] != losses[1]
    assert sizes == [FP32] * 8 + [8] * 8, "there and back for each of four microbatches"
    assert not torch.equal(exact.weights()[0], rough.weights()[0])
    sizes.clear()
    LockChain(run, (0, 2, 4), tokens, bits=4, back_bits=8).step()
    assert sizes == [4, 8] * 4


def test_holders_of_a_stage_share_the_microbatches_and_agree_after_a_round(
    run: RunConfig, tokens: torch.Tensor
) -> None:
    swarm = LockChain(run, (0, 1, 3, 4), tokens, bits=8, num_holders=3, num_origins=3)
    while swarm.tokens < run.train.total_tokens:
        swarm.step()
    weights = swarm.weights()
    for stage in swarm.stages:
        for index in range(stage[0].start, stage[0].end):
            states = [holder.ledgers[index].state for holder in stage]
            assert len({state.digest for state in states}) == 1
            assert states[0].version >= 4
            assert states[0].tokens == swarm.tokens, "the last round has all of it"
            assert all(holder.ledgers[index].pending_tokens == 0 for holder in stage)
            assert torch.allclose(weights[index], states[0].weights, atol=1e-6)
        assert all(holder.compute.in_flight == 0 for holder in stage)


def test_it_goes_on_from_a_checkpoint_where_the_schedule_was(run: RunConfig, tokens: torch.Tensor) -> None:
    first = LockChain(run, (0, 4), tokens, bits=FP32)
    for _ in range(3):
        first.step()
    start, before = first.weights(), first.tokens
    swarm = LockChain(run, (0, 2, 4), tokens, bits=8, num_holders=2, num_origins=2, start=start, before=before)
    assert swarm.tokens == before == swarm.stages[0][0].estimated_tokens()
    assert all(torch.equal(swarm.weights()[index], weights) for index, weights in start.items())
    swarm.step()
    assert swarm.tokens == before + 2 * run.train.batch_sequences * run.train.sequence_length
    assert all(torch.equal(first.weights()[index], weights) for index, weights in start.items()), "a copy"


def test_it_is_deterministic_and_learns(run: RunConfig, tokens: torch.Tensor) -> None:
    def losses() -> list[float]:
        swarm = LockChain(run, (0, 2, 4), tokens, bits=8, num_holders=2, num_origins=2)
        return [swarm.step() for _ in range(20)]

    found = losses()
    assert found == losses()
    assert found[-1] < found[0] - 0.5


def test_the_benchmark_at_its_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run(tmp_path, fragments=4, model={"config": {**GPTJ, "n_layer": 4}}, train={"total_tokens": 8_000})
    monkeypatch.setattr(pipeline_loss, "QUICK_TOKENS", 1_500)
    options = argparse.Namespace(
        run=str(file), set=[], seed=3, quick=True, seeds=3, link_tokens=10**9, mixed_tokens=[10**9, 10**9]
    )
    result = pipeline_loss.measure(options)
    links, coarse, mixed = result["rows"]
    assert abs(links["median_gap_percent"]) < 1 and len(links["gap_percent"]) == 1
    assert abs(coarse["median_gap_percent"]) < 3
    assert mixed["loss"]["median"] < result["losses"]["checkpoint"][0]
    text = pipeline_loss.table(result)
    assert "| mixed stages, H = 20 |" in text and "1,500 tokens after a checkpoint of 1,500" in text


def test_gaps_are_of_each_seed_against_its_own_baseline() -> None:
    found = pipeline_loss.row("a", [2.02, 1.01, 3.0], "b", [2.0, 1.0, 3.0])
    assert found["gap_percent"] == [1.0, 1.0, 0.0] and found["median_gap_percent"] == 1.0
    assert found["loss"]["median"] == 2.02 and found["baseline_loss"]["max"] == 3.0


def test_a_schedule_of_its_own_leaves_the_run_as_it_was(run: RunConfig) -> None:
    other = schedule_of(run, train={"total_tokens": 5}, averaging={"tokens_per_round": 7})
    assert (other.train.total_tokens, other.averaging.tokens_per_round) == (5, 7)
    assert run.train.total_tokens == 8_000
    assert dataclasses.replace(other, train=run.train, averaging=run.averaging) == run
