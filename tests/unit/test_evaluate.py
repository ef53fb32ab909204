"""python -m swarm.evaluate as people use it: on an export and on a home, with RAFT, with nonsense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swarm import evaluate
from swarm.asking import release
from swarm.asking.states import Weights
from swarm.model.card import BEGIN, END
from swarm.model.export import RUN_FILE
from tests.unit.asking.support import make_home, make_weights
from tests.unit.data.raft_support import made_up, write_csv, write_settings

ADE = "ade_corpus_v2"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def places(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    make_home(folder / "home", weights)
    release.write(weights, folder / "export")
    write_csv(folder / "raft", ADE, made_up(ADE))
    write_settings(folder / "raft", {ADE: "Label it."})
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = evaluate.main([*map(str, arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def found(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


def test_a_home_and_an_export_have_the_same_loss(
    places: Path, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    home, export = (found(capsys, places / name, "--sequences", 6) for name in ("home", "export"))
    assert home["held_out"] == export["held_out"] and len(home["held_out"]) == 1
    assert home["run_id"] == export["run_id"] == weights.run.run_id and home["trained_tokens"] == 1234
    assert home["sequences"] == 6 and home["tokens"] == 6 * 31
    assert 4 < home["nats_per_byte"] < 8 and home["nats_per_byte"] == pytest.approx(home["nats_per_token"])
    assert home["warnings"] == []


def test_people_get_a_table(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, places / "home", "--sequences", 3)
    assert code == 0 and "after 1,234 tokens" in out.splitlines()[0]
    assert "nats a token" in out and "causal" in out and "Traceback" not in err


def test_raft_and_the_card(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raft = ["--raft", places / "raft", "--raft-tasks", ADE, "--questions", 2]
    result = found(capsys, places / "export", *raft, "--no-held-out", "--card")
    assert [score["name"] for score in result["raft"]] == [ADE] and result["raft"][0]["questions"] == 6
    assert result["raft_average"]["quasi_exact_match"] == result["raft"][0]["quasi_exact_match"]
    assert "held_out" not in result
    warnings = " ".join(result["warnings"])
    assert "seen some of what it is asked" in warnings, "P3 and Natural-Instructions overlap with RAFT"
    assert "only 2 questions" in warnings and "1 of RAFT's 11 tasks" in warnings
    assert "too long for the model" in warnings, "this one sees 32 tokens"
    card = (places / "export" / "README.md").read_text().split(BEGIN)[1].split(END)[0]
    assert f"| {ADE} |" in card and "seen some of what it is asked" in card
    found(capsys, places / "export", "--sequences", 2, "--card")
    again = (places / "export" / "README.md").read_text().split(BEGIN)[1].split(END)[0]
    assert "| data, causal |" in again and ADE not in again, "the new table is in place of the old one"


def test_a_model_of_which_nothing_is_known_can_be_asked_raft(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (places / "export").iterdir():
        if file.name != RUN_FILE:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result = found(capsys, tmp_path, "--raft", places / "raft", "--raft-tasks", ADE, "--questions", 1)
    assert result["raft"][0]["questions"] == 3 and "held_out" not in result and "run_id" not in result
    code, _, err = run(capsys, tmp_path, "--tasks")
    assert code == 2 and "does not say which run" in err and "do:" in err


@pytest.mark.parametrize(("arguments", "says"), [
    ((), "TARGET and --initial-peers"), (("x", "--initial-peers", "y"), "TARGET and --initial-peers"),
    (("x", "--sequences", "0"), "at least 1"), (("--initial-peers", "y", "--card"), "into an export"),
    (("x", "--wrong"), "unrecognized"),
])
def test_the_command_line_refuses_nonsense(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate.main(list(arguments))
    assert caught.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "says"), [
    (("nowhere",), "there is no folder"), (("home", "--lm-eval", "piqa"), "needs an export"),
    (("home", "--raft", "nowhere"), "no folder"), (("home", "--raft-tasks", "mnist", "--raft", "raft"), "no task"),
    (("home", "--run-id", "tiny-000000000000"), "cannot read"), (("raft",), "there is no run"),
    (("home", "--card", "--sequences", "1"), "no model card"),
])
def test_what_is_wrong_is_said_without_a_traceback(
    places: Path, arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(places)
    code, out, err = run(capsys, *arguments)
    assert code in (1, 2) and says in err and "Traceback" not in err and out == ""


def test_help_does_not_wait_for_torch() -> None:
    import subprocess
    import sys

    program = "import sys, swarm.evaluate, swarm.chat; print([m for m in ('torch', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
