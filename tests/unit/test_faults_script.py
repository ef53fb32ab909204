"""The command that plays schedules of faults: what it prints of a sum, of one, of a failure, and of nonsense."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.averaging.faults import story
from tests.unit.averaging.faults.schedule import draw

SCRIPT = Path(__file__).parents[2] / "scripts" / "faults.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    import sys

    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("faults_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults_script"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_one_is_told_with_its_log(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(draw(3).text()), "what was drawn"
    assert "p0.0  begins" in text and "applies" in text and "all holds" in text


def test_a_failure_says_what_and_ends_with_1(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "GO_ON_S", -1.0)
    assert script.main(["--seed", "3"]) == 1
    assert "I3: not within -1 s" in capsys.readouterr().out
    assert script.play_one(3).problem.startswith("I3: ")


def test_the_sum_of_many(script: ModuleType) -> None:
    total = script.Sum()
    for seed in range(100):
        problem = "I2: lost" if seed == 99 else ""
        total.add(script.Played(seed, problem, 3, 1000, 10, 36.0, float(seed), 2.0))
    text = total.text()
    assert text.startswith("100 schedules, 1.0 simulated hours, 300 commits")
    assert "100000 tokens trained; 1000 (1.0 %) died" in text
    assert "median 49 s, 99 % within 98 s, longest 98 s" in text and "failed: 1" in text
    assert total.failed[0].seed == 99
    assert "never" in script.Sum().text()


def test_what_is_played_is_what_was_drawn(script: ModuleType) -> None:
    played = script.play_one(5)
    assert played.seed == 5 and not played.problem and played.commits > 0 and played.simulated_s > 0


@pytest.mark.parametrize("words", [
    ["--count", "0"], ["--count", "-3"], ["--count", "many"], ["--seed", "1.5"], ["--processes", "0"], ["what"],
])
def test_nonsense_is_refused_in_words(
    script: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(words)
    assert ended.value.code == 2
    assert "Traceback" not in (error := capsys.readouterr().err) and "error: " in error and "_positive" not in error
