"""A microbatch on the wire: segments and token ids, then hidden states (or their gradient) in blocks of 8 or 4 bits, or
as fp32.

    body = segments (prefix and length, 4 bytes each; row after row, whose ends follow from the lengths)
         | token ids (2 bytes each, 4 where the vocabulary is larger) | encoded values (none at fragment 0)
    answer = encoded gradient, or logits as fp32

Segments travel because each stage makes its own mask, token ids so that whoever holds the last fragment knows the
targets; they cost a thousandth of the values. int8 in blocks both ways costs nothing that could be measured (DESIGN 7);
a gradient is quantised like an activation, each block by its own maximum, so its size does not matter.
"""

from __future__ import annotations

import numpy as np
import torch

from swarm.config import RunConfig
from swarm.data.batch import Batch, Segment
from swarm.errors import BadMessage
from swarm.network import codec
from swarm.network.codec import BLOCK, CPU
from swarm.pipeline.messages import Bits, Microbatch

WIDE_VOCABULARY = 2**16
SEGMENT_BYTES = 8
MAX_LOGITS_BYTES = 2**22
"""of one answer: four positions of the largest vocabularies (256,000 tokens)"""


def bits_of(run: RunConfig) -> tuple[Bits, Bits]:
    """(of activations, of the gradients that come back): as the run config says. 4 bits are for activations only, whose
    errors the next layers' norms and residuals even out; a gradient's go into the weights."""
    chosen = run.pipeline.activation_bits
    if run.averaging.mode == "sync" or chosen == 32:
        return 32, 32
    return (4 if chosen == 4 else 8), 8


def encode_batch(batch: Batch, *, vocabulary: int) -> bytes:
    """Segments and token ids."""
    flat = [segment for row in batch.segments or () for segment in row]
    return np.array(flat, dtype="<u4").tobytes() + encode_tokens(batch.tokens, vocabulary=vocabulary)


def decode_segments(data: bytes, shape: tuple[int, int]) -> tuple[tuple[Segment, ...], ...]:
    """Of each row of [sequences, length]. Raises BadMessage unless they make such rows."""
    flat = np.frombuffer(data, dtype="<u4").astype(np.int64).reshape(-1, 2)
    prefixes, lengths = flat[:, 0], flat[:, 1]
    ends = np.cumsum(lengths)
    last = np.searchsorted(ends, shape[1] * np.arange(1, shape[0] + 1))  # of each row: its last segment
    if (
        (prefixes > lengths).any() or (lengths == 0).any() or ends[-1] != shape[0] * shape[1]
        or (ends[last] != shape[1] * np.arange(1, shape[0] + 1)).any()
    ):
        raise BadMessage("segments that do not make its rows", why=f"{len(flat)} in {shape[0]} rows of {shape[1]}")
    pairs: list[Segment] = [(prefix, length) for prefix, length in flat.tolist()]
    starts = [0, *(int(index) + 1 for index in last)]
    return tuple(tuple(pairs[start:end]) for start, end in zip(starts[:-1], starts[1:], strict=True))


def encode_tokens(tokens: torch.Tensor, *, vocabulary: int) -> bytes:
    """`tokens`: int64 [sequences, length]."""
    if vocabulary <= WIDE_VOCABULARY:
        return tokens.to(torch.int32).to(torch.uint16).numpy().tobytes()
    return tokens.to(torch.int32).numpy().tobytes()


def decode_tokens(data: bytes, shape: tuple[int, int], *, vocabulary: int) -> torch.Tensor:
    """int64 [sequences, length]; raises BadMessage on a wrong size, or on an id that the model does not have."""
    if len(data) != tokens_bytes(shape, vocabulary=vocabulary):
        raise BadMessage("token ids of a wrong size", why=f"{len(data)} bytes for {shape[0]} x {shape[1]} ids")
    dtype = torch.uint16 if vocabulary <= WIDE_VOCABULARY else torch.int32
    tokens = torch.frombuffer(bytearray(data), dtype=dtype).to(torch.int64).view(shape)
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise BadMessage("a token id that the model does not have", why=f"its vocabulary is {vocabulary}")
    return tokens


def tokens_bytes(shape: tuple[int, int], *, vocabulary: int) -> int:
    return shape[0] * shape[1] * (2 if vocabulary <= WIDE_VOCABULARY else 4)


def encode_values(values: torch.Tensor, bits: int) -> bytes:
    """`values`: fp32 of any shape, on any device. Raises PeerRefused where one is not finite."""
    flat = values.detach().reshape(-1)
    rest = -len(flat) % BLOCK
    return codec.encode(torch.cat([flat, flat.new_zeros(rest)]) if rest else flat, 0, bits)


def decode_values(data: bytes, shape: tuple[int, ...], bits: int, *, device: torch.device = CPU) -> torch.Tensor:
    """fp32 of this shape, on `device`. Raises BadMessage on a wrong size, or on what is no number."""
    numel = torch.Size(shape).numel()
    return codec.decode(data, -(-numel // BLOCK), 0, bits, device=device)[:numel].view(shape)


def values_bytes(shape: tuple[int, ...], bits: int) -> int:
    return codec.encoded_bytes(0, -(-torch.Size(shape).numel() // BLOCK), bits)


def read(
    microbatch: Microbatch, body: bytes, *, vocabulary: int, hidden: int, device: torch.device = CPU
) -> tuple[Batch, torch.Tensor | None]:
    """(what it is, hidden states on `device`; None at fragment 0) of a request. Raises BadMessage."""
    size = (microbatch.sequences, microbatch.length)
    ids = microbatch.segments * SEGMENT_BYTES
    values = ids + tokens_bytes(size, vocabulary=vocabulary)
    tokens = decode_tokens(body[ids:values], size, vocabulary=vocabulary)
    batch = Batch(tokens, decode_segments(body[:ids], size) if ids else None)
    if microbatch.start:
        return batch, decode_values(body[values:], (*size, hidden), microbatch.bits, device=device)
    if len(body) > values:
        raise BadMessage("hidden states before the first fragment")
    return batch, None


def answer_bytes(microbatch: Microbatch, *, vocabulary: int, hidden: int) -> int:
    """Of the answer to this request."""
    if microbatch.train:
        shape = (microbatch.sequences, microbatch.length, hidden)
        return values_bytes(shape, microbatch.back_bits) if microbatch.start else 0
    return logits_bytes(microbatch, vocabulary=vocabulary)


def logits_bytes(microbatch: Microbatch, *, vocabulary: int) -> int:
    return values_bytes((microbatch.sequences, microbatch.logits, vocabulary), 32)


def decode_logits(data: bytes, microbatch: Microbatch, *, vocabulary: int) -> torch.Tensor:
    """fp32 [sequences, positions, vocabulary]. Raises BadMessage."""
    return decode_values(data, (microbatch.sequences, microbatch.logits, vocabulary), 32)
