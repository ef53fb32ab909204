"""What is held out: never trained on, the same on every machine, bounded."""

from __future__ import annotations

import numpy as np
import pytest

from swarm.data import held_out as held_out_file
from swarm.data.held_out import held_out, held_out_questions
from swarm.data.mixture import open_mixture
from swarm.data.sources import is_held_out
from swarm.data.tokenizer import byte_tokenizer
from tests.unit.data.task_sets import p3_rows, run_over, write_instructions, write_jsonl

BYTES = byte_tokenizer()


@pytest.fixture
def run(tmp_path):
    say = {f"task{n}_say": [(f"Say {n}.{i}.", "yes" if i % 2 else "no") for i in range(80)] for n in range(3)}
    pile = [{"text": f"document {i}, " * 20} for i in range(200)]
    return run_over(
        {
            "pile": {"files": [str(write_jsonl(tmp_path / "pile.jsonl.zst", pile))], "held_out_percent": 10},
            "p3": {"format": "p3", "files": [str(write_jsonl(tmp_path / "p3.jsonl", p3_rows(500)))], "shots": 1},
            "ni": {
                "format": "natural-instructions", "files": [str(write_instructions(tmp_path / "ni", say))],
                "held_out_percent": 20, "shots": 0,
            },
        },
        phases=[{"tokens": 5000, "objective": "ul2", "mixture": {"pile": 1}}, {"objective": "prefix"}],
        length=128,
    )  # fmt: skip


def text_of(batch):
    return bytes((batch.tokens.numpy().flatten() % 256).astype(np.uint8)).decode(errors="replace")


def test_rows_are_of_held_out_samples_of_every_source(run):
    found = held_out(run, BYTES, vocabulary=320)
    assert set(found) == {"pile", "p3", "ni"}
    text = text_of(found["p3"])
    for number in range(500):
        assert (f"Is {number} even?" in text) == is_held_out(f"p3.jsonl#{number}", held_out_percent=1.0)
    assert all(batch.tokens.shape[1] == 128 and batch.num_targets > 0 for batch in found.values())


def test_they_are_the_same_each_time_and_no_more_than_asked_for(run):
    one, two = held_out(run, BYTES, vocabulary=320), held_out(run, BYTES, vocabulary=320)
    assert all(one[name].tokens.equal(two[name].tokens) and one[name].segments == two[name].segments for name in one)
    few = held_out(run, BYTES, vocabulary=320, sequences=3)
    assert all(len(batch) <= 3 for batch in few.values()) and len(few["pile"]) == 3


def test_the_objective_is_the_last_phase_s_or_the_one_that_is_named(run):
    prefixed = held_out(run, BYTES, vocabulary=320)["p3"]
    assert any(prefix > 1 for row in prefixed.segments for prefix, size in row if prefix < size)
    causal = held_out(run, BYTES, vocabulary=320, objective="causal")["p3"]
    assert causal.segments is None or all(p == 0 for row in causal.segments for p, size in row if p < size)
    assert 257 in held_out(run, BYTES, vocabulary=320, objective="ul2")["pile"].tokens, "a mode's mark"


def test_no_peer_trains_on_them(run):
    held = {number for number in range(500) if is_held_out(f"p3.jsonl#{number}", held_out_percent=1.0)}
    mixture = open_mixture(run, BYTES, vocabulary=320, reader="anna", swarm_tokens=lambda: 10**9)
    mixture.start()
    text = "".join(text_of(mixture.next_batch(8)) for _ in range(150))
    mixture.close()
    assert held and not [number for number in held if f"Is {number} even?" in text]
    assert sum(f"Is {number} even?" in text for number in range(500)) > 400


def test_a_stream_s_are_those_of_its_beginning(run, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out_file, "STREAMED_SAMPLES", 150)
    path = str(write_jsonl(tmp_path / "s.jsonl", p3_rows(400)))
    streamed = run_over({"p3": {"format": "p3", "files": [path], "streaming": True, "held_out_percent": 5}}, length=128)
    text = text_of(held_out(streamed, BYTES, vocabulary=320)["p3"])
    for number in range(400):
        held = number < 150 and is_held_out(f"s.jsonl#{number}", held_out_percent=5.0)
        assert (f"Is {number} even?" in text) == held


def test_a_source_without_held_out_samples_is_not_there(tmp_path):
    names = [i for i in range(100) if not is_held_out(f"a.jsonl#{i}", held_out_percent=1.0)]
    path = str(write_jsonl(tmp_path / "a.jsonl", p3_rows(min(20, len(names)))))
    run = run_over({"p3": {"format": "p3", "files": [path], "held_out_percent": 0.01}}, length=128)
    assert held_out(run, BYTES, vocabulary=320) == {} and held_out_questions(run) == {}


def test_questions_are_held_out_examples_with_their_labels(run):
    found = held_out_questions(run)
    assert set(found) == {"p3", "ni"}, "text asks nothing"
    assert len(found["ni"]) == sum(
        is_held_out(f"task{n}_say#task{n}_say-{i}", held_out_percent=20.0) for n in range(3) for i in range(80)
    )
    for question in found["ni"]:
        assert question.labels == ("no", "yes") and question.answer in question.labels
        assert question.prompt.count("Say ") == 1 and question.prompt == question.prompt.rstrip()
    assert found == held_out_questions(run)
    few = held_out_questions(run, most=5)
    assert [len(few[name]) for name in few] == [5, 5] if len(found["p3"]) >= 5 else True
    assert set(few["ni"]).issubset(found["ni"]) or {q.name for q in few["ni"]} <= {q.name for q in found["ni"]}
