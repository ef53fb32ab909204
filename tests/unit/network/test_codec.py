"""2, 4 and 8 bits and fp32 on the wire: sizes, bounds of errors, what is refused, the same bits for all (I1, I4)."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import BadMessage, PeerRefused
from swarm.network import codec
from swarm.network.codec import BLOCK

fixed = settings(max_examples=80, derandomize=True, deadline=None)
bits_of_runs = pytest.mark.parametrize("bits", [2, 4, 8, 32])
rounded_bits = pytest.mark.parametrize("bits", [2, 4, 8])
ERROR = {2: 0.42, 4: 0.12, 8: 0.01}
"""of Gaussian values, over their norm: the most that one encoding may lose"""


def gaussian(num_blocks: int, *, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(num_blocks * BLOCK, generator=torch.Generator().manual_seed(seed)) * scale


def round_trip(values: torch.Tensor, num_fine: int, bits: int) -> torch.Tensor:
    return codec.decode(codec.encode(values, num_fine, bits), values.numel() // BLOCK, num_fine, bits)


def quanta(values: torch.Tensor, num_fine: int, bits: int) -> torch.Tensor:
    """The ideal scale of each block [num_blocks], float64, signed: its largest value over 2.5, 8 or 127."""
    blocks = values.double().view(-1, BLOCK)
    reach = torch.full((len(blocks),), {2: 2.5, 4: 8.0, 8: 127.0}[bits], dtype=torch.float64)
    reach[:num_fine] = 127.0
    most, least = blocks.amax(dim=1), blocks.amin(dim=1)
    return torch.where(most >= -least, most, least) / reach


def assert_within_bounds(values: torch.Tensor, num_fine: int, bits: int) -> None:
    """Half a quantum (of a scale that fp16 has rounded), or the way to the end of the range for values beyond it.
    Blocks under 2^-14 of the largest lose more for their size, never more than fp16's smallest step of the largest. A
    block whose quantum is under fp32's smallest step is lost."""
    said = round_trip(values, num_fine, bits).double().view(-1, BLOCK)
    blocks = values.double().view(-1, BLOCK)
    signed = quanta(values, num_fine, bits).unsqueeze(1)
    ends = torch.tensor([{2: (-1.0, 2.0), 4: (-7.0, 8.0), 8: (-127.0, 127.0)}[bits]]).repeat(len(blocks), 1)
    ends[:num_fine] = torch.tensor([-127.0, 127.0])
    whole = blocks / torch.where(signed != 0, signed, torch.inf)
    beyond = torch.maximum(whole - ends[:, 1:], ends[:, :1] - whole).clamp(min=0.5).amax(dim=1)
    error, quantum = (said - blocks).abs().amax(dim=1), signed.abs().squeeze(1)
    unit = quantum.max()
    least = 127.0 * 2**-149
    normal = quantum >= unit * 2**-14
    assert bool((error[normal] <= quantum[normal] * (beyond[normal] + 127.0 * 2**-11 + 1e-5) + least).all())
    rest = ~normal
    assert bool((error[rest] <= 127.0 * unit * 2**-25 * 1.01 + quantum[rest] * (beyond[rest] + 0.1) + least).all())


@fixed
@given(st.integers(0, 5), st.integers(0, 5), st.sampled_from([2, 4, 8, 32]))
def test_the_size_is_exact_arithmetic(num_fine: int, num_coarse: int, bits: int) -> None:
    num_blocks = num_fine + num_coarse
    data = codec.encode(gaussian(num_blocks), num_fine, bits)
    assert len(data) == codec.encoded_bytes(num_fine, num_coarse, bits)
    assert codec.decode(data, num_blocks, num_fine, bits).shape == (num_blocks * BLOCK,)
    by_hand = {
        2: 4 + num_fine * (2 + 256) + num_coarse * (2 + 64),
        4: 4 + num_fine * (2 + 256) + num_coarse * (2 + 128), 8: 4 + num_blocks * (2 + 256), 32: num_blocks * 1024,
    }
    assert len(data) == by_hand[bits]


@rounded_bits
def test_the_bytes_are_those_of_the_bits_but_for_the_scales(bits: int) -> None:
    assert codec.encoded_bytes(0, 1000, bits) / codec.encoded_bytes(0, 1000, 32) == pytest.approx(bits / 32, rel=0.032)


@bits_of_runs
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-5, 1e-3, 1.0, 1e4, 1e20])
def test_error_is_half_a_quantum_at_any_magnitude(bits: int, scale: float) -> None:
    values = gaussian(6, scale=scale)
    if bits == 32:
        assert torch.equal(round_trip(values, 2, bits), values)
        return
    assert_within_bounds(values, 2, bits)
    error = (round_trip(values, 2, bits) - values).double()
    assert float(error.norm() / values.double().norm()) < ERROR[bits]


@fixed
@given(
    st.lists(st.tuples(st.floats(-30, 12), st.integers(0, 99)), min_size=1, max_size=4), st.integers(0, 4),
    st.sampled_from([2, 4, 8]),
)
def test_blocks_of_very_different_size_in_one_part(
    blocks: list[tuple[float, int]], num_fine: int, bits: int
) -> None:
    values = torch.cat([gaussian(1, seed=seed) * 10.0**exponent for exponent, seed in blocks])
    assert_within_bounds(values, min(num_fine, len(blocks)), bits)


@fixed
@given(st.lists(st.floats(-(2.0**83), 2.0**83, width=32), min_size=1, max_size=40), st.sampled_from([2, 4, 8]))
def test_any_values(some: list[float], bits: int) -> None:
    values = torch.zeros(2 * BLOCK)
    values[torch.arange(len(some)) * 7 % (2 * BLOCK)] = torch.tensor(some)
    assert_within_bounds(values, 1, bits)
    said = round_trip(values, 1, bits)
    assert bool((said[values == 0] == 0).all()), "nothing comes from nothing"
    assert bool((said * values >= 0).all()), "signs are kept"


@bits_of_runs
def test_zeros_and_equal_values(bits: int) -> None:
    """Equal values are all at the end of the range, which 2 bits cut short; feedback says the rest."""
    assert torch.count_nonzero(round_trip(torch.zeros(3 * BLOCK), 1, bits)) == 0
    rough = 0.2 + 2**-10 if bits == 2 else 2**-10
    for value in (1.0, -3e-7, 0.1, 65504.0, 1e-38):
        said = round_trip(torch.full((2 * BLOCK,), value), 1, bits)
        assert torch.allclose(said.double(), torch.full_like(said, value).double(), rtol=rough, atol=0)


@bits_of_runs
def test_denormals_neither_crash_nor_grow(bits: int) -> None:
    tiny = torch.tensor([1e-45, -1e-42, 3e-40, 1.1e-38]).repeat(BLOCK // 4)
    said = round_trip(torch.cat([tiny, torch.zeros(BLOCK)]), 0, bits)
    assert bool(torch.isfinite(said).all()) and float(said.abs().max()) <= 1.2e-38
    beside_ones = round_trip(torch.cat([tiny, torch.ones(BLOCK)]), 0, bits)
    assert float(beside_ones[:BLOCK].abs().max()) <= 1.2e-38


def test_a_scale_that_fp16_rounds_down_clips_by_less_than_a_tenth_of_a_quantum() -> None:
    """The largest value of a block then lies beyond what its integers reach. The bias is that of fp16, and feedback
    brings it back: here every block's scale is the worst case, just under the middle of two fp16 numbers."""
    worst = 1 + 2**-11 - 2**-20  # rounds down to 1
    for bits, levels in ((4, 8), (8, 127)):
        values = torch.ones(2 * BLOCK)
        values[BLOCK:] *= 0.25 * worst
        values[:BLOCK] *= 1.0
        said = round_trip(values, 0, bits)
        quantum = 0.25 * worst / levels
        error = (values - said)[BLOCK:].abs().max()
        assert 0 < float(error) <= quantum * levels * 2**-11 * 1.01 < 0.1 * quantum


def test_a_block_in_the_range_where_fp16_is_coarse_is_made_good_by_feedback() -> None:
    """1.4 times fp16's smallest step of the unit: the scale is 40 % off, so much is clipped in one round."""
    values = torch.ones(2 * BLOCK)
    values[BLOCK:] *= 1.4 * 2**-24
    feedback, total = torch.zeros_like(values), torch.zeros_like(values, dtype=torch.float64)
    first = round_trip(values, 0, 4)
    assert float((values - first)[BLOCK:].abs().max()) > 0.2 * 1.4 * 2**-24
    for _ in range(40):
        wanted = values + feedback
        said = round_trip(wanted, 0, 4)
        feedback = wanted - said
        total += said.double()
    assert torch.allclose(total[BLOCK:] / 40, values[BLOCK:].double(), rtol=0.1)


@bits_of_runs
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.3e38])
@pytest.mark.parametrize("at", [0, 300, 767])
def test_what_is_not_finite_is_refused_before_it_is_sent(bits: int, bad: float, at: int) -> None:
    values = gaussian(3)
    values[at] = bad
    with pytest.raises(PeerRefused, match="not finite"):
        codec.encode(values, 1, bits)


@bits_of_runs
@pytest.mark.parametrize("change", [-1, 1, -10**9, 5])
def test_a_wrong_size_is_refused(bits: int, change: int) -> None:
    data = codec.encode(gaussian(3), 1, bits)
    wrong = data[:max(0, len(data) + change)] + bytes(max(0, change))
    with pytest.raises(BadMessage, match="wrong size"):
        codec.decode(wrong, 3, 1, bits)


@rounded_bits
@pytest.mark.parametrize("unit", [math.nan, math.inf, -math.inf, -1.0, -1e-40, 1e30, 3e38])
def test_an_impossible_unit_is_refused(bits: int, unit: float) -> None:
    data = codec.encode(gaussian(3), 1, bits)
    with pytest.raises(BadMessage, match="impossible unit"):
        codec.decode(struct.pack("<f", unit) + data[4:], 3, 1, bits)


@rounded_bits
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.001, 1.001, 60000.0])
@pytest.mark.parametrize("block", [0, 2])
def test_an_impossible_scale_is_refused(bits: int, scale: float, block: int) -> None:
    data = bytearray(codec.encode(gaussian(3), 1, bits))
    data[4 + 2 * block:6 + 2 * block] = struct.pack("<e", scale)
    with pytest.raises(BadMessage, match="impossible scale"):
        codec.decode(bytes(data), 3, 1, bits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e30, -3e38])
def test_fp32_that_is_not_finite_is_refused(value: float) -> None:
    data = bytearray(codec.encode(gaussian(2), 0, 32))
    data[400:404] = struct.pack("<f", value)
    with pytest.raises(BadMessage, match="not finite"):
        codec.decode(bytes(data), 2, 0, 32)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.sampled_from([2, 4, 8, 32]), st.integers(0, 2**32 - 1), st.booleans())
def test_bytes_of_a_stranger_are_refused_or_give_bounded_values(
    num_fine: int, num_coarse: int, bits: int, seed: int, plausible: bool
) -> None:
    """Half of them with a sound unit and sound scales, or nearly all would be refused for those."""
    num_blocks = num_fine + num_coarse
    random = np.random.default_rng(seed)
    data = bytearray(random.bytes(codec.encoded_bytes(num_fine, num_coarse, bits)))
    if plausible and bits != 32:
        data[:4] = struct.pack("<f", 10.0 ** random.uniform(-40, 29.9))
        data[4:4 + 2 * num_blocks] = random.uniform(-1, 1, num_blocks).astype("<f2").tobytes()
    try:
        values = codec.decode(bytes(data), num_blocks, num_fine, bits)
    except BadMessage:
        assert not plausible or bits == 32
        return
    assert values.shape == (num_blocks * BLOCK,) and bool((values.abs() <= 128 * 1e30).all())
    total = sum(float(values.abs().max()) for _ in range(64)) if num_blocks else 0.0
    assert total < torch.finfo(torch.float32).max, "64 of them can be added up"


@bits_of_runs
def test_decoding_is_the_same_bits_with_any_number_of_threads(bits: int) -> None:
    values = gaussian(400, scale=1e-4)
    data = codec.encode(values, 30, bits)
    digests = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            digests.add(hashlib.sha256(codec.decode(data, 400, 30, bits).numpy().tobytes()).hexdigest())
    finally:
        torch.set_num_threads(1)
    assert len(digests) == 1


@rounded_bits
def test_decoding_is_one_rounded_multiplication(bits: int) -> None:
    """Against numpy, operation by operation: the bytes say everything, the library nothing."""
    num_blocks, num_fine = 5, 2
    data = codec.encode(gaussian(num_blocks, scale=3e-6), num_fine, bits)
    unit = np.frombuffer(data[:4], "<f4")[0]
    relative = np.frombuffer(data[4:4 + 2 * num_blocks], "<f2").astype("<f4")
    rest = data[4 + 2 * num_blocks:]
    fine = (num_blocks if bits == 8 else num_fine) * BLOCK
    integers = np.frombuffer(rest[:fine], "i1").astype("<f4")
    packed = np.frombuffer(rest[fine:], "u1")
    shifts = range(0, 8, bits) if bits < 8 else ()
    codes = [(packed >> shift & 2**bits - 1).astype("<f4") - (2 ** (bits - 1) - 1) for shift in shifts]
    coarse = np.stack(codes, axis=1).reshape(-1) if codes else np.empty(0, "<f4")
    expected = np.concatenate([integers, coarse]).reshape(-1, BLOCK) * (relative * unit)[:, None]
    assert np.array_equal(codec.decode(data, num_blocks, num_fine, bits).numpy(), expected.reshape(-1))


@bits_of_runs
def test_encoding_what_was_decoded_loses_nothing_more(bits: int) -> None:
    """A relay, or an owner of one contribution, adds no second error; with 2 bits it does, and has a feedback."""
    values = gaussian(8, seed=5, scale=1e-3)
    once = round_trip(values, 3, bits)
    twice = round_trip(once, 3, bits)
    assert codec.encode(values, 3, bits) == codec.encode(values.clone(), 3, bits)
    if bits == 32:
        assert torch.equal(once, twice)
        return
    step = quanta(once, 3, bits).abs().repeat_interleave(BLOCK)
    assert bits == 2 or bool(((twice - once).abs().double() <= step * 0.07 + 1e-12).all())
    assert bool(((twice - once)[:3 * BLOCK].abs().double() <= step[:3 * BLOCK] * 0.07 + 1e-12).all()), "fine ones"


def test_encode_leaves_its_input_alone_and_takes_any_memory_layout() -> None:
    values = gaussian(4)
    strided = torch.stack([values, values], dim=1)[:, 0]
    before = values.clone()
    for bits in (2, 4, 8, 32):
        assert codec.encode(strided, 1, bits) == codec.encode(values, 1, bits)
    assert torch.equal(values, before)


@rounded_bits
def test_what_is_read_while_encoding_is_what_is_decoded(bits: int) -> None:
    """Of whole strides, the end of one, fine and coarse blocks in one: or feedback would be of something else."""
    num_blocks, num_fine = 2 * codec.STRIDE_BLOCKS + 37, codec.STRIDE_BLOCKS + 5
    values = gaussian(num_blocks, seed=3, scale=1e-5)
    data, said = codec.encode_and_read(values, num_fine, bits)
    assert torch.equal(said, codec.decode(data, num_blocks, num_fine, bits))
    assert data == codec.encode(values, num_fine, bits) and type(data) is bytes


@rounded_bits
def test_turning_every_sign_turns_every_sign(bits: int) -> None:
    """The range reaches further on the side of the largest value, so neither sign is treated better over many."""
    values = gaussian(40, seed=11)
    assert torch.equal(round_trip(-values, 7, bits), -round_trip(values, 7, bits))


def test_two_bits_lose_no_block_with_few_values() -> None:
    """Of an embedding's neighbours, or a head's rows: levels without a zero would put noise on all that stood still."""
    values = torch.zeros(4 * BLOCK)
    values[::50] = gaussian(1)[:len(values[::50])]
    said = round_trip(values, 0, 2)
    assert torch.count_nonzero(said[values == 0]) == 0
    assert float((said - values).norm() / values.norm()) < 0.5


@pytest.mark.parametrize("tail", ["gauss", "laplace", "student", "one"])
def test_the_feedback_of_two_bits_stays_within_a_block_s_own_values(tail: str) -> None:
    """Where a scale followed the mean and clipped, what a large value loses would grow for a hundred rounds."""
    generator = torch.Generator().manual_seed(4)
    direction = {
        "gauss": lambda: torch.randn(8 * BLOCK, generator=generator),
        "laplace": lambda: torch.empty(8 * BLOCK).exponential_(generator=generator) * gaussian(8).sign(),
        "student": lambda: gaussian(8, seed=1) / gaussian(8, seed=2).abs().clamp(min=0.05),
        "one": lambda: torch.nn.functional.one_hot(torch.arange(8), BLOCK).float().view(-1) + gaussian(8) * 0.001,
    }[tail]()
    feedback, told = torch.zeros(8 * BLOCK), torch.zeros(8 * BLOCK, dtype=torch.float64)
    largest = direction.view(-1, BLOCK).abs().amax(dim=1)
    for _ in range(40):
        wanted = direction + feedback
        said = round_trip(wanted, 0, 2)
        feedback = wanted - said
        told += said.double()
        assert bool((feedback.view(-1, BLOCK).abs().amax(dim=1) <= 1.5 * largest).all())
    assert float((told / 40 - direction.double()).norm() / direction.double().norm()) < 0.04
