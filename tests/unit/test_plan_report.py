"""What people read of a plan, from figures that no run has: units, plurals, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from swarm import plan_report
from swarm.plan_report import lines

OUTLOOK: dict[str, Any] = {
    "machines": 8, "computer": "rtx-3090", "flop_per_s": 21.4e12, "tokens_per_s": 1234.5, "bound_by": "lines",
    "least_in_flight": 3, "computing_tokens_per_s": 5000.0, "line_tokens_per_s": 1234.5, "memory_tokens_per_s": None,
    "wire_bytes": 1e9, "round_s": 75.0, "period_s": 3600.0, "due_s": 3600.0, "opened_by_time": False, "hidden": True,
    "round_share": 0.123, "core_share": 0.004, "num_rounds": 541, "sent_bytes": 2.5e12, "seconds": 864_000.0,
    "kwh": 4800.0, "electricity": 1440.0, "rent": 576.0,
}
PEER: dict[str, Any] = {
    "fragments": [0, 2], "settings": "fp32 weights", "in_flight": 1, "gpu_bytes": 0, "main_bytes": 4e9, "table": "row",
    "averaging_bytes": 1e9, "pipeline_bytes": 2e9, "sent_bytes": 3e9,
}
RESULT: dict[str, Any] = {
    "run": "letters", "fragments": 4, "replicas": 4, "tokens": 5e7, "trained_parameters": 1.2e6, "adapters": False,
    "rounds": 1, "forward_bytes_per_token": 66.0, "back_bytes_per_token": 64.0, "round_bytes": 567_000, "lines": "",
    "prices": {"kwh": 0.3, "gpu_hour": 0.0},
    "comparison": [
        {"what": "this run: rounds", "bytes": 1e9, "ddp_bytes": 2e11, "times_less": 200.0},
        {"what": "alone", "bytes": 0.0, "ddp_bytes": 0.0, "times_less": None},
    ],
    "machines": [{
        "machine": "CPU, 16 GB", "peers": [PEER, {**PEER, "fragments": [2, 4]}], "too_large": [], "short_of": "",
        "outlook": None,
    }],
}  # fmt: skip


def text(**changes: Any) -> str:
    [machine] = RESULT["machines"]
    outlook = {**OUTLOOK, **changes}
    return "\n".join(lines({**RESULT, "lines": "lines of 1 up", "machines": [{**machine, "outlook": outlook}]}))


def test_without_lines_it_says_how_to_give_them() -> None:
    found = lines(RESULT)
    assert found[-1].startswith("--line 20/100/30ms or --topology home-100")
    assert not any("tokens/s" in line for line in found)
    [grouped] = [line for line in found if "0:4, 2 fragments each" in line]
    assert "1 microbatch at once, sends 3 GB in all (1 GB rounds, 2 GB stages)" in grouped
    [row] = [line for line in found if "this run: rounds" in line]
    assert row.split()[-5:] == ["1", "GB", "200", "GB", "200"]
    assert not any("alone" in line for line in found), "nothing is sent: nothing to compare"


def test_with_lines_it_says_speed_rounds_and_cost() -> None:
    found = text()
    assert "With 4 peers for each fragment, on lines of 1 up:" in found
    assert "CPU, 16 GB: 8 machines, rtx-3090 at 21.4 TFLOP/s" in found
    assert "1,234 tokens/s, bound by lines\n" in found and "computing 5,000, line 1,234)" in found
    assert "takes 1:15, every 1:00:00: hidden behind training, 12 % of the line's time and 0.4 % of a core" in found
    assert "10.0 days; a machine sends 2.5 TB; 4,800 kWh, 1,440 at 0.3 a kWh" in found and "rent" not in found
    assert "--line 20/100/30ms" not in found and "assumed, unless you say" in found


@pytest.mark.parametrize(("changes", "said"), [
    ({"bound_by": "memory for microbatches"}, "bound by memory for microbatches, 3 at once in the fullest stage"),
    ({"hidden": False}, "cannot keep up, so rounds come later"),
    ({"opened_by_time": True, "due_s": 7200.0}, "opened by max_round_s (their tokens take 2:00:00): 541 rounds in all"),
    ({"wire_bytes": 0.0}, "alone there is nothing to average"),
    ({"seconds": 4000.0, "kwh": 0.123, "electricity": 0.037}, "1:06:40; a machine sends 2.5 TB; 0.12 kWh, 0.037 at"),
    ({"tokens_per_s": 0.456, "round_s": 0.59}, "0.46 tokens/s"),
    ({"round_s": 0.59}, "takes 0.59 s, every"),
])
def test_what_is_special_is_said(changes: dict[str, Any], said: str) -> None:
    assert said in text(**changes)


def test_rent_is_said_where_it_has_a_price() -> None:
    [machine] = RESULT["machines"]
    rented = {
        **RESULT, "lines": "some", "prices": {"kwh": 0.3, "gpu_hour": 0.5},
        "machines": [{**machine, "outlook": OUTLOOK}, machine],
    }
    found = "\n".join(lines(rented))
    assert "576 for rent at 0.5 a GPU-hour" in found and "these machines alone cannot hold the model" in found


def test_tables_and_what_is_too_large() -> None:
    [machine] = RESULT["machines"]
    assert any("| row" in line for line in lines(RESULT, tables=True))
    short = {**machine, "peers": [], "too_large": list(range(9)), "short_of": "main memory: too little"}
    found = "\n".join(lines({**RESULT, "machines": [short]}))
    assert "too little for any fragment" in found and "| main memory: too little" in found
    partly = {**machine, "too_large": [3]}
    assert "2 peers, and others for fragment 3" in "\n".join(lines({**RESULT, "machines": [partly]}))
    assert plan_report._listed(list(range(9))) == "fragments 0, 1, 2, 3, 4, 5 ..."
