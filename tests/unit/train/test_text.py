"""Which text a run's peers get, from where, and that an event loop never stands still for it."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import pytest
import torch

from swarm.config import ModelConfig, SourceConfig, run_from_dict
from swarm.data.batch import Batch
from swarm.data.mixture import Mixture
from swarm.data.stream import PackedStream
from swarm.data.text_stream import TextClosed, drawn
from swarm.errors import ConfigError
from swarm.train.run_source import check_model
from swarm.train.text import open_text

MODEL = {"config": {"model_type": "gptj", "vocab_size": 320, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}}


def run_with(**text):
    train = {"sequence_length": 32, "batch_sequences": 4, "total_tokens": 10_000}
    return run_from_dict({"name": "t", "model": MODEL, "train": train, **text}, origin="t.yaml")


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"sentence {i}. " for i in range(2000)))
    return str(tmp_path / "book.txt")


def opened(run, tmp_path, *, reader="anna", saved=None, tokens=0, warnings=None):
    return open_text(
        run, reader=reader, saved=saved or {}, cache=tmp_path / "cache", swarm_tokens=lambda: tokens,
        warn=(warnings if warnings is not None else []).append,
    )  # fmt: skip


def test_one_text_without_phases_is_a_packed_stream_as_ever(book, tmp_path):
    stream = opened(run_with(data={"files": [book]}), tmp_path)
    assert isinstance(stream, PackedStream) and stream.next_batch(3).segments is None
    stream.close()
    assert len(stream.next_batch(1)) == 1


@pytest.mark.parametrize(
    "text",
    [
        {"data": {"files": ["BOOK"]}, "phases": [{"objective": "ul2"}]},
        {"sources": {"book": {"files": ["BOOK"]}}},
    ],
    ids=["phases", "sources"],
)
def test_phases_and_sources_make_a_mixture(text, book, tmp_path):
    place = text.get("data") or text["sources"]["book"]
    place["files"] = [book]
    stream = opened(run_with(**text), tmp_path)
    assert isinstance(stream, Mixture)
    batch = stream.next_batch(4)
    assert batch.tokens.shape == (4, 32)
    stream.close()


@pytest.mark.parametrize("name", ["data", "sources"])
def test_it_goes_on_where_the_checkpoint_was(name, book, tmp_path):
    run = run_with(**{name: {"files": [book]} if name == "data" else {"book": {"files": [book]}}})
    one = opened(run, tmp_path)
    one.next_batch(5)
    state = one.state()
    rest = one.next_batch(6)
    again = opened(run, tmp_path, saved=state)
    assert again.next_batch(6).tokens.equal(rest.tokens)
    assert not opened(run, tmp_path).next_batch(6).tokens.equal(rest.tokens)
    for stream in (one, again):
        stream.close()


def test_a_place_in_other_text_is_a_new_beginning(book, tmp_path):
    run = run_with(sources={"book": {"files": [book]}})
    fresh, odd = opened(run, tmp_path), opened(run, tmp_path, saved={"pass": 3, "position": 2})
    assert fresh.next_batch(4).tokens.equal(odd.next_batch(4).tokens)
    for stream in (fresh, odd):
        stream.close()


def test_what_the_vocabulary_has_no_room_for_is_an_error(book, tmp_path):
    run = run_with(data={"files": [book]}, phases=[{"objective": "ul2"}])
    run = dataclasses.replace(run, model=ModelConfig(config={**MODEL["config"], "vocab_size": 257}))
    with pytest.raises(ConfigError, match="no room"):
        opened(run, tmp_path)


@pytest.mark.parametrize("kind", ["bloom", "gpt_neo"])
def test_a_model_that_ignores_masks_cannot_learn_from_packed_rows(kind, book, tmp_path):
    plain = dataclasses.replace(
        run_with(data={"files": [book]}), model=ModelConfig(config={"model_type": kind, "vocab_size": 320})
    )
    check_model(plain)
    run = dataclasses.replace(plain, data=None, sources={"book": SourceConfig(files=[book])})
    with pytest.raises(ConfigError, match="cannot learn from prefixes or packed texts"):
        check_model(run)
    with pytest.raises(ConfigError, match="cannot learn"):
        opened(run, tmp_path)


class Waiting:
    """Has no text until told to."""

    may_wait = True

    def __init__(self):
        self.there = threading.Event()
        self.closed = False

    def next_batch(self, num_sequences):
        assert self.there.wait(60)
        if self.closed:
            raise TextClosed
        return Batch(torch.zeros(num_sequences, 4, dtype=torch.int64))

    def state(self):
        return {}

    def load_state(self, state):
        pass

    def close(self):
        self.closed = True
        self.there.set()


def test_a_loop_goes_on_while_text_is_waited_for():
    async def play():
        stream, turns = Waiting(), 0
        batch = asyncio.ensure_future(drawn(stream, 2))
        for _ in range(5):
            await asyncio.sleep(0)
            turns += 1
        assert not batch.done() and turns == 5
        stream.there.set()
        assert len(await batch) == 2

    asyncio.run(play())


def test_closing_ends_the_waiting():
    async def play():
        stream = Waiting()
        batch = asyncio.ensure_future(drawn(stream, 2))
        await asyncio.sleep(0)
        stream.close()
        with pytest.raises(TextClosed):
            await batch

    asyncio.run(play())
