"""Token ids and activations as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swarm.config import AveragingConfig, DataConfig, ModelConfig, PipelineConfig, RunConfig
from swarm.data.batch import Batch, Segment
from swarm.errors import BadMessage, PeerRefused
from swarm.pipeline import wire
from swarm.pipeline.messages import Microbatch


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 7, 64), (4, 128, 96), (1, 1, 1)])
def test_fp32_comes_through_as_it_is(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    data = wire.encode_values(values, 32)
    assert torch.equal(wire.decode_values(data, shape, 32), values)
    assert len(data) == wire.values_bytes(shape, 32)


@pytest.mark.parametrize(("bits", "quantum", "error"), [(8, 0.51 / 127, 0.008), (4, 1.01 / 8, 0.12)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_fewer_bits_are_off_by_half_a_quantum(bits: int, quantum: float, error: float, scale: float) -> None:
    """4 bits by a whole one at the end of the side that reaches less far, and by less than ever on the whole."""
    values = torch.randn(2, 33, 48, generator=torch.Generator().manual_seed(1)) * scale  # the bounds are of 13 blocks
    data = wire.encode_values(values, bits)
    found = wire.decode_values(data, (2, 33, 48), bits)
    assert float((found - values).abs().max()) <= float(values.abs().max()) * quantum
    assert float((found - values).norm() / values.norm()) < error
    assert len(data) == wire.values_bytes((2, 33, 48), bits) < values.numel() * bits / 8 * 1.2


def test_quantising_takes_out_no_bias() -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    errors = wire.decode_values(wire.encode_values(values, 8), (64, 256), 8) - values
    assert abs(float(errors.mean())) < 3 * float(errors.std()) / values.numel() ** 0.5


def test_what_is_no_number_is_not_sent() -> None:
    with pytest.raises(PeerRefused):
        wire.encode_values(torch.tensor([1.0, float("nan")]), 8)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_values_of_a_wrong_size_are_refused(bits: int) -> None:
    data = wire.encode_values(torch.randn(2, 300), bits)
    for wrong in (data[:-1], data + b"x", b""):
        with pytest.raises(BadMessage):
            wire.decode_values(wrong, (2, 300), bits)


def test_an_activation_that_is_no_number_is_refused() -> None:
    data = torch.full((1, 256), float("inf")).numpy().tobytes()
    with pytest.raises(BadMessage):
        wire.decode_values(data, (1, 256), 32)


@pytest.mark.parametrize(("vocabulary", "bytes_each"), [(257, 2), (65536, 2), (65537, 4), (250_000, 4)])
def test_token_ids_come_through(vocabulary: int, bytes_each: int) -> None:
    tokens = torch.tensor([[0, 1, vocabulary - 1], [5, vocabulary // 2, 2]])
    data = wire.encode_tokens(tokens, vocabulary=vocabulary)
    assert len(data) == 6 * bytes_each == wire.tokens_bytes((2, 3), vocabulary=vocabulary)
    assert torch.equal(wire.decode_tokens(data, (2, 3), vocabulary=vocabulary), tokens)


def test_token_ids_that_the_model_lacks_are_refused() -> None:
    data = wire.encode_tokens(torch.tensor([[3, 300]]), vocabulary=400)
    with pytest.raises(BadMessage, match="vocabulary is 300"):
        wire.decode_tokens(data, (1, 2), vocabulary=300)
    negative = torch.tensor([[-1, 2]], dtype=torch.int32).numpy().tobytes()
    with pytest.raises(BadMessage, match="does not have"):
        wire.decode_tokens(negative, (1, 2), vocabulary=100_000)
    with pytest.raises(BadMessage, match="wrong size"):
        wire.decode_tokens(data, (2, 2), vocabulary=300)


@pytest.mark.parametrize(("mode", "chosen", "found"), [
    ("local", 8, (8, 8)), ("local", 4, (4, 8)), ("local", 32, (32, 32)), ("sync", 8, (32, 32)), ("sync", 32, (32, 32)),
])
def test_the_run_config_says_with_how_many_bits(mode: str, chosen: int, found: tuple[int, int]) -> None:
    run = RunConfig(
        name="test", model=ModelConfig(source="x"), data=DataConfig(stdlib=True),
        averaging=AveragingConfig(mode=mode, bits=32), pipeline=PipelineConfig(activation_bits=chosen),
    )
    assert wire.bits_of(run) == found


@pytest.mark.parametrize(("bits", "error"), [(8, 0.008), (4, 0.14), (32, 0.0)])
def test_how_far_off_an_activation_is(bits: int, error: float) -> None:
    """Of Gaussian values, by their norm: a quantum is the largest of 256 (about 2.8 deviations) over 127 or 7, and the
    error a quantum over the root of 12. A few values a hundred times as large cost only the blocks that they are in."""
    values = torch.randn(16, 64, 256, generator=torch.Generator().manual_seed(1))

    def off(values: torch.Tensor) -> float:
        found = wire.decode_values(wire.encode_values(values, bits), tuple(values.shape), bits)
        return float((found - values).norm() / values.norm())

    assert error * 0.7 <= off(values) <= error
    spiked = values.clone()
    spiked[:, 7, 100] *= 100
    rest = torch.ones(64, dtype=torch.bool)
    rest[7] = False
    found = wire.decode_values(wire.encode_values(spiked, bits), tuple(values.shape), bits)
    assert float((found - values)[:, rest].norm() / values[:, rest].norm()) <= error


def question(**more: object) -> Microbatch:
    values = {"origin": "A" * 20, "number": 0, "start": 1, "sequences": 2, "length": 6, "bits": 32, "back_bits": 8}
    return Microbatch(**{**values, **more})  # type: ignore[arg-type]


def test_a_request_is_read_as_it_was_sent() -> None:
    tokens, values = torch.arange(12).view(2, 6), torch.randn(2, 6, 4)
    body = wire.encode_tokens(tokens, vocabulary=50)
    found, nothing = wire.read(question(start=0), body, vocabulary=50, hidden=4)
    assert torch.equal(found.tokens, tokens) and found.segments is None and nothing is None
    found, hidden = wire.read(question(), body + wire.encode_values(values, 32), vocabulary=50, hidden=4)
    assert hidden is not None and torch.equal(found.tokens, tokens) and torch.equal(hidden, values)


SEGMENTS = [
    (((0, 6),), ((6, 6),)), (((1, 2), (0, 4)), ((3, 6),)), (((0, 1),) * 6, ((1, 1),) * 6),
    (((2, 6),), ((0, 5), (1, 1))),
]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("vocabulary", [50, 70_000])
def test_segments_travel_before_the_ids(segments: tuple[tuple[Segment, ...], ...], vocabulary: int) -> None:
    batch, values = Batch(torch.arange(12).view(2, 6), segments), torch.randn(2, 6, 4)
    body = wire.encode_batch(batch, vocabulary=vocabulary)
    assert len(body) == 8 * batch.num_segments + wire.tokens_bytes((2, 6), vocabulary=vocabulary)
    asked = question(segments=batch.num_segments)
    found, hidden = wire.read(asked, body + wire.encode_values(values, 32), vocabulary=vocabulary, hidden=4)
    assert found.segments == segments and torch.equal(found.tokens, batch.tokens)
    assert hidden is not None and torch.equal(hidden, values)
    found, nothing = wire.read(
        question(start=0, segments=batch.num_segments), body, vocabulary=vocabulary, hidden=4
    )
    assert found.segments == segments and nothing is None


@pytest.mark.parametrize("flat", [
    [(0, 6)], [(0, 6), (0, 5)], [(0, 6), (0, 7)], [(0, 5), (0, 7)], [(0, 3), (0, 9)], [(7, 6), (0, 6)],
    [(0, 6), (0, 0), (0, 6)], [(0, 2**32 - 1), (0, 6)], [(0, 12)], [(0, 4), (0, 4), (0, 4)], [(0, 6), (0, 6), (0, 6)],
    [(0, 6), (0, 6), (0, 0)],
])
def test_segments_that_do_not_make_the_rows_are_refused(flat: list[tuple[int, int]]) -> None:
    data = np.array(flat, dtype="<u4").tobytes()
    with pytest.raises(BadMessage, match="segments"):
        wire.decode_segments(data, (2, 6))
    body = data + wire.encode_tokens(torch.arange(12).view(2, 6), vocabulary=50)
    with pytest.raises(BadMessage):
        wire.read(question(start=0, segments=max(2, len(flat))), body, vocabulary=50, hidden=4)


def test_fewer_segments_than_announced_are_refused() -> None:
    body = wire.encode_batch(Batch(torch.arange(12).view(2, 6), SEGMENTS[0]), vocabulary=50)
    for count in (3, 0, 12):
        with pytest.raises(BadMessage):
            wire.read(question(start=0, segments=count), body, vocabulary=50, hidden=4)
    for length in range(len(body)):
        with pytest.raises(BadMessage):
            wire.read(question(start=0, segments=2), body[:length], vocabulary=50, hidden=4)


@pytest.mark.parametrize(("start", "extra"), [(0, b"x"), (1, b""), (1, b"x" * 100), (0, b"x" * 192)])
def test_a_request_with_too_much_or_too_little_in_it_is_refused(start: int, extra: bytes) -> None:
    body = wire.encode_tokens(torch.arange(12).view(2, 6), vocabulary=50) + extra
    with pytest.raises(BadMessage):
        wire.read(question(start=start), body, vocabulary=50, hidden=4)


def test_an_answer_has_the_size_of_what_was_asked_for() -> None:
    def size(**more: object) -> int:
        return wire.answer_bytes(question(**more), vocabulary=50, hidden=4)

    assert size() == wire.values_bytes((2, 6, 4), 8) and size(start=0) == 0
    assert size(train=False) == 0
    asked = question(train=False, logits=3)
    logits = torch.randn(2, 3, 50)
    data = wire.encode_values(logits, 32)
    assert len(data) == size(train=False, logits=3) == wire.logits_bytes(asked, vocabulary=50)
    assert torch.equal(wire.decode_logits(data, asked, vocabulary=50), logits)
    with pytest.raises(BadMessage):
        wire.decode_logits(data[4:], asked, vocabulary=50)
