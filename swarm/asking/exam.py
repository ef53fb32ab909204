"""Questions with a right answer: RAFT by HELM's protocol, and held-out examples of a run's own tasks.

The model is asked for its likeliest answer, which is compared in normal form (data/scores.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from swarm.asking.answerer import answer, encode
from swarm.asking.target import Target
from swarm.data import raft
from swarm.data.scores import final_answer, macro_f1, mean, quasi_exact_match

Progress = Callable[[str, int, int], None]
SPARE_TOKENS = 8


@dataclass(frozen=True)
class Score:
    name: str
    questions: int
    quasi_exact_match: float
    """share of the answers that are right"""
    macro_f1: float
    shortened: int = 0
    """prompts from which examples were left out: they were longer than the model sees at once"""


def ask_raft(
    target: Target, tasks: Sequence[raft.Task], *, questions_max: int | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> list[Score]:
    """One score a task: 40 questions in each of three trials, the mean over trials. `questions_max`: only the first so
    many of each trial, to try it out; the score is then not HELM's."""
    return [_ask_task(target, task, questions_max, on_progress) for task in tasks]


def _ask_task(target: Target, task: raft.Task, questions_max: int | None, on_progress: Progress) -> Score:
    trials: dict[int, list[raft.Question]] = {}
    for question in raft.questions(task):
        trials.setdefault(question.trial, []).append(question)
    asked = {trial: found[:questions_max] for trial, found in trials.items()}
    total, done, shortened = sum(map(len, asked.values())), 0, 0
    matches, f1s = [], []
    for found in asked.values():
        answers = []
        for question in found:
            prompt, is_whole = _fitting(target, question.prompt)
            shortened += not is_whole
            answers.append(answer(
                target.answerer, target.tokenizer, prompt, target.manner, max_tokens=raft.ANSWER_TOKENS_MAX
            ))
            done += 1
            on_progress(task.name, done, total)
        rights = [question.right for question in found]
        matches += [quasi_exact_match(*pair) for pair in zip(answers, rights, strict=True)]
        f1s.append(macro_f1(answers, rights))
    return Score(task.name, total, mean(matches), mean(f1s), shortened)


def _fitting(target: Target, prompt: raft.Prompt) -> tuple[str, bool]:
    """The prompt with as many of its examples, from the first, as leave room for the answer; whether that is all.

    Where not even the question fits, HELM cuts off its end, which would leave nothing to answer; here the beginning
    gives way (answer)."""
    room = target.manner.sequence_length - len(target.manner.mark) - raft.ANSWER_TOKENS_MAX
    for count in range(len(prompt.examples), 0, -1):
        text = prompt.text(count)
        if len(encode(target.tokenizer, text)) <= room:
            return text, count == len(prompt.examples)
    return prompt.text(0), False


def ask_tasks(
    target: Target, examples: Mapping[str, Sequence[tuple[str, str]]], *,
    on_progress: Progress = lambda what, done, total: None,
) -> list[Score]:
    """`examples`: source -> (prompt, right answer). Of a chain of thought its final answer counts. Where the right
    answer is one line, the end of the line ends the model's."""
    found = []
    for name, pairs in examples.items():
        answers = []
        for number, (prompt, right) in enumerate(pairs, start=1):
            answers.append(final_answer(answer(
                target.answerer, target.tokenizer, prompt, target.manner,
                max_tokens=2 * len(encode(target.tokenizer, right)) + SPARE_TOKENS,
                stop=None if "\n" in right.strip() else "\n",
            )))
            on_progress(name, number, len(pairs))
        rights = [final_answer(right) for _, right in pairs]
        matches = [quasi_exact_match(*pair) for pair in zip(answers, rights, strict=True)]
        found.append(Score(name, len(pairs), mean(matches), macro_f1(answers, rights)))
    return found


def average(scores: Sequence[Score]) -> dict[str, float]:
    """Over tasks, each counting the same, as HELM's RAFT score is."""
    return {
        "quasi_exact_match": mean(score.quasi_exact_match for score in scores),
        "macro_f1": mean(score.macro_f1 for score in scores),
    }
