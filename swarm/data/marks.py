"""Token ids that stand for no text: the end of a document, UL2's modes, and the sentinels in place of hidden spans.

Nothing is added to a model for them. They are rows of its embedding that no text uses: GPT-J's has 50,400 rows for
50,257 tokens, and its tokenizer names the other 143 <|extratoken_1..143|>; "bytes" with 320 rows has 63 to spare. A
tokenizer that names our modes (an exported one does) is taken at its word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

S2S, NLU, NLG = MODES = ("[S2S]", "[NLU]", "[NLG]")
"""UL2's names (https://arxiv.org/abs/2205.05131): write on, short spans, long or many spans"""
SPARE = re.compile(r"<\|?(extratoken|extra_id|sentinel)_\d+\|?>")
"""tokens that tokenizers have for such purposes, and the names that `names` gives"""


@dataclass(frozen=True)
class Marks:
    end: int
    """of a text; padding, too"""
    modes: tuple[int, ...] = ()
    """of [S2S], [NLU] and [NLG]; none where the vocabulary has no room"""
    sentinels: tuple[int, ...] = ()
    """the first one stands for the first span of an example"""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Marks:
        """`vocabulary`: rows of the model's embedding. Without spare rows there are no modes and no sentinels, which
        objectives that need them complain of (objectives.py)."""
        assert isinstance(tokenizer.eos_token_id, int), "load_tokenizer sees to it"
        known = tokenizer.get_vocab()
        beyond = range(max(known.values()) + 1, vocabulary)
        spare = sorted(number for name, number in known.items() if SPARE.fullmatch(name) and number < vocabulary)
        spare += beyond
        named = tuple(known[mode] for mode in MODES if mode in known)
        if len(named) < len(MODES):
            named, spare = tuple(spare[:len(MODES)]), spare[len(MODES):]
        if len(named) < len(MODES):
            return cls(tokenizer.eos_token_id)
        return cls(tokenizer.eos_token_id, named, tuple(spare))

    @property
    def names(self) -> dict[int, str]:
        """What to call them in a tokenizer that goes out with a model: id -> name, lowest id first."""
        sentinels = {token: f"<|sentinel_{number}|>" for number, token in enumerate(self.sentinels)}
        return dict(sorted({**dict(zip(self.modes, MODES, strict=False)), **sentinels}.items()))
