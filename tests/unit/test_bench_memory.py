"""The memory benchmark's own arithmetic; that it runs is seen with --quick."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benches import memory

from swarm.averaging import outer
from swarm.config import PeerConfig, run_from_dict
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
    peer = {"fragments": "0:1", "plan": 2_000_000, "table": "told", "peak_bytes": 1_000_000, "tokens": 5, "rounds": 2}
    text = memory.table({"limit_bytes": 4 * 10**9, "whole": {"fits": False, "table": "sum"}, "peers": [peer]})
    assert "does not fit into 4 GB" in text and "| 0:1 | 2 MB | 1 MB | 50% | 5 | 2 |" in text
