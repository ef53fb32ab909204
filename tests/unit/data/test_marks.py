"""Marks are taken from rows of the embedding that no text uses, the same ones on every machine."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from swarm.data.marks import MODES, Marks
from swarm.data.tokenizer import byte_tokenizer


def words(*more: str) -> PreTrainedTokenizerFast:
    """Ten words and an end, then these as added tokens: as GPT-J's tokenizer is made, in small."""
    core = Tokenizer(models.WordLevel({**{f"w{i}": i for i in range(10)}, "</s>": 10}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_tokens([AddedToken(name) for name in more])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")  # type: ignore[no-untyped-call]


def test_rows_beyond_the_tokenizer_are_spare() -> None:
    marks = Marks.of(byte_tokenizer(), 320)
    assert marks == Marks(256, (257, 258, 259), tuple(range(260, 320)))


def test_gpt_js_extra_tokens_are_spare() -> None:
    tokenizer = words(*(f"<|extratoken_{number}|>" for number in range(1, 8)))
    assert len(tokenizer) == 18
    assert Marks.of(tokenizer, 20) == Marks(10, (11, 12, 13), (14, 15, 16, 17, 18, 19)), "and the rows beyond"
    assert Marks.of(tokenizer, 18) == Marks(10, (11, 12, 13), (14, 15, 16, 17))


def test_without_room_there_are_none() -> None:
    for vocabulary in (257, 258, 259):
        assert Marks.of(byte_tokenizer(), vocabulary) == Marks(256)
    assert Marks.of(byte_tokenizer(), 260) == Marks(256, (257, 258, 259))
    assert Marks(256).names == {}


def exported(tokenizer: PreTrainedTokenizerBase, marks: Marks) -> PreTrainedTokenizerBase:
    assert list(marks.names) == list(range(len(tokenizer), len(tokenizer) + len(marks.names)))
    tokenizer.add_tokens(list(marks.names.values()))
    return tokenizer


def test_an_exported_tokenizer_has_the_same_marks() -> None:
    """Its modes and sentinels have names then, and the ids of the run."""
    marks = Marks.of(byte_tokenizer(), 300)
    again = exported(byte_tokenizer(), marks)
    assert again.get_vocab()["[S2S]"] == 257 and len(again) == 300
    assert Marks.of(again, 300) == marks
    assert Marks.of(exported(words(), Marks.of(words(), 30)), 30) == Marks.of(words(), 30)


def test_named_modes_are_taken_at_their_word() -> None:
    marks = Marks.of(words("<extra_id_0>", "[NLG]", "[S2S]", "<extra_id_1>", "[NLU]"), 16)
    assert marks == Marks(10, (13, 15, 12), (11, 14))
    assert [marks.names[token] for token in marks.modes] == list(MODES)


def test_a_name_beyond_the_model_is_no_row_of_it() -> None:
    tokenizer = words(*(f"<|extratoken_{number}|>" for number in range(1, 8)))
    assert Marks.of(tokenizer, 15) == Marks(10, (11, 12, 13), (14,))
