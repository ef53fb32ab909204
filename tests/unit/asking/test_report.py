"""One report, as lines for a terminal and as tables for a card."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.asking.report import lines, markdown, tables

SCORE = {"name": "overruling", "questions": 120, "quasi_exact_match": 0.625, "macro_f1": 0.5, "shortened": 0}
REPORT: dict[str, Any] = {
    "held_out": [
        {"source": "pile", "objective": "causal", "nats_per_token": 2.34567, "nats_per_byte": 0.7, "targets": 12_345,
         "sequences": 9},
        {"source": "p3", "objective": "prefix", "nats_per_token": 1.0, "nats_per_byte": 0.25, "targets": 7,
         "sequences": 1},
    ],
    "tasks": [{**SCORE, "name": "sums", "questions": 40}],
    "raft": [SCORE, {**SCORE, "name": "banking_77", "quasi_exact_match": 0.0}],
    "raft_average": {"quasi_exact_match": 0.3125, "macro_f1": 0.5},
    "lm_eval": {"piqa": {"acc,none": 0.5, "acc_norm,none": 0.75}},
    "warnings": ["one thing\x1b[2J", "another"],
}


def test_lines_line_up() -> None:
    found = lines(REPORT)
    table = found[1:4]
    assert found[0] == "Loss on text that no peer trained on:"
    assert table[0].split() == ["source,", "objective", "nats", "a", "token", "nats", "a", "byte", "tokens"]
    assert table[1].split() == ["pile,", "causal", "2.3457", "0.7000", "12,345"]
    assert len({len(line) for line in table}) == 1
    assert ["average", "31.2", "50.0", "240"] in [line.split() for line in found]
    assert found[-1] == "note: another" and "\x1b" not in "".join(found)


def test_markdown_has_the_same_cells() -> None:
    text = markdown(REPORT)
    for _, head, rows in tables(REPORT):
        for row in [head, *rows]:
            assert "| " + " | ".join(row) + " |" in text
    assert "\n- Note: another." in text and "\x1b" not in text
    assert "| piqa | acc_norm,none | 0.7500 |" in text
    assert all(line.count("|") == 4 for line in markdown({"lm_eval": REPORT["lm_eval"]}).splitlines() if "|" in line)


def test_bars_in_names_do_not_break_the_table() -> None:
    assert "a\\|b" in markdown({"tasks": [{**SCORE, "name": "a|b"}]})


@pytest.mark.parametrize("report", [{}, {"held_out": [], "raft": []}])
def test_nothing_was_measured(report: dict[str, Any]) -> None:
    assert lines(report) == [] and markdown(report) == ""
