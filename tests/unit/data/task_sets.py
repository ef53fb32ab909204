"""Small data sets in exactly the published formats, and a run over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow

from swarm.config import RunConfig, run_from_dict


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(pyarrow.compress(lines, codec="zstd", asbytes=True) if path.suffix == ".zst" else lines)
    return path


def p3_rows(number: int) -> list[dict[str, Any]]:
    return [{"inputs": f"Is {i} even?", "targets": "no" if i % 2 else "yes"} for i in range(number)]


def write_instructions(
    folder: Path, tasks: dict[str, list[tuple[str, str]]], *, train: list[str] | None = None
) -> Path:
    """A clone of allenai/natural-instructions: `tasks` are name -> (input, answer)."""
    (folder / "tasks").mkdir(parents=True)
    for name, pairs in tasks.items():
        document = {
            "Contributors": ["nobody"], "Source": ["made up"], "Categories": ["Test"],
            "Definition": [f"Do {name}."], "Positive Examples": [], "Negative Examples": [],
            "Instances": [
                {"id": f"{name}-{number}", "input": given, "output": [answer, "or so"]}
                for number, (given, answer) in enumerate(pairs)
            ],
        }  # fmt: skip
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(document))
    if train is not None:
        (folder / "splits" / "default").mkdir(parents=True)
        (folder / "splits" / "default" / "train_tasks.txt").write_text("".join(f"{name}\n" for name in train))
    return folder


def run_over(
    sources: dict[str, Any], *, phases: Any = (), length: int = 64, total_tokens: int = 1_000_000
) -> RunConfig:
    document = {
        "name": "test", "model": {"config": {"model_type": "gptj", "vocab_size": 320}},
        "train": {"sequence_length": length, "total_tokens": total_tokens}, "sources": sources, "phases": list(phases),
    }  # fmt: skip
    return run_from_dict(document, origin="test.yaml")
