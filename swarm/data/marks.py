"""Token ids that stand for no text: the end of a document, UL2's modes, and the sentinels in place of hidden spans."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Marks:
    end: int
    """end of a text, and padding"""
    s2s: int | None = None
    nlu: int | None = None
    nlg: int | None = None
    sentinels: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Marks:
        raise NotImplementedError
