"""Every run that is ready-made can be loaded and started as far as a machine without internet can tell; the recipe is
as it was published; the small run learns from the data that its script writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from scripts import make_small_data
from swarm.config import MAX_RUN_CONFIG_BYTES, canonical_json, load_run, run_from_json
from swarm.data.held_out import held_out, held_out_questions
from swarm.data.hub import PARQUET, REPLACED
from swarm.data.marks import Marks
from swarm.data.mixture import open_mixture
from swarm.data.objectives import make_objective
from swarm.data.shards import find_shards
from swarm.data.tokenizer import byte_tokenizer, load_tokenizer
from swarm.errors import HomeError
from swarm.model.architecture import architecture
from swarm.model.fragments import cut
from swarm.model.skeleton import skeleton

RUNS = sorted((Path(__file__).parents[2] / "peers" / "runs").glob("*.yaml"))
BYTES = byte_tokenizer()
VOCABULARY = 832
"""of the small run's model"""


@pytest.fixture(params=RUNS, ids=lambda path: path.stem)
def run(request):
    return load_run(request.param)


def test_a_run_is_called_as_its_file_and_fits_a_record(run, request):
    assert run.name == request.node.callspec.params["run"].stem
    complete = dataclasses.replace(run, initial_digests=["0" * 64] * run.fragments)
    text = canonical_json(complete)
    assert len(text) <= MAX_RUN_CONFIG_BYTES and run_from_json(text, run_id=complete.run_id) == complete


def test_its_model_can_be_cut_as_it_says(run):
    config = architecture(run).get_text_config()
    assert config.max_position_embeddings >= run.train.sequence_length
    assert len(cut(skeleton(run), run.fragments)) == run.fragments


def test_its_vocabulary_has_room_for_its_objectives(run):
    if run.tokenizer == "bytes":
        marks = Marks.of(BYTES, architecture(run).get_text_config().vocab_size)
    else:  # GPT-J's own 50,257 tokens cannot be fetched here, and the small run's are made with its data
        end, used = {"gpt-jt": (50256, 50257), "gpt-jt-small": (0, make_small_data.VOCABULARY)}[run.name]
        marks = Marks(end, (used, used + 1, used + 2), tuple(range(used + 3, run.model.config["vocab_size"])))
    for phase in run.all_phases():
        assert make_objective(phase.objective, sequence_length=run.train.sequence_length, marks=marks)


# --- GPT-JT's recipe


@pytest.fixture
def recipe():
    return load_run(next(path for path in RUNS if path.stem == "gpt-jt"))


def test_the_recipe_is_as_published(recipe):
    """https://huggingface.co/togethercomputer/GPT-JT-6B-v1"""
    first, second = recipe.all_phases()
    assert (first.tokens, first.objective, first.mixture) == (2_620_000_000, "ul2", {"pile": 1.0})
    assert second.tokens == 920_000_000 and second.objective == "prefix"
    assert second.mixture == pytest.approx({"cot": 0.05, "p3": 0.2, "ni": 0.2, "pile": 0.55})
    assert recipe.train.learning_rate == 1e-5 and recipe.train.sequence_length == 2048
    assert 4 * recipe.train.batch_sequences == 64, "four peers have its batch"
    assert recipe.phase_at(2_619_999_999) == 0 and recipe.phase_at(2_620_000_000) == 1
    assert {name: source.format for name, source in recipe.sources.items()} == {
        "pile": "text", "p3": "p3", "ni": "natural-instructions", "cot": "cot",
    }  # fmt: skip


def test_the_recipe_names_data_sets_that_load_today(recipe):
    for source in recipe.sources.values():
        assert source.hub is not None and source.streaming, "none of them fits a laptop's memory"
        if "revision" in REPLACED.get(source.hub.lower(), ""):
            assert source.revision == PARQUET


# --- the small one


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The run, in a folder where its data is."""
    monkeypatch.chdir(tmp_path)
    make_small_data.write(Path(make_small_data.FOLDER), examples=200, text_bytes=100_000)
    return load_run(next(path for path in RUNS if path.stem == "gpt-jt-small"))


def test_the_small_run_finds_its_data_in_the_published_formats(small):
    found = {name: [s.name for s in find_shards(source)] for name, source in small.sources.items()}
    assert found == {
        "pile": ["00.jsonl.zst"],
        "p3": ["kind.jsonl", "opposite.jsonl", "review.jsonl"],
        "ni": ["task001_review_sentiment", "task002_number_parity", "task003_first_colour"],
        "cot": ["few-shot.json", "sums.jsonl"],
    }


def test_the_small_run_trains_on_all_of_it_in_both_phases(small):
    tokens = [0]
    mixture = open_mixture(
        small, load_tokenizer(small), vocabulary=VOCABULARY, reader="anna", swarm_tokens=lambda: tokens[0]
    )
    mixture.start()
    batch = mixture.next_batch(8)
    assert batch.tokens.shape == (8, small.train.sequence_length) and batch.segments is not None
    tokens[0] = small.phases[0].tokens
    for _ in range(60):
        mixture.next_batch(8)
    drawn = mixture.tokens()
    total = sum(drawn[name] for name in ("p3", "ni", "cot"))
    share = small.all_phases()[1].mixture
    assert drawn["p3"] / total == pytest.approx(share["p3"] / (1 - share["pile"]), abs=0.02)
    mixture.close()


def test_the_small_run_has_questions_and_rows_that_are_held_out(small):
    questions = held_out_questions(small)
    assert set(questions) == {"p3", "ni", "cot"} and all(len(of) > 5 for of in questions.values())
    labels = {question.labels for question in questions["p3"]} | {question.labels for question in questions["ni"]}
    assert {("animal", "food"), ("bad", "good"), ("even", "odd"), ("negative", "positive")} <= labels
    rows = held_out(small, load_tokenizer(small), vocabulary=VOCABULARY, sequences=4)
    assert set(rows) == {"pile", "p3", "ni", "cot"}


def test_no_question_is_in_what_is_trained_on(small):
    for name, make in make_small_data.P3.items():
        pairs = make_small_data._pairs(name, make, 0, 200)
        assert len({given for given, _ in pairs}) == len(pairs) > 150
    questions = [question for of in held_out_questions(small).values() for question in of]
    for source in small.sources.values():
        for shard in find_shards(source):
            samples = list(shard.samples())
            assert len({sample.prompt or sample.text for sample in samples}) == len(samples)
    assert len({question.name for question in questions}) == len(questions)


def test_the_tokenizer_has_the_words_of_the_tasks(small):
    tokenizer = load_tokenizer(small)
    assert small.model.config["vocab_size"] == VOCABULARY and len(tokenizer) <= make_small_data.VOCABULARY
    assert small.model.config["eos_token_id"] == tokenizer.eos_token_id == 0
    for _, make in make_small_data.INSTRUCTIONS.values():
        for _, answer in make_small_data._pairs("labels", make, 0, 50):
            assert len(tokenizer.encode(f" {answer}", add_special_tokens=False)) == 1, answer
    assert len(tokenizer.encode(" 217", add_special_tokens=False)) >= 3, "parity is in the last digit"
    for text in ("Q: 1 + 5 = ?\nA: 6", "def f(x):\n    return [x]  # caf\u00e9", "  two  spaces\n\n"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_answers_are_right():
    dice = make_small_data.random.Random(0)
    for _ in range(200):
        question, answer = make_small_data.sum_of_three(dice)
        assert int(answer.split()[-1]) == eval(question.removesuffix(" = ?"))
        number, answer = make_small_data.parity(dice)
        assert (answer == "odd") == (int(number) % 2 == 1)
        colours, answer = make_small_data.first_colour(dice)
        assert colours.split()[0] == answer
        given, answer = make_small_data.opposite(dice)
        assert any(pair in ([w, answer], [answer, w]) for w in given.lower().replace(",", " ").replace(".", " ").split()
                   for pair in make_small_data.OPPOSITES)


def test_the_same_seed_makes_the_same_files_and_another_one_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_small_data.write(tmp_path / name, seed=seed, examples=20, text_bytes=20_000)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 12
    same = [(tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files]
    other = [(tmp_path / "a" / f).read_bytes() != (tmp_path / "c" / f).read_bytes() for f in files]
    assert all(same) and sum(other) >= 8


def test_the_script_says_what_to_do_next_and_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_small_data, "write", lambda folder, seed: folder.mkdir(parents=True))
    assert make_small_data.main([]) == 0
    assert "gpt-jt-small.yaml" in capsys.readouterr().out

    def refuse(folder, seed):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(make_small_data, "write", refuse)
    assert make_small_data.main(["/nowhere"]) == HomeError.exit_code
    assert "cannot write to /nowhere" in capsys.readouterr().err
