"""Few-shot packs: every sample once, tasks apart, wordings as published, all of it by the dice."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data import templates
from swarm.data.sample import Sample
from swarm.data.templates import Pack, labels_of, packs, put


def dice(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


def task(name: str, number: int, *, labels: int = 2, definition: str = "") -> list[Sample]:
    return [
        Sample(f"{name}#{i}", f"label{i % labels}", f"{name} question {i}", name, definition) for i in range(number)
    ]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), max_size=4), documents=st.integers(0, 5), shots=st.integers(0, 6),
    room=st.integers(1, 2000), seed=st.integers(0, 9),
)  # fmt: skip
def test_each_sample_is_in_exactly_one_pack_and_tasks_stay_apart(
    sizes: list[int], documents: int, shots: int, room: int, seed: int
) -> None:
    samples = [Sample(f"d{i}", "text") for i in range(documents)]
    for number, size in enumerate(sizes):
        samples += task(f"task{number}", size)
    made = packs(samples, dice(seed), shots=shots, room_chars=room)
    assert sorted(s.name for pack in made for s in pack.samples) == sorted(s.name for s in samples)
    for pack in made:
        assert len({s.task for s in pack.samples}) == 1
        assert 1 <= len(pack.samples) <= shots + 1
        assert len(pack.samples) == 1 or sum(len(s.prompt) + len(s.text) for s in pack.samples) <= room
        assert pack.samples[0].prompt or len(pack.samples) == 1, "documents stay alone"


def test_packs_are_of_all_sizes_and_in_random_order() -> None:
    made = packs(task("a", 4000) + task("b", 400), dice(), shots=3, room_chars=10_000)
    sizes = Counter(len(pack.samples) for pack in made)
    assert all(0.2 < sizes[size] / len(made) < 0.3 for size in (1, 2, 3, 4))
    names = [pack.samples[0].task for pack in made]
    assert 10 < names[: len(names) // 2].count("b") < names.count("b") - 10
    assert made == packs(task("a", 4000) + task("b", 400), dice(), shots=3, room_chars=10_000), "not by the dice alone"
    assert made != packs(task("a", 4000) + task("b", 400), dice(1), shots=3, room_chars=10_000)


def test_labels_are_the_answers_where_they_are_few() -> None:
    assert labels_of(task("a", 30, labels=3)) == ("label0", "label1", "label2")
    assert labels_of(task("a", 100, labels=11)) == (), "more than ten"
    assert labels_of(task("a", 8, labels=3)) == (), "too few examples to know"
    assert labels_of(task("a", 8, labels=1)) == ()
    assert labels_of([]) == ()


def test_text_is_put_as_it_is() -> None:
    assert put(Pack((Sample("a", " a\nb "),)), dice()) == ("", " a\nb ")


def all_ways(pack: Pack, number: int = 4000) -> list[tuple[str, str]]:
    draws = dice()
    return [put(pack, draws) for _ in range(number)]


def test_p3_is_worded_as_published() -> None:
    pack = Pack((Sample("a#0", "yes", "Is 2 even?", "a"), Sample("a#1", "no ", "Is 3 even? ", "a")), ("no", "yes"))
    ways = all_ways(pack)
    assert {answer for _, answer in ways} == {" no"}
    expected = {
        f"Is 2 even?{before}{words} yes{between}Is 3 even?{before}{words}"
        for between in templates.BETWEEN_EXAMPLES for before in templates.BEFORE_ANSWER
        for words in templates.ANSWER_WORDS
    }
    assert {prompt for prompt, _ in ways} == expected


def test_a_p3_prompt_that_asks_itself_gets_no_other_words() -> None:
    pack = Pack((Sample("a#0", "yes", "2 is even:", "a"), Sample("a#1", "no", "3 is even: ", "a")))
    assert {prompt for prompt, _ in all_ways(pack, 300)} == {
        f"2 is even: yes{between}3 is even:" for between in templates.BETWEEN_EXAMPLES
    }


def test_definitions_and_labels_come_as_often_as_published() -> None:
    samples = tuple(task("a", 2, definition="Say which it is."))
    ways = all_ways(Pack(samples, ("label0", "label1")))
    defined = [prompt.startswith("Say which it is.") for prompt, _ in ways]
    labelled = ["Possible labels:\n1. label0\n2. label1\n" in prompt for prompt, _ in ways]
    assert abs(np.mean(defined) - 2 / 3) < 0.03 and abs(np.mean(labelled) - 1 / 2) < 0.03
    both = [a and b for a, b in zip(defined, labelled, strict=True)]
    assert abs(np.mean(both) - 1 / 3) < 0.03, "one depends on the other"
    assert {answer for _, answer in ways} == {" label1"}
    asked = [f"{word}a question 1" for word in templates.INPUT_WORDS if word]
    words = Counter(any(question in prompt for question in asked) for prompt, _ in ways)
    assert abs(words[True] / len(ways) - 1 / 2) < 0.03
    assert not any("Possible" in prompt for prompt, _ in all_ways(Pack(samples), 200)), "labels of a task without"


def test_the_answer_carries_the_space() -> None:
    """A tokenizer makes one token of a space and the word after it: the prompt must not end with it."""
    for prompt, answer in all_ways(Pack(tuple(task("a", 3, definition="d"))), 300):
        assert prompt == prompt.rstrip() and answer.startswith(" ") and answer == answer.rstrip()
        assert (prompt + answer).count("label0") == 2


def test_wordings_never_change_between_versions() -> None:
    """Pinned: a checkpoint written before an upgrade must go on with the same rows after it."""
    pack = Pack(tuple(task("a", 2, definition="Say it.")), ("label0", "label1"))
    asked = "Say it.\n\nExample: a question 0\nOutput: label0\n\nExample: a question 1\nOutput:"
    assert put(pack, dice(3)) == (asked, " label1")
