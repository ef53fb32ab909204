"""lm-evaluation-harness is an extra: without it an error says what to install, with it its results come through."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from swarm.asking.harness import ask_harness
from swarm.errors import ConfigError


def installed(monkeypatch: pytest.MonkeyPatch, does: Any) -> None:
    """A stand-in of the same face as lm_eval 0.4.9: it is not installed where these tests run."""
    module = types.ModuleType("lm_eval")
    module.simple_evaluate = does  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", module)


def test_without_it_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="cannot be run") as caught:
        ask_harness(tmp_path, ["piqa"])
    assert "swarm-train[eval]" in caught.value.do


def test_results_come_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def evaluate(**how: Any) -> dict[str, Any]:
        asked.update(how)
        return {"results": {"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": "N/A"}}, "versions": {}}

    installed(monkeypatch, evaluate)
    found = ask_harness(tmp_path, ["piqa"], num_fewshot=2, limit=7, device="cpu")
    assert found == {"piqa": {"acc,none": 0.5}}
    assert asked == {
        "model": "hf", "model_args": {"pretrained": str(tmp_path)}, "tasks": ["piqa"], "num_fewshot": 2, "limit": 7,
        "device": "cpu",
    }


@pytest.mark.parametrize("answer", [None, {}, {"results": {}}])
def test_no_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: Any) -> None:
    installed(monkeypatch, lambda **_: answer)
    assert ask_harness(tmp_path, ["piqa"]) == {}


def test_what_it_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def evaluate(**_: Any) -> None:
        raise RuntimeError("Tasks not found: x\nlong trace")

    installed(monkeypatch, evaluate)
    with pytest.raises(ConfigError, match="could not do x") as caught:
        ask_harness(tmp_path, ["x"])
    assert caught.value.why == "Tasks not found: x"
