"""The text that a peer trains on: one packed stream, or the mixture of the run's sources and phases."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swarm.config import RunConfig
from swarm.data.mixture import open_mixture
from swarm.data.sources import documents
from swarm.data.stream import PackedStream, tokenise
from swarm.data.text_stream import TextStream
from swarm.data.tokenizer import load_tokenizer
from swarm.errors import StateError
from swarm.model.architecture import architecture
from swarm.train.run_source import check_model


def open_text(
    run: RunConfig, *, reader: str, saved: dict[str, Any], cache: Path, swarm_tokens: Callable[[], int],
    warn: Callable[[str], None],
) -> TextStream:
    """Ready to draw from, at the place `saved` by a checkpoint; where that is of other text, at a new beginning.

    `reader`: the peer's name: others draw other data. `swarm_tokens()` says which phase it is. Raises ConfigError.
    """
    check_model(run)
    tokenizer = load_tokenizer(run)
    stream: TextStream
    if not run.is_mixture:
        assert run.data is not None
        train, _ = documents(run.data, cache=cache)
        tokens = tokenise(train, tokenizer)
        stream = PackedStream(tokens, sequence_length=run.train.sequence_length, seed=run.seed, reader=reader)
        _go_on(stream, saved)
        return stream
    mixture = open_mixture(
        run, tokenizer, vocabulary=architecture(run).get_text_config().vocab_size, reader=reader,
        swarm_tokens=swarm_tokens, warn=warn, cache=cache,
    )
    _go_on(mixture, saved)
    mixture.start()
    return mixture


def _go_on(stream: TextStream, saved: dict[str, Any]) -> None:
    if saved:
        with contextlib.suppress(StateError):
            stream.load_state(saved)
