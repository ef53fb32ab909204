"""The run config that newcomers start with: it loads, is as large as it says, and learns at once."""

from __future__ import annotations

from pathlib import Path

import torch

from swarm.config import canonical_json, load_run
from swarm.data.sources import documents
from swarm.data.stream import PackedStream, held_out_batches, tokenise
from swarm.data.tokenizer import load_tokenizer
from swarm.model.build import build_model, resolve
from swarm.model.evaluate import held_out_loss, sample_text
from swarm.model.fragments import cut

DEMO = Path(__file__).parents[3] / "peers" / "runs" / "demo.yaml"


def test_demo_is_what_it_says() -> None:
    run = load_run(DEMO)
    assert resolve(run) is run and len(canonical_json(run)) < 2_000
    assert (run.averaging.mode, run.averaging.bits) == ("local", 4)
    model = build_model(run, tokenizer_size=len(load_tokenizer(run)))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 1.07
    fragments = cut(model, run.fragments)
    assert [fragment.blocks for fragment in fragments] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert run.train.sequence_length <= model.config.n_positions


def test_demo_learns_within_thirty_steps() -> None:
    """Far from the run's end (1.57 nats a byte), but from 5.6 down to the frequencies of single bytes and better."""
    run = load_run(DEMO)
    tokenizer = load_tokenizer(run)
    train, held_out = (tokenise(side, tokenizer) for side in documents(run.data))
    stream = PackedStream(train, sequence_length=run.train.sequence_length, seed=run.seed, reader="test")
    sequences = held_out_batches(held_out, sequence_length=run.train.sequence_length, num_sequences_max=32)
    model = build_model(run)
    assert 5.3 < held_out_loss(model, sequences) < 5.9

    optimizer = torch.optim.AdamW(model.parameters(), lr=run.train.learning_rate, betas=run.train.betas)
    for _ in range(30):
        batch = stream.next_batch(run.train.batch_sequences).tokens
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert held_out_loss(model, sequences) < 3.3
    assert sample_text(model, tokenizer, "def ", max_new_tokens=30, seed=0)
