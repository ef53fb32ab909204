"""`bench.py codec` at its smallest: its table is of the product's codec, its errors are what arithmetic says."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.errors import ConfigError
from swarm.network.codec import BLOCK

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench
from benches import codec as bench_codec


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    options = bench.make_parser().parse_args(["codec", "--quick", "--values", "20000", "--repeats", "1"])
    return bench_codec.measure(options)


def test_every_width_has_its_row(result: dict[str, Any]) -> None:
    rows = {row["codec"]: row for row in result["rows"]}
    assert result["values"] % BLOCK == 0 and 20_000 <= result["values"] < 20_000 + BLOCK
    assert list(rows)[:4] == ["2 bits", "4 bits", "8 bits", "fp32"], "and what else is installed comes after"
    assert [round(rows[name]["bytes_a_value"], 2) for name in list(rows)[:4]] == [0.26, 0.51, 1.01, 4.0]
    for row in result["rows"]:
        assert row["encode"]["median"] > 0 and row["decode"]["min"] > 0
        assert 0 <= row["error_normal"] <= row["error_heavy"] < 1


def test_more_bits_lose_less_and_feedback_owes_no_more_than_one_contribution(result: dict[str, Any]) -> None:
    two, four, eight, exact = result["rows"][:4]
    for figure in ("error_normal", "error_heavy", "owed_normal", "owed_heavy"):
        assert two[figure] > four[figure] > eight[figure] > exact[figure] == 0
        assert two[figure] < 1
    assert two["error_normal"] == pytest.approx(0.39, abs=0.02)
    assert four["error_normal"] == pytest.approx(0.11, abs=0.01)


def test_what_is_owed_does_not_grow_with_the_rounds() -> None:
    """Of the widest tails too: a codec that clipped would owe more with each round, and here one does."""
    from swarm.network import codec

    def two_bits(values: torch.Tensor) -> torch.Tensor:
        return codec.decode(codec.encode(values, 0, 2), len(values) // BLOCK, 0, 2)

    def clipped(values: torch.Tensor) -> torch.Tensor:
        scales = values.view(-1, BLOCK).abs().mean(dim=1, keepdim=True) * 1.25
        return (((values.view(-1, BLOCK) / scales).floor().clamp(-2, 1) + 0.5) * scales).view(-1)

    _, heavy = bench_codec.samples(20)
    assert bench_codec.owed(two_bits, heavy, 60) < 1.2 * bench_codec.owed(two_bits, heavy, 15)
    assert bench_codec.owed(clipped, heavy, 60) > 2 * bench_codec.owed(clipped, heavy, 15)


def test_the_table_is_markdown_and_leaves_out_what_was_not_measured(result: dict[str, Any]) -> None:
    lines = bench_codec.table(result).splitlines()
    assert lines[0].endswith("values, one thread, cpu") and lines[2].startswith("| codec | encode, GB/s |")
    assert len(lines) == 4 + len(result["rows"]) and len({line.count("|") for line in lines[2:]}) == 1
    without = {**result, "rows": [{**result["rows"][0], "encode_and_read": None}]}
    assert "|  |" in bench_codec.table(without)


def test_samples_are_the_same_every_time_and_one_has_heavier_tails() -> None:
    normal, heavy = bench_codec.samples(200)
    again, _ = bench_codec.samples(200)
    assert torch.equal(normal, again)
    assert float(normal.abs().max() / normal.std()) < 6 < float(heavy.abs().max() / heavy.std())


@pytest.mark.parametrize("nonsense", [["--values", "0"], ["--repeats", "-1"]])
def test_nonsense_is_said_to_be_that(nonsense: list[str]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        bench_codec.measure(bench.make_parser().parse_args(["codec", *nonsense]))


def test_threads_are_left_as_they_were() -> None:
    torch.set_num_threads(2)
    try:
        bench_codec.measure(argparse.Namespace(values=1, repeats=1, quick=True, bits=[2], device="cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
