"""The loss benchmark at its smallest: deterministic, its rounds are the product's own, its figures add up."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from swarm.config import RunConfig, load_run
from swarm.data.batch import Batch
from swarm.data.sources import documents
from swarm.data.stream import held_out_batches, tokenise
from swarm.data.tokenizer import load_tokenizer
from tests.swarm.support import write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches import loss


def setup(tmp_path: Path, bits: int) -> tuple[RunConfig, torch.Tensor, Batch]:
    run = load_run(write_run(tmp_path, train={"total_tokens": 12_000}, averaging={"tokens_per_round": 1_500}))
    run = dataclasses.replace(run, averaging=dataclasses.replace(run.averaging, bits=bits))
    train, held_out = documents(run.data)
    tokenizer = load_tokenizer(run)
    sequences = held_out_batches(tokenise(held_out, tokenizer), sequence_length=32, num_sequences_max=50)
    return run, tokenise(train, tokenizer), sequences


def test_all_peers_of_a_simulation_agree_and_nothing_is_lost(tmp_path: Path) -> None:
    run, tokens, _ = setup(tmp_path, 4)
    simulation = loss.Simulation(run, num_peers=3, tokens=tokens)
    while simulation.tokens < run.train.total_tokens:
        simulation.step()
    simulation.finish()
    for fragment in range(run.fragments):
        states = [peer.ledgers[fragment].state for peer in simulation.peers]
        assert len({state.digest for state in states}) == 1
        assert states[0].tokens + sum(p.ledgers[fragment].pending_tokens for p in simulation.peers) == simulation.tokens
        assert states[0].version >= 4
    assert simulation.bytes_sent > 0


def test_it_is_deterministic_and_learns(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run, tokens, sequences = setup(tmp_path, 32)
    first = loss.one(run, tokens, sequences, num_peers=2)
    assert first == loss.one(run, tokens, sequences, num_peers=2)
    untrained = dataclasses.replace(run, train=dataclasses.replace(run.train, total_tokens=1))
    assert first < loss.one(untrained, tokens, sequences, num_peers=2) - 0.5


def test_the_table_shows_each_seeds_gap() -> None:
    rows = {
        "32": {"median": 2.0, "min": 1.9, "max": 2.1, "gap_percent": [0.0, 0.0]},
        "4": {"median": 2.002, "min": 1.9, "max": 2.1, "gap_percent": [0.1, -0.05]},
    }
    text = loss.table({"tokens": 1000, "peers": 3, "seeds": 2, "bits": rows})
    assert "| 4 | 2.0020 | 1.9000 | 2.1000 | +0.10, -0.05 |" in text.splitlines()
