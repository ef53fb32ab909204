"""python -m swarm.chat as people use it: one answer, a conversation, Ctrl+C, nonsense."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm import chat
from swarm.asking import release
from swarm.asking.at_hand import AtHand
from swarm.asking.states import Weights
from swarm.errors import NetworkError
from swarm.model.evaluate import sample_text
from tests.unit.asking.support import make_home, make_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def export(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    release.write(weights, folder / "export")
    make_home(folder / "home", weights)
    return folder / "export"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = chat.main([*map(str, arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def answers(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_one_answer_is_what_transformers_writes(
    export: Path, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    from swarm.asking.target import load_export

    model, tokenizer = load_export(export)
    wanted = sample_text(model, tokenizer, "The quick", max_new_tokens=12, temperature=0.0)
    how = ["--prompt", "The quick", "--temperature", 0, "--max-tokens", 12]
    code, out, err = run(capsys, export, *how, "--json")
    (found,) = answers(out)
    assert code == 0 and found["text"] == wanted and found["run_id"] == weights.run.run_id
    assert (found["prompt"], found["tokens"]) == ("The quick", 12)
    code, out, err = run(capsys, export.parent / "home", *how)
    assert out.endswith("\n") and len(out) == len(wanted.expandtabs()) + 1 and "12 tokens in" in err


def test_the_seed_decides_what_is_drawn(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        how = ["--max-tokens", 16, "--top-k", 20, "--seed", seed, "--json"]
        texts.append(answers(run(capsys, export, "--prompt", "", *how)[1])[0]["text"])
    assert texts[0] == texts[1] != texts[2]


def test_a_conversation_goes_on_until_the_lines_end(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ["--temperature", 0, "--max-tokens", 5, "--json"]
    typed(monkeypatch, "Hello", "", "Hello", "/new", "Hello", "/help", "/quit", "never asked")
    code, out, err = run(capsys, export, *how)
    first, second, third = answers(out)
    assert code == 0 and first["prompt"] == second["prompt"] == third["prompt"] == "Hello"
    assert first["text"] == third["text"], "/new forgets"
    assert err.count("/new: forget") == 1
    typed(monkeypatch, "Hello")
    code, out, _ = run(capsys, export, *how[:-1])
    assert code == 0 and len(out.rstrip("\n")) == len(first["text"].expandtabs().rstrip("\n"))


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = AtHand.next_logits

    def interrupted(self: AtHand, ids: Any, **how: Any) -> Any:
        asked.append(len(ids))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return plain(self, ids, **how)

    monkeypatch.setattr(AtHand, "next_logits", interrupted)
    typed(monkeypatch, "one", "two")
    code, out, err = run(capsys, export, "--temperature", 0, "--max-tokens", 4)
    assert code == 0 and "Traceback" not in err
    assert asked[:3] == [4, 5, 6] and asked[3] == len("one\n") + 2 + len("\ntwo\n"), "what it had written is kept"
    assert len(asked) == 7 and len(out.splitlines()) >= 2


def test_a_swarm_that_does_not_answer_now_may_do_so_later(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = iter([True])
    plain = AtHand.next_logits

    def sometimes(self: AtHand, ids: Any, **how: Any) -> Any:
        if next(fails, False):
            raise NetworkError("the swarm did not answer", why="a test", do="try again")
        return plain(self, ids, **how)

    monkeypatch.setattr(AtHand, "next_logits", sometimes)
    typed(monkeypatch, "one", "two")
    code, out, err = run(capsys, export, "--temperature", 0, "--max-tokens", 4, "--json")
    assert code == 0 and "did not answer" in err and [found["prompt"] for found in answers(out)] == ["two"]


def test_nothing_but_plain_characters_gets_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = chat.Screen()
    for text in ("a", "a\ufffd", "aé", "aé\x1b[2J", "aé\x1b[2J\tb\r\n", "aé\x1b[2J\tb\r\nc\ufffd"):
        screen.show(text)
    screen.show("aé\x1b[2J\tb\r\nc\ufffd", is_all=True)
    assert capsys.readouterr().out == "aé?[2J        b?\nc\ufffd\n"


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "config.json").write_text("{}")
    yield tmp_path


def test_errors_are_said(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, says in ((broken, "cannot load the model"), (broken / "x", "there is no folder")):
        code, out, err = run(capsys, folder, "--prompt", "x")
        assert code == 2 and says in err and "do:" in err and out == "" and "Traceback" not in err


@pytest.mark.parametrize("wrong", [
    [], ["x", "--initial-peers", "y"], ["x", "--temperature", "-1"], ["x", "--temperature", "nan"],
    ["x", "--top-k", "0"], ["x", "--max-tokens", "many"],
])
def test_the_command_line_refuses_nonsense(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        chat.main(wrong)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err
