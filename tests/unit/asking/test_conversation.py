"""What is remembered of a conversation, and what is forgotten."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from swarm.asking.answerer import Manner, chooser, decode
from swarm.asking.conversation import Conversation
from swarm.asking.target import Target
from swarm.data.tokenizer import byte_tokenizer
from tests.unit.asking.test_answerer import Parrot, reads_out


def conversation(says: Parrot, *, length: int = 64, max_tokens: int = 20, mark: int = 0, **how: Any) -> Conversation:
    manner = Manner(sequence_length=length, end=256, num_tokens=257, mark=(299,) * mark)
    target = Target("a parrot", says, byte_tokenizer(), 300, manner)
    return Conversation(target, choose=chooser(manner), max_tokens=max_tokens, **how)


def shown(parrot: Parrot) -> str:
    """All that it was shown of the last question, before it said anything."""
    return decode(byte_tokenizer(), [token for token in parrot.shown[0][0] if token < 256])


def again(parrot: Parrot, text: str) -> None:
    """From now on it reads out this."""
    parrot.shown.clear()
    parrot.says = lambda ids: [*text.encode(), 256][len(parrot.shown) - 1]


def test_an_answer_grows_and_is_remembered() -> None:
    parrot = reads_out("Hi!")
    talk = conversation(parrot)
    assert list(talk.say("Hello")) == ["H", "Hi", "Hi!"] and talk.ids == list(b"Hi!")
    assert shown(parrot) == "Hello\n" and talk.turns == ["Hello\nHi!\n"]
    again(parrot, "Fine.")
    assert list(talk.say("How are you?"))[-1] == "Fine."
    assert shown(parrot) == "Hello\nHi!\nHow are you?\n"
    talk.forget()
    again(parrot, "Who?")
    list(talk.say("It is me"))
    assert shown(parrot) == "It is me\n"


def test_a_text_can_be_gone_on_with() -> None:
    parrot = reads_out(" upon")
    assert list(conversation(parrot).say("Once", goes_on=True))[-1] == " upon" and shown(parrot) == "Once"


def test_the_oldest_is_forgotten_where_there_is_no_room() -> None:
    parrot = reads_out("one")
    talk = conversation(parrot, length=40, max_tokens=10)
    for number in range(6):
        again(parrot, "one")
        list(talk.say(f"question {number}"))
        assert len(parrot.shown[0][0]) <= 30, "the answer has its room"
    assert shown(parrot) == "question 4\none\nquestion 5\n"
    assert talk.turns == ["question 4\none\n", "question 5\none\n"], "for good"


@pytest.mark.parametrize("mark", [0, 1])
def test_of_a_line_that_is_too_long_the_end_is_shown(mark: int) -> None:
    parrot = reads_out("x")
    talk = conversation(parrot, length=20, max_tokens=4, mark=mark)
    list(talk.say("0123456789abcdefghijklmnopqrstuvwxyz"))
    assert shown(parrot) == "0123456789abcdefghijklmnopqrstuvwxyz\n"[-(16 - mark):]
    assert parrot.shown[0][0][:mark] == [299] * mark


def test_half_of_what_it_sees_is_left_for_the_text() -> None:
    parrot = reads_out("x")
    list(conversation(parrot, length=20, max_tokens=1000).say("0123456789abcdefghij"))
    assert len(parrot.shown[0][0]) == 10


def test_an_answer_may_end_with_its_line() -> None:
    parrot = reads_out("yes\nno\n")
    talk = conversation(parrot, stop_at_newline=True)
    assert list(talk.say("?")) == ["y", "ye", "yes", "yes"]
    assert talk.turns == ["?\nyes\n"] and len(parrot.shown) == 4
    assert list(conversation(reads_out("yes\nno")).say("?"))[-1] == "yes\nno"


def test_what_was_written_before_somebody_stopped_listening_is_remembered() -> None:
    talk = conversation(reads_out("abcdefgh"))
    said = talk.say("?")
    assert list(itertools.islice(said, 3)) == ["a", "ab", "abc"]
    said.close()
    assert talk.turns == ["?\nabc\n"] and talk.ids == list(b"abc")


def test_characters_of_several_bytes_come_whole() -> None:
    assert list(conversation(reads_out("漢")).say("?"))[-1] == "漢"
