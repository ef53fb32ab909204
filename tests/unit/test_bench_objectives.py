"""`bench.py objectives` at its smallest: its figures are of what the product makes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches import objectives


def test_every_objective_is_measured_on_both_kinds_of_text() -> None:
    options = argparse.Namespace(quick=True, tokens=10**9, objective=["causal", "ul2r"])
    result = objectives.measure(options)
    assert result["tokens"] == 200_000 and len(result["rows"]) == 4
    for row in result["rows"]:
        assert row["tokens_per_s"] > 0 and 0 <= row["padding_percent"] < 25
        assert 97 < row["target_percent"] < 100 if row["objective"] == "causal" else 20 < row["target_percent"] < 60
    lines = objectives.table(result).splitlines()
    assert len(lines) == 2 + 4 and lines[0].startswith("| texts | objective |")


def test_documents_are_as_long_as_asked_for() -> None:
    found = objectives.some_documents(100_000, median=60)
    lengths = [len(text) for text in found]
    assert 100_000 <= sum(lengths) < 110_000 and 50 < np.median(lengths) < 70
    assert all(text.dtype == np.uint16 and text.max() < objectives.VOCABULARY for text in found)
