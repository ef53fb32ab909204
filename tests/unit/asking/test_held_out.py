"""Loss by source and objective: over targets, per byte of what they stand for, and all together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swarm.asking.at_hand import AtHand
from swarm.asking.held_out import held_out, losses, overall, target_bytes
from swarm.data.batch import Batch
from swarm.data.tokenizer import byte_tokenizer
from swarm.errors import ConfigError
from tests.unit.asking.support import make_run


class Known:
    """Loses as many nats a token as a row's first token says."""

    def loss(
        self, batch: Batch, *, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[float, int]:
        on_progress(len(batch), len(batch))
        return float(batch.tokens[0, 0]), batch.num_targets

    def next_logits(self, ids: object, *, prefix: int = 0) -> torch.Tensor:
        raise NotImplementedError


ROWS = torch.full((3, 10), 2)
PREFIXED = Batch(torch.full((2, 10), 4), (((4, 10),), ((2, 5), (5, 5))))


def test_each_source_and_objective_has_its_loss() -> None:
    heard: list[tuple[str, int, int]] = []
    found = losses(
        Known(), byte_tokenizer(), {("pile", "causal"): Batch(ROWS), ("p3", "prefix"): PREFIXED},
        on_progress=lambda *what: heard.append(what),
    )
    assert [(loss.source, loss.objective, loss.nats_per_token, loss.targets, loss.sequences) for loss in found] == [
        ("pile", "causal", 2.0, 27, 3), ("p3", "prefix", 4.0, 9, 2),
    ]
    assert all(loss.nats_per_byte == loss.nats_per_token for loss in found), "a token is a byte here"
    assert heard == [("pile, causal", 3, 3), ("p3, prefix", 2, 2)]
    together = overall(found)
    assert together["nats_per_token"] == pytest.approx((2 * 27 + 4 * 9) / 36)
    assert together["nats_per_byte"] == pytest.approx(together["nats_per_token"])
    assert (together["tokens"], together["sequences"]) == (36, 5)


def test_bytes_are_those_of_the_targets() -> None:
    assert target_bytes(Batch(ROWS), byte_tokenizer()) == 27
    assert target_bytes(PREFIXED, byte_tokenizer()) == 9


def test_what_cannot_be_predicted_is_said() -> None:
    with pytest.raises(ConfigError, match="nothing of p3"):
        losses(Known(), byte_tokenizer(), {("p3", "prefix"): Batch(ROWS, (((10, 10),),) * 3)})


def test_of_a_run_the_same_rows_come_everywhere(tmp_path: Path) -> None:
    run, held = make_run(tmp_path)
    batches = held_out(run, byte_tokenizer(), vocabulary=300, sequences=5)
    again = held_out(run, byte_tokenizer(), vocabulary=300, sequences=5)
    assert batches.keys() == again.keys() and len(batches) == 1
    for key, batch in batches.items():
        assert torch.equal(batch.tokens, again[key].tokens) and batch.tokens.shape == (5, 32)
    (loss,) = losses(AtHand(held.model), byte_tokenizer(), batches)
    assert loss.nats_per_token == pytest.approx(5.7, abs=0.2) and loss.objective == "causal"
