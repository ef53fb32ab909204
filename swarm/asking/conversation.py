"""A conversation with a model that knows only texts: what was said is the text it goes on from.

Lines of the person and answers of the model follow each other; the oldest are forgotten where all of it, and the answer
to come, is longer than what the model sees at once. Pure: reading and showing are in chat.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from swarm.asking.answerer import Choose, decode, encode, write
from swarm.asking.target import Target


class Conversation:
    def __init__(self, target: Target, *, choose: Choose, max_tokens: int, stop_at_newline: bool = False) -> None:
        """`max_tokens`: of one answer; at most half of what the model sees is kept free for it."""
        self._target, self._choose, self._max_tokens = target, choose, max_tokens
        self._stop = "\n" if stop_at_newline else None
        self._turns: list[str] = []
        self.ids: list[int] = []
        """tokens of the last answer"""

    @property
    def turns(self) -> list[str]:
        """What is remembered, oldest first: a line with the answer to it is one."""
        return list(self._turns)

    def forget(self) -> None:
        self._turns = []

    def say(self, line: str, *, goes_on: bool = False) -> Iterator[str]:
        """The answer to a line as it grows: each time all of it so far. `goes_on`: the line's own text goes on, where
        else a new line begins. What was written is remembered, also where the caller stops listening."""
        asked = line if goes_on else line + "\n"
        self.ids, text = [], ""
        prompt = self._prompt(asked)
        try:
            for token in write(
                self._target.answerer, prompt, self._target.manner, choose=self._choose, max_tokens=self._max_tokens
            ):
                self.ids.append(token)
                text = decode(self._target.tokenizer, self.ids)
                if self._stop is not None and self._stop in text:
                    text = text.partition(self._stop)[0]
                    yield text
                    return
                yield text
        finally:
            self._turns.append(f"{asked}{text}\n")

    def _prompt(self, asked: str) -> list[int]:
        """Token ids of what is remembered and the new line. Forgets the oldest turns for good."""
        manner = self._target.manner
        room = manner.sequence_length - len(manner.mark)
        room -= min(self._max_tokens, room // 2)
        while True:
            ids = encode(self._target.tokenizer, "".join(self._turns) + asked)
            if len(ids) <= room or not self._turns:
                return ids[-room:]
            del self._turns[0]
