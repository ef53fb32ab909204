"""RAFT's protocol end to end, with models that know, guess, or know nothing; and the run's own tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from swarm.asking.answerer import Manner
from swarm.asking.exam import Score, ask_raft, ask_tasks, average
from swarm.asking.target import Target
from swarm.data.batch import Batch
from swarm.data.raft import FIELDS, Row, Task, questions, row_text
from swarm.data.tokenizer import byte_tokenizer
from tests.unit.data.raft_support import LABELS, made_up


class Student:
    """Answers each prompt with what a function says of it, letter by letter; knows a prompt by its end."""

    def __init__(self, says: Callable[[str], str], ends: str = ":") -> None:
        self.says, self.ends = says, ends
        self.prompts: list[str] = []
        self.tokens: list[int] = []
        self.left: list[int] = []

    def loss(self, batch: Batch, *, on_progress: object = None) -> tuple[float, int]:
        raise NotImplementedError

    def next_logits(self, ids: Sequence[int], *, prefix: int = 0) -> torch.Tensor:
        if not self.left:
            self.prompts.append(bytes(ids).decode(errors="replace"))
            self.left = [*self.says(self.prompts[-1]).encode(), 256]
            self.tokens.append(len(ids))
        found = self.left.pop(0)
        if found in (10, 256):  # a line's end, after which nobody asks on
            self.left = []
        return torch.nn.functional.one_hot(torch.tensor(found), 300).float()


def target(student: Student, *, length: int = 4096) -> Target:
    return Target("a student", student, byte_tokenizer(), 300, Manner(sequence_length=length, end=256, num_tokens=257))


def task(name: str = "ade_corpus_v2") -> Task:
    rows = tuple(Row(row_text(FIELDS[name], row), row["Label"]) for row in made_up(name))
    return Task(name, rows, LABELS, "Label the sentence.")


def test_who_knows_all_gets_all_and_sees_prompts_as_published() -> None:
    known = {question.prompt.asked: question.right for question in questions(task())}
    student = Student(lambda prompt: f" {known[prompt.split(chr(10) * 2)[-1]]}\nSentence: and so on")
    heard: list[tuple[str, int, int]] = []
    (score,) = ask_raft(target(student), [task()], on_progress=lambda *what: heard.append(what))
    assert score == Score("ade_corpus_v2", 120, 1.0, 1.0)
    assert student.prompts == [question.prompt.text() for question in questions(task())]
    assert heard[-1] == ("ade_corpus_v2", 120, 120) and len(heard) == 120


def test_who_always_says_the_same_is_right_as_often_as_it_is() -> None:
    asked = list(questions(task()))
    share = sum(question.right == "ADE-related" for question in asked) / len(asked)
    (score,) = ask_raft(target(Student(lambda prompt: "ade-related.\n")), [task()])
    assert score.quasi_exact_match == pytest.approx(share) and 0 < share < 1
    assert score.macro_f1 == pytest.approx(2 * share / (1 + share) / 2), "nothing for the other label"


def test_who_says_too_much_is_wrong() -> None:
    (score,) = ask_raft(target(Student(lambda prompt: " not ADE-related, I think" * 5)), [task()], questions_max=3)
    assert score == Score("ade_corpus_v2", 9, 0.0, 0.0)


def test_the_answer_has_thirty_tokens_at_most() -> None:
    student = Student(lambda prompt: "x" * 100)
    ask_raft(target(student), [task()], questions_max=1)
    assert len(student.left) == 100 + 1 - 3 * 30, "three trials"


def test_where_there_is_no_room_examples_are_left_out_from_the_last() -> None:
    whole = next(questions(task())).prompt
    room = len(whole.text(2).encode()) + 30
    student = Student(lambda prompt: "\n")
    (score,) = ask_raft(target(student, length=room), [task()], questions_max=1)
    assert student.prompts[0] == whole.text(2) and score.shortened == 3
    assert max(student.tokens) + 30 <= room + 1
    tiny = Student(lambda prompt: "\n")
    ask_raft(target(tiny, length=40), [task()], questions_max=1)
    assert all(prompt.endswith("\nLabel:") and len(prompt) == 10 for prompt in tiny.prompts), "the question stays"


def test_the_average_is_over_tasks() -> None:
    scores = [Score("a", 120, 0.5, 0.25), Score("b", 6, 1.0, 0.75)]
    assert average(scores) == {"quasi_exact_match": 0.75, "macro_f1": 0.5}


EXAMPLES = {
    "sums": [("2 and 3. A:", "2 and 3 are 5. The answer is 5."), ("4 and 4. A:", "4 and 4 are 8. The answer is 8.")],
    "colours": [("sky? A:", "blue"), ("grass? A:", "green")],
}


def test_of_a_chain_of_thought_the_answer_counts() -> None:
    says = {"2 and 3. A:": "Let me see.The answer is 5!", "4 and 4. A:": "the answer is 9", "sky? A:": " Blue.",
            "grass? A:": "blue\n"}
    heard: list[tuple[str, int, int]] = []
    found = ask_tasks(target(Student(says.__getitem__)), EXAMPLES, on_progress=lambda *what: heard.append(what))
    assert [(score.name, score.questions, score.quasi_exact_match) for score in found] == [
        ("sums", 2, 0.5), ("colours", 2, 0.5),
    ]
    assert heard == [("sums", 1, 2), ("sums", 2, 2), ("colours", 1, 2), ("colours", 2, 2)]


def test_an_answer_of_several_lines_is_read_to_its_end() -> None:
    pairs = {"x": [("q:", "one\ntwo\nThe answer is 3")]}

    class Patient(Student):
        def next_logits(self, ids: Sequence[int], *, prefix: int = 0) -> torch.Tensor:
            if not self.left:
                self.left = [*b"1\n2\nThe answer is 3", 256]
            return torch.nn.functional.one_hot(torch.tensor(self.left.pop(0)), 300).float()

    assert ask_tasks(target(Patient(str)), pairs)[0].quasi_exact_match == 1.0


def test_who_never_ends_is_stopped() -> None:
    student = Student(lambda prompt: "a" * 500)
    assert ask_tasks(target(student), {"x": [("q:", "abcd")]})[0].quasi_exact_match == 0.0
    assert len(student.left) == 501 - (2 * 4 + 8)
