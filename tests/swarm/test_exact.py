"""I6, exact when asked: a `sync` swarm gives the losses of one process that sees all its data."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from swarm.averaging.outer import learning_rate
from swarm.config import RunConfig
from swarm.data.batch import Batch
from swarm.data.sources import documents
from swarm.data.stream import PackedStream, tokenise
from swarm.data.tokenizer import load_tokenizer
from swarm.model.build import build_model
from swarm.model.prefix import model_inputs, targets_of
from tests.swarm.support import GPTJ, peers_in_process, wait_until, write_run

STEPS = 12
BATCH_TOKENS = 4 * 32
Together = tuple[dict[str, list[float]], RunConfig, list[list[tuple[int, str]]]]
"""losses of each that draws text, the run, heads of all"""


def one_process(run: RunConfig, readers: list[str]) -> dict[str, list[float]]:
    """Plain torch: one model, one AdamW, the gradient over all targets of all readers' batches, as a share of those
    that plain rows have."""
    model = build_model(run)
    train, _ = documents(run.data)
    tokens = tokenise(train, load_tokenizer(run))
    streams = {
        reader: PackedStream(tokens, sequence_length=run.train.sequence_length, seed=run.seed, reader=reader)
        for reader in readers
    }
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": run.train.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=run.train.betas,
    )
    losses: dict[str, list[float]] = {reader: [] for reader in readers}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, step * BATCH_TOKENS * len(readers))
        optimizer.zero_grad()
        for reader, stream in streams.items():
            batch = stream.next_batch(run.train.batch_sequences)
            labels = targets_of(batch.tokens, batch.segments)
            loss = model(input_ids=batch.tokens, labels=labels, **model_inputs(model, batch.segments)).loss
            plain = Batch(batch.tokens).num_targets
            (loss * batch.num_targets / plain / len(readers)).backward()
            losses[reader].append(float(loss.detach()))
        optimizer.step()
    return losses


def train_together(folder: Path, run_file: Path, stages: list[str]) -> Together:
    """Real peers with these fragments ("auto": all) for `STEPS` steps of each that draws text."""
    torch.set_num_threads(1)
    losses: dict[str, list[float]] = {}
    with peers_in_process() as make:
        peers = [make(folder / "peer-0", new_swarm=True, run=str(run_file), fragments=stages[0])]
        peers[0].participant.join()
        for number, stage in enumerate(stages[1:], start=1):
            peers.append(make(folder / f"peer-{number}", initial_peers=peers[0].maddrs, fragments=stage))
            peers[-1].participant.join()
        enough = threading.Event()
        for stage, peer in zip(stages, peers, strict=True):
            if draws(stage):
                mine = losses.setdefault(peer.participant.network.peer_id, [])

                def on_step(loss: float, tokens: int, mine: list[float] = mine) -> None:
                    mine.append(loss)
                    if min(map(len, losses.values())) >= STEPS:
                        enough.set()

                peer.participant.on_step = on_step
            peer.participant.take_part()
        wait_until(
            lambda: all(
                sum(bool(s.heads) for s in p.participant.network.directory.alive().values()) == len(stages) - 1
                for p in peers
            ),
            timeout_s=30, what="everybody to know everybody",
        )
        for peer in reversed(peers):
            peer.participant.train()
        assert enough.wait(120), f"steps done: { {key[-4:]: len(value) for key, value in losses.items()} }"
        return losses, peers[0].participant.run, [peer.heads() for peer in peers]


def draws(stage: str) -> bool:
    return stage == "auto" or stage.startswith("0:")


def as_one_process(losses: dict[str, list[float]], run: RunConfig) -> None:
    for reader, expected in one_process(run, list(losses)).items():
        assert losses[reader][:STEPS] == pytest.approx(expected, abs=1e-5), f"reader {reader[-4:]}"


def sync_run(folder: Path, stages: list[str], **changes: object) -> Path:
    tokens = sum(map(draws, stages)) * BATCH_TOKENS
    return write_run(
        folder, averaging={"mode": "sync", "bits": 32, "tokens_per_round": tokens, "max_round_s": 60.0},
        train={"clip_norm": 0.0, "total_tokens": 10_000}, **changes,
    )


def test_a_sync_swarm_equals_one_process(tmp_path: Path) -> None:
    whole = ["auto"] * 3
    losses, run, heads = train_together(tmp_path, sync_run(tmp_path, whole), whole)
    assert heads[0][0][0] >= STEPS - 1
    as_one_process(losses, run)
    first = [losses[reader][0] for reader in losses]
    last = [losses[reader][STEPS - 1] for reader in losses]
    assert max(last) < min(first) - 0.1, "the weights really changed"


next_plain = PackedStream.next_batch


def in_segments(stream: PackedStream, num_sequences: int) -> Batch:
    """Rows of the stream, each cut in one of five ways, by its first byte."""
    tokens = next_plain(stream, num_sequences).tokens
    ways = [((0, 32),), ((20, 32),), ((0, 10), (7, 12), (10, 10)), ((31, 32),), ((1, 5), (2, 27))]
    return Batch(tokens, tuple(ways[int(first) % 5] for first in tokens[:, 0]))


STAGES = [["0:1", "1:2", "2:3", "3:4"], ["0:1", "0:2", "1:4", "2:4"], ["0:2", "auto"]]


@pytest.mark.parametrize("stages", STAGES, ids=" ".join)
def test_a_model_in_stages_equals_one_process(
    tmp_path: Path, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four stages, stages that overlap, several peers that draw text; all other cuts are in
    tests/unit/pipeline/test_real_stages.py. The second and third with packed rows, prefixes and padding."""
    if stages != STAGES[0]:
        monkeypatch.setattr(PackedStream, "next_batch", in_segments)
    run_file = sync_run(tmp_path, stages, fragments=4, model={"config": {**GPTJ, "n_layer": 4}})
    losses, run, _ = train_together(tmp_path, run_file, stages)
    as_one_process(losses, run)
