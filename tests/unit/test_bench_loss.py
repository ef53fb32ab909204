"""`bench.py loss` with rounds: both sides see the same text, bytes are counted as they are sent, and what was found is
found again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.averaging.outer_settings import outer_settings
from swarm.config import RunConfig, load_run
from swarm.errors import ConfigError
from swarm.network import codec
from swarm.train.run_source import hold
from tests.swarm.support import write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench
from benches import lockstep, loss, loss_rounds
from benches import options as common
from benches.kept import Kept
from benches.loss_rounds import Row
from benches.pipeline_loss import Text

torch.set_num_threads(1)
TINY = {
    "model_type": "gptj", "n_layer": 2, "n_embd": 16, "n_head": 2, "rotary_dim": 4, "n_positions": 32,
    "vocab_size": 257, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 256,
    "eos_token_id": 256,
}


def tiny(folder: Path, total: int = 4_096, **averaging: Any) -> RunConfig:
    file = write_run(
        folder, model={"config": TINY}, averaging={"tokens_per_round": 512, "bits": 4, **averaging},
        train={"sequence_length": 16, "batch_sequences": 4, "total_tokens": total, "warmup_tokens": 256},
    )
    return load_run(file)


@pytest.fixture
def text(tmp_path: Path) -> Text:
    return Text(tiny(tmp_path), num_sequences=20)


def trained(process: lockstep.Simulation | lockstep.Alone, until: int) -> dict[int, torch.Tensor]:
    while process.tokens < until:
        process.step()
    return process.weights()


# ---- lock-step ----


def test_one_peer_that_averages_plainly_is_the_synchronous_process(tmp_path: Path, text: Text) -> None:
    """The same text, the same steps: only rounding is left between them."""
    run = tiny(tmp_path, 2_048, bits=32, outer_learning_rate=1.0, outer_momentum=0.0)
    start = {index: state.weights for index, state in hold(run).states.items()}
    one = trained(lockstep.Simulation(run, num_peers=1, tokens=text.tokens), 2_048)
    alone = trained(lockstep.Alone(run, num_peers=1, tokens=text.tokens), 2_048)
    assert text.loss(run, one) == pytest.approx(text.loss(run, alone), rel=1e-4)
    assert text.loss(run, alone) < text.loss(run, start) - 0.01, "and it learns"


def test_peers_together_see_the_batch_of_the_one(tmp_path: Path, text: Text) -> None:
    run = tiny(tmp_path)
    swarm = lockstep.Simulation(run, num_peers=4, tokens=text.tokens)
    alone = lockstep.Alone(run, num_peers=4, tokens=text.tokens)
    whole = alone._stream.next_batch(16).tokens
    assert torch.equal(swarm._stream.next_batch(16).tokens, whole)
    assert alone.run.train.batch_sequences == 16 and [len(part) for part in whole.split(4)] == [4] * 4


def test_it_goes_on_from_given_weights(tmp_path: Path, text: Text) -> None:
    run = tiny(tmp_path)
    start = trained(lockstep.Alone(run, num_peers=4, tokens=text.tokens), 1_024)
    alone = lockstep.Alone(run, num_peers=4, tokens=text.tokens, start=start, before=1_024)
    swarm = lockstep.Simulation(run, num_peers=2, tokens=text.tokens, start=start, before=1_024)
    for process in (alone, swarm):
        assert all(torch.equal(process.weights()[index], start[index]) for index in start)
        assert process.tokens == 1_024
    states = [ledger.state for ledger in swarm.peers[1].ledgers]
    assert [(state.version, state.tokens) for state in states] == [(0, 1_024)] * 2
    assert trained(swarm, 2_048)[0].equal(swarm.peers[0].ledgers[0].state.weights)
    assert start[0].equal(alone.weights()[0]), "the start is left as it was"


def test_bytes_are_those_that_leave_a_peer(tmp_path: Path, text: Text) -> None:
    run = tiny(tmp_path)
    for count in (1, 2, 4):
        swarm = lockstep.Simulation(run, num_peers=count, tokens=text.tokens)
        trained(swarm, 4_096)
        rounds = [ledger.state.version for ledger in swarm.peers[0].ledgers]
        expected = sum(
            number * loss_rounds.round_bytes([layout], count, 4)
            for number, layout in zip(rounds, swarm.peers[0].held.layouts.values(), strict=True)
        )
        header_bytes = 8 * count * count * sum(rounds)
        assert swarm.bytes_sent / count == pytest.approx(expected, abs=header_bytes)


def test_who_takes_anothers_place_begins_at_the_newest_version(tmp_path: Path, text: Text) -> None:
    run = tiny(tmp_path, momentum_restart=0.4)
    swarm = lockstep.Simulation(run, num_peers=2, tokens=text.tokens)
    trained(swarm, 2_048)
    swarm.finish()
    swarm.replace(1, "newcomer")
    old, new = swarm.peers
    assert [ledger.state.digest for ledger in old.ledgers] == [ledger.state.digest for ledger in new.ledgers]
    parameters = dict(new.held.model.named_parameters())
    assert new.held.layouts[0].flatten(parameters).equal(old.ledgers[0].state.weights)
    trained(swarm, 4_096)
    for one, other in zip(old.ledgers, new.ledgers, strict=True):
        assert one.state.digest == other.state.digest
        assert {entry.peer_id for entry in one.state.roll} == {"peer-0", "peer-1", "newcomer"}


# ---- rows ----


def test_rounds_are_as_long_as_the_ratio_asks(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    layouts = list(hold(run).layouts.values())
    for peers in (2, 4, 8):
        for bits, ratio in ((2, 500), (4, 200), (8, 100), (32, 16)):
            row = Row(peers, ratio, bits)
            steps = loss_rounds.inner_steps(row, layouts)
            per_step = loss_rounds.round_bytes(layouts, peers, bits) / steps
            assert ratio <= loss_rounds.ddp_bytes(layouts, peers) / per_step < ratio * steps / (steps - 1)
    assert loss_rounds.inner_steps(Row(4, 1, 4), layouts) == 1
    numel = sum(layout.num_parameters for layout in layouts)
    assert loss_rounds.ddp_bytes(layouts, 4) == 4 * numel * 3 / 4


def test_a_row_has_the_total_batch_and_its_own_rounds(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    layouts = list(hold(run).layouts.values())
    plain = loss_rounds.setup(run, Row(8, 200, 4), layouts=layouts, before=0)
    ramped = loss_rounds.setup(run, Row(8, 200, 4, ramp=True), layouts=layouts, before=2_048)
    step = loss_rounds.TOTAL_SEQUENCES * 16
    assert plain.train.batch_sequences == 2 and plain.averaging.tokens_per_round % step == 0
    assert plain.averaging.first_round_tokens == 0
    assert ramped.averaging.tokens_per_round == plain.averaging.tokens_per_round
    assert ramped.averaging.first_round_tokens == plain.averaging.tokens_per_round // 4
    assert ramped.averaging.ramp_tokens == 512


def asked(*words: str) -> argparse.Namespace:
    return bench.make_parser().parse_args(["loss", *words])


def test_each_case_has_its_rows() -> None:
    rows = loss_rounds.rows_of(asked("--case", "checkpoint"))
    assert [(row.peers, row.ratio, row.bits) for row in rows] == [
        (peers, ratio, 4 if ratio == 203 else 2) for peers in (4, 8) for ratio in (203, 505, 1020, 2100)
    ]
    cold = loss_rounds.rows_of(asked("--case", "cold", "--peers", "4", "--ratios", "150"))
    assert cold == [Row(4, 150, 2), Row(4, 150, 2, ramp=True)]
    assert [row.name for row in cold] == ["4 peers, 150x, 2 bits", "4 peers, 150x, 2 bits, growing rounds"]
    assert asked().case == "bits" and asked("--rough-bits", "4").rough_bits == 4
    with pytest.raises(SystemExit):
        asked("--case", "warm")


# ---- kept ----


def test_what_was_kept_is_found_again_and_only_under_its_key(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "found")
    assert kept.figures("a") is None and kept.weights("a") is None
    weights = {0: torch.randn(512), 3: torch.randn(256)}
    kept.keep("a", {"loss": 1.25})
    kept.keep_weights("a", weights)
    again = Kept(tmp_path / "found")
    assert again.figures("a") == {"loss": 1.25} and again.figures("b") is None
    found = again.weights("a")
    assert found is not None and found.keys() == weights.keys()
    assert all(torch.equal(found[index], values) for index, values in weights.items())
    kept.keep("a", {"loss": 1.5})
    assert again.figures("a") == {"loss": 1.5}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": "b", "figures": {}}', b"\xff\xfe"])
def test_what_is_damaged_is_measured_again(tmp_path: Path, content: bytes) -> None:
    kept = Kept(tmp_path)
    kept.keep("a", {"loss": 1.25})
    kept.keep_weights("a", {0: torch.zeros(256)})
    for path in tmp_path.iterdir():
        path.write_bytes(content)
    assert kept.figures("a") is None and kept.weights("a") is None


# ---- all of it ----


@pytest.mark.parametrize("case", ["checkpoint", "cold"])
def test_a_small_one_to_the_end_and_again_from_what_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    tiny(tmp_path)
    out = tmp_path / "out.json"
    words = [
        "loss", "--case", case, "--quick", "--run", str(tmp_path / "run.yaml"), "--peers", "2", "--ratios", "20",
        "--out", str(out),
    ]
    assert bench.main(words) == 0
    said = capsys.readouterr().out
    result = json.loads(out.read_text())["result"]
    rows = result["rows"]
    bits = 2 if case == "cold" else 4
    names = [f"2 peers, 20x, {bits} bits", f"2 peers, 20x, {bits} bits, growing rounds"]
    assert [row["name"] for row in rows] == names[:len(rows)]
    assert len(rows) == (2 if case == "cold" else 1)
    for row in rows:
        assert row["rounds"]["median"] >= 3 and row["name"] in said
        assert row["gaps"] == row["gap_percent"]["values"] and abs(row["median_gap_percent"]) < 10
        assert row["loss"]["median"] == pytest.approx(result["alone"]["median"] * (1 + row["gaps"][0] / 100), rel=1e-3)
    assert 15 < rows[0]["less_than_ddp"]["median"] < 40
    assert (result["first_tokens"] > 0) == (case == "checkpoint")
    assert result["loss_of_checkpoint"][0] > result["alone"]["median"]

    def never(*_: object, **__: object) -> object:
        raise AssertionError("it was measured already")

    monkeypatch.setattr(loss_rounds, "trained", never)
    assert bench.main(words) == 0
    assert json.loads(out.read_text())["result"] == result


def test_runs_at_once_find_what_runs_one_by_one_do(tmp_path: Path) -> None:
    tiny(tmp_path)
    words = ["loss", "--case", "checkpoint", "--quick", "--run", str(tmp_path / "run.yaml"), "--peers", "2"]
    results = []
    for name, more in (("one", []), ("two", ["--jobs", "2"])):
        out = tmp_path / f"{name}.json"
        assert bench.main([*words, "--ratios", "20", "40", "--out", str(out), *more]) == 0
        results.append(json.loads(out.read_text())["result"])
        for row in results[-1]["rows"]:
            del row["cpu_s"]
    assert results[0] == results[1] and len(results[0]["rows"]) == 2


def test_momentum_is_that_of_so_many_rounds_unless_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path, outer_learning_rate=0.3, outer_momentum=0.25)
    asked: list[tuple[float | None, float | None]] = []

    class Done(Exception):
        pass

    def figures(study: loss_rounds.Study, run: Any, row: Row | None) -> dict[str, Any]:
        asked.append((run.averaging.outer_learning_rate, run.averaging.outer_momentum))
        raise Done

    monkeypatch.setattr(loss_rounds.Study, "figures", figures)
    words = ["loss", "--quick", "--run", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out.json")]
    for more in (["--case", "checkpoint"], ["--case", "checkpoint", "--set", "outer_momentum=0.5"], ["--case", "cold"]):
        with pytest.raises(Done):
            bench.run(bench.make_parser().parse_args([*words, *more]))
    assert asked == [(None, None), (None, 0.5), (None, None)]


def test_rounds_after_a_checkpoint_are_counted_from_there(tmp_path: Path) -> None:
    run, row = tiny(tmp_path), Row(4, 505, bits=2)
    assert run.averaging.outer_momentum is None
    layouts = list(hold(run).layouts.values())
    length = loss_rounds.setup(run, row, layouts=layouts, before=0).averaging.tokens_per_round
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, total_tokens=35 * length))
    after = loss_rounds.setup(run, row, layouts=layouts, before=21 * length)
    assert after.averaging.outer_momentum == 0.5 and outer_settings(after) == (1.0, 0.5), "two of 14"
    assert outer_settings(loss_rounds.setup(run, row, layouts=layouts, before=0)) == (1.0, 0.8), "five of 35"


def test_settings_of_rounds_leave_the_baseline_where_it_is(tmp_path: Path) -> None:
    """A row that is tried with another momentum is compared with what is there already."""
    run = tiny(tmp_path)
    other = dataclasses.replace(run, averaging=dataclasses.replace(run.averaging, outer_momentum=0.25))
    assert loss_rounds.plain(run).run_id == loss_rounds.plain(other).run_id
    assert run.run_id != other.run_id
    reseeded = dataclasses.replace(run, seed=5)
    assert loss_rounds.plain(run).run_id != loss_rounds.plain(reseeded).run_id


def test_peers_must_divide_the_batch(tmp_path: Path, text: Text) -> None:
    with pytest.raises(ConfigError, match="must divide the total batch"):
        loss_rounds.measure(asked("--case", "cold", "--peers", "3", "--out", str(tmp_path / "x")), tiny(tmp_path), text)


def test_the_table_shows_each_seeds_gap() -> None:
    def spread(*values: float) -> dict[str, Any]:
        return {"median": values[0], "min": min(values), "max": max(values), "values": list(values)}

    row = {
        "name": "4 peers, 500x, 2 bits", "less_than_ddp": spread(504.0), "inner_steps": spread(79),
        "rounds": spread(31), "bytes_sent_each": spread(1.5e7), "loss": spread(1.5, 1.6),
        "gaps": [-0.21, 0.3], "median_gap_percent": 0.045,
    }
    result = {
        "case": "checkpoint", "first_tokens": 2_000_000, "tokens": 5_000_000, "loss_of_checkpoint": [1.7, 1.71],
        "alone": spread(1.49), "rows": [row],
    }
    lines = loss.table(result).splitlines()
    assert lines[2] == (
        "| 4 peers, 500x, 2 bits | 504 | 79 | 31 | 15.0 | 1.5000 (1.5000-1.6000) | +0.04 | -0.21, +0.30 |"
    )
    assert "5,000,000 tokens after a checkpoint of 2,000,000" in lines[-1] and "1.700, 1.710 before" in lines[-1]
    assert "from cold" in loss.table({**result, "first_tokens": 0})


def test_bits_of_a_codec_are_what_a_row_counts(tmp_path: Path) -> None:
    [first, *_] = hold(tiny(tmp_path)).layouts.values()
    coarse = first.num_blocks - first.num_fine_blocks
    assert loss_rounds.round_bytes([first], 2, 8) == codec.encoded_bytes(first.num_fine_blocks, coarse, 8)
    assert common.run_of(asked("--run", str(tmp_path / "run.yaml"))).fragments == 2
