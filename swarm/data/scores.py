"""How an answer is compared with the right one: quasi-exact match and macro-F1, as HELM measures RAFT.

Quasi-exact: small words and marks do not count ("The University." is "university"), everything else must be equal
(https://arxiv.org/abs/2211.09110, appendix C; SQuAD's normal form). A model that goes on talking is wrong.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_MARKS = str.maketrans("", "", string.punctuation)
_ANSWER = re.compile(r"\banswer is\b[:\s]*", re.IGNORECASE)


def normal_form(text: str) -> str:
    """Lower case, without punctuation (removed, not made a space), articles, and more than one space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_MARKS)).split())


def quasi_exact_match(answer: str, right: str) -> bool:
    """Equal in normal form. An answer that is nothing is never right."""
    found = normal_form(answer)
    return found != "" and found == normal_form(right)


def macro_f1(answers: Sequence[str], rights: Sequence[str], *, labels: Iterable[str] = ()) -> float:
    """Mean of the labels' F1 (harmonic mean of precision and recall), each label counting the same, 0 to 1.

    Labels are those among `rights` and `labels`, compared in normal form; a label that neither occurs nor is answered
    counts nothing. An answer that is no label is a miss of the right one, and no label's false alarm.
    Raises ValueError where they are not equally many, or none.
    """
    if len(answers) != len(rights) or not rights:
        raise ValueError(f"{len(answers)} answers to {len(rights)} questions")
    pairs = [(normal_form(answer), normal_form(right)) for answer, right in zip(answers, rights, strict=True)]
    scores = []
    for label in {normal_form(label) for label in labels} | {right for _, right in pairs}:
        hits = sum(answer == right == label for answer, right in pairs)
        named = sum((answer == label) + (right == label) for answer, right in pairs)
        if named:
            scores.append(2 * hits / named)
    return sum(scores) / len(scores)


def final_answer(text: str) -> str:
    """What a chain of thought ends in: what comes after its last "answer is", else all of the text."""
    return _ANSWER.split(text)[-1].strip()


def mean(values: Iterable[float]) -> float:
    """Of at least one."""
    found = list(values)
    return sum(found) / len(found)
