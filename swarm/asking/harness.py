"""Any task of lm-evaluation-harness on an export (`pip install "swarm-train[eval]"`).

The harness asks in its own way: it scores answers by their likelihood in one pass over prompt and answer, which is
causal. What a prefix objective taught shows only where a model writes its answers, as in RAFT (exam.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarm.errors import ConfigError


def ask_harness(
    folder: Path, tasks: Sequence[str], *, num_fewshot: int | None = None, limit: int | None = None, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """task -> metric -> value, as the harness names them. `limit`: only so many examples of each task.

    Raises ConfigError: the harness is not installed, does not know a task, or cannot run it (no internet, say).
    """
    try:
        harness: Any = importlib.import_module("lm_eval")
    except ImportError as error:
        raise ConfigError(
            "tasks of lm-evaluation-harness cannot be run", why=str(error),
            do='install it: pip install "swarm-train[eval]", or pip install "lm_eval>=0.4.9"',
        ) from None
    try:
        found = harness.simple_evaluate(
            model="hf", model_args={"pretrained": str(folder)}, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit,
            device=device,
        )
    except Exception as error:  # it runs code of hundreds of tasks: anything may come
        raise ConfigError(
            f"lm-evaluation-harness could not do {', '.join(tasks)}",
            why=(str(error) or type(error).__name__).splitlines()[0][:300],
            do="check the names with `lm_eval ls tasks`, and that their data can be downloaded",
        ) from None
    results = (found or {}).get("results", {})
    return {
        str(task): {str(name): float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
        for task, metrics in results.items()
    }
