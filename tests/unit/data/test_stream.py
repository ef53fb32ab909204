"""The packed stream: every window once a pass, the same after a restart, different for each reader."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from swarm.data.stream import PackedStream, held_out_batches, tokenise
from swarm.data.tokenizer import byte_tokenizer
from swarm.errors import ConfigError, StateError


def dataset(*texts: str) -> Dataset:
    return Dataset.from_dict({"name": [str(i) for i in range(len(texts))], "text": list(texts)})


def stream(tokens: int = 1000, length: int = 16, seed: int = 0, reader: str = "anna") -> PackedStream:
    """Over the numbers 0, 1, 2, ...: a window's first number is where it starts."""
    return PackedStream(torch.arange(tokens, dtype=torch.int32), sequence_length=length, seed=seed, reader=reader)


def starts_of_pass(one: PackedStream, number: int) -> list[int]:
    """The windows of one pass, read one by one until the state says that the next pass has begun."""
    one.load_state({"pass": number, "position": 0})
    starts = []
    while True:
        window = one.next_batch(1).tokens
        if one.state()["pass"] != number:
            return starts
        starts.append(int(window[0, 0]))


def test_bytes_are_packed_with_an_end_after_each_document() -> None:
    tokens = tokenise(dataset("ab", "é", "<eos>"), byte_tokenizer())
    assert tokens.dtype == torch.uint16
    assert tokens.tolist() == [97, 98, 256, *"é".encode(), 256, *b"<eos>", 256]


def test_fast_path_equals_the_tokenizer() -> None:
    texts = ["", "a\r\nb", "naïve 漢字 🎉\x00", "x" * 1000]
    tokenizer = byte_tokenizer()
    slow = [token for text in texts for token in [*tokenizer.encode(text), 256]]
    assert tokenise(dataset(*texts), tokenizer).tolist() == slow


def test_other_tokenizers_and_many_documents() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    tokens = tokenise(dataset(*["hello world"] * 2500), tokenizer)
    assert tokens.tolist() == [2, 3, 1] * 2500


def test_large_vocabularies_take_four_bytes() -> None:
    words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(70_000)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    tokens = tokenise(dataset("w69999 w3"), tokenizer)
    assert tokens.dtype == torch.int32 and tokens.tolist() == [70_001, 5, 1]


def test_no_documents_no_tokens() -> None:
    assert len(tokenise(dataset(), byte_tokenizer())) == 0


def test_batches_are_int64_windows_of_the_text() -> None:
    drawn = stream().next_batch(5)
    assert drawn.segments is None, "each is one causal segment, whatever documents are in it"
    batch = drawn.tokens
    assert batch.shape == (5, 16) and batch.dtype == torch.int64
    for row in batch.tolist():
        assert row == list(range(row[0], row[0] + 16))


def test_two_byte_tokens_come_out_right() -> None:
    tokens = tokenise(dataset("abc" * 50), byte_tokenizer())
    one = PackedStream(tokens, sequence_length=8, seed=0, reader="anna")
    assert set(one.next_batch(20).tokens.flatten().tolist()) <= {97, 98, 99, 256}


@pytest.mark.parametrize(("tokens", "length"), [(1000, 16), (1000, 7), (160, 16), (31, 16), (17, 16), (16, 16)])
def test_each_window_exactly_once_a_pass(tokens: int, length: int) -> None:
    for number in range(5):
        starts = sorted(starts_of_pass(stream(tokens, length), number))
        assert starts, "a pass must show something"
        assert starts == list(range(starts[0], tokens - length + 1, length)), "a gap, an overlap or a repetition"
        assert starts[0] < length and tokens - (starts[-1] + length) < length


def test_batches_run_on_into_the_next_pass() -> None:
    whole = stream(tokens=100, length=16)
    batches = torch.cat([whole.next_batch(4).tokens for _ in range(10)])
    one_by_one = stream(tokens=100, length=16)
    assert torch.equal(batches, torch.cat([one_by_one.next_batch(1).tokens for _ in range(40)]))
    assert torch.equal(batches, stream(tokens=100, length=16).next_batch(40).tokens)
    assert whole.state() == one_by_one.state() and whole.state()["pass"] > 4


def test_passes_differ_in_order_and_in_cut() -> None:
    passes = [starts_of_pass(stream(), number) for number in range(8)]
    assert len({tuple(starts) for starts in passes}) == 8
    assert len({starts[0] % 16 for starts in passes}) > 3, "the windows are always cut at the same places"
    assert all(starts != sorted(starts) for starts in passes), "not shuffled"


def test_same_seed_and_reader_same_order() -> None:
    assert torch.equal(stream().next_batch(200).tokens, stream().next_batch(200).tokens)


def test_order_never_changes_between_versions() -> None:
    """Pinned: a checkpoint written before an upgrade must go on at the same window after it."""
    assert stream(seed=1, reader="pin").next_batch(4).tokens[:, 0].tolist() == [294, 262, 182, 22]


def test_readers_and_seeds_are_independent() -> None:
    base = stream().next_batch(60).tokens[:, 0]
    for other in (stream(reader="bert"), stream(seed=1), stream(reader="0/anna"), stream(reader="")):
        starts = other.next_batch(60).tokens[:, 0]
        agree = (starts // 16 == base // 16).float().mean()
        assert agree < 0.2


@pytest.mark.parametrize("batches", [0, 1, 5, 15, 40])
def test_resume_is_exact(batches: int) -> None:
    one = stream()
    for _ in range(batches):
        one.next_batch(7)
    state = json.loads(json.dumps(one.state()))
    other = stream()
    other.next_batch(3)
    other.load_state(state)
    assert other.state() == state
    for _ in range(20):
        assert torch.equal(one.next_batch(7).tokens, other.next_batch(7).tokens)


def test_state_is_not_tied_to_the_batch_size() -> None:
    one, other = stream(), stream()
    one.next_batch(12)
    other.load_state(one.state())
    assert torch.equal(torch.cat([one.next_batch(2).tokens, one.next_batch(4).tokens]), other.next_batch(6).tokens)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"pass": 0},
        {"pass": -1, "position": 0},
        {"pass": 0, "position": -1},
        {"pass": 0, "position": 1.5},
        {"pass": True, "position": 0},
        {"pass": "0", "position": 0},
        {"pass": 0, "position": 10**9},
    ],
)
def test_bad_state_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    one, other = stream(), stream()
    one.next_batch(70)
    other.next_batch(70)
    with pytest.raises(StateError) as caught:
        one.load_state(state)
    assert caught.value.do
    assert one.state() == other.state()
    assert torch.equal(one.next_batch(9).tokens, other.next_batch(9).tokens)


def test_text_shorter_than_a_sequence() -> None:
    with pytest.raises(ConfigError, match="shorter than one sequence") as caught:
        stream(tokens=15, length=16)
    assert "15 tokens" in caught.value.why
    with pytest.raises(ConfigError, match="shorter than one sequence"):
        held_out_batches(torch.arange(15), sequence_length=16, num_sequences_max=4)


def test_held_out_windows_are_fixed_spread_and_apart() -> None:
    tokens = torch.arange(10_000, dtype=torch.int32)
    batch = held_out_batches(tokens, sequence_length=16, num_sequences_max=50).tokens
    assert batch.shape == (50, 16) and batch.dtype == torch.int64
    assert torch.equal(batch, held_out_batches(tokens, sequence_length=16, num_sequences_max=50).tokens)
    gaps = batch[1:, 0] - batch[:-1, 0]
    assert gaps.min() >= 16 and gaps.max() - gaps.min() <= 16
    assert batch[0, 0] == 0 and batch[-1, -1] > 9_700


@pytest.mark.parametrize("tokens", [16, 17, 31, 32, 100])
def test_held_out_takes_all_there_is_where_there_is_little(tokens: int) -> None:
    batch = held_out_batches(torch.arange(tokens), sequence_length=16, num_sequences_max=1000).tokens
    assert batch[:, 0].tolist() == list(range(0, tokens - 15, 16))
