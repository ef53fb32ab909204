"""The memory benchmark's own arithmetic; that it runs is seen with --quick."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benches import memory

from swarm.averaging import outer
from swarm.config import PeerConfig, run_from_dict
from swarm.errors import ConfigError, SwarmError
from swarm.train.place import choose
from swarm.units import parse_bytes


def options(**changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), "quick": False, **changes})


def test_the_whole_model_does_not_fit_and_a_quarter_does_with_as_few_bytes_as_can_be() -> None:
    chosen = options()
    run, limit = run_from_dict(memory.document(chosen), origin="test"), parse_bytes(chosen.max_memory)
    assert not memory.whole_plan(run, limit)["fits"] and "too little" in memory.whole_plan(run, limit)["table"]
    for first, end in ((0, 14), (42, 56)):
        config = PeerConfig(fragments=f"{first}:{end}", max_memory=limit)
        place = choose(run, config, device=torch.device("cpu"), statuses={}, peer_id="me")
        assert place.plan.fits and place.in_flight == 1
        assert place.planner.settings.halved and place.planner.settings.optimizer_bits == 8
    assert outer.num_buffers(run) == 0


def test_the_model_has_seven_tenths_of_a_billion_parameters() -> None:
    run = run_from_dict(memory.document(options()), origin="test")
    place = choose(run, PeerConfig(), device=torch.device("cpu"), statuses={}, peer_id="me")
    assert 0.69e9 < sum(size.num_parameters for size in place.planner.sizes) < 0.72e9


def test_a_plan_is_read_from_its_table() -> None:
    assert memory.planned_bytes("weights  3 GB\nmain memory   3.9 GB  of 4 GB") == 3_900_000_000
    assert memory.planned_bytes("nothing of the kind") == 0


def test_a_process_says_its_peak_and_one_that_is_gone_does_not() -> None:
    before = memory.peak_bytes(os.getpid())
    large = torch.ones(before // 4 // 4)
    assert memory.peak_bytes(os.getpid()) >= before > 10_000_000 and len(large)
    assert memory.peak_bytes(2**22 + 1) == 0


def test_the_table_names_each_peer_and_the_whole() -> None:
    peer = {
        "fragments": "0:1", "plan": 2_000_000, "gpu_plan": 0, "table": "told", "peak_bytes": 1_000_000,
        "gpu_peak_bytes": 3_000_000, "tokens": 5, "rounds": 2, "tokens_per_s": 12.5,
    }  # fmt: skip
    text = memory.table({"limit_bytes": 4 * 10**9, "whole": {"fits": False, "table": "sum"}, "peers": [peer]})
    assert "does not fit into 4 GB" in text and "| 0:1 | 2 MB | 1 MB | 50% | 0 B | 3 MB | 5 | 2 |" in text
    assert "12.5 tokens/s" in text


def test_stages_are_four_equal_parts_or_what_was_asked_for() -> None:
    assert memory.parts_of(options(), 9) == [(0, 2), (2, 4), (4, 6), (6, 9)]
    assert memory.parts_of(options(stages=["0:2", "2:6", "6:8"]), 8) == [(0, 2), (2, 6), (6, 8)]


@pytest.mark.parametrize("nonsense", ["2", "2:2", "3:1", "0:9", "a:b", "-1:2"])
def test_a_stage_that_is_none_is_a_stated_error(nonsense: str) -> None:
    with pytest.raises(ConfigError, match="not A:B"):
        memory.parts_of(options(stages=[nonsense]), 8)


def test_adapters_and_the_shape_of_gpt_j_are_in_the_run() -> None:
    run = run_from_dict(
        memory.document(options(lora=True, width=4096, blocks=8, vocabulary=50400)), origin="test"
    )
    assert run.model.lora is not None and run.model.lora.base == "nf4"
    assert run.model.config is not None
    assert run.model.config["n_head"] == 16 and run.model.config["vocab_size"] == 50400
    plain = run_from_dict(memory.document(options()), origin="test")
    assert plain.model.lora is None and plain.model.config is not None and plain.model.config["n_head"] == 16


def test_speed_is_of_all_steps_but_the_first() -> None:
    assert memory.speed([]) == memory.speed([(1.0, 100.0)]) == 0.0
    assert memory.speed([(10.0, 100.0), (12.0, 300.0), (15.0, 600.0)]) == 100.0


def test_what_nvidia_smi_says_of_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '41, 818'\necho '42, 10'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert memory.gpu_bytes() == {41: 818 * 2**20, 42: 10 * 2**20}
    program.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    with pytest.raises(SwarmError, match="nvidia-smi"):
        memory.gpu_bytes()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(SwarmError, match="nvidia-smi"):
        memory.gpu_bytes()
