"""What a part's owner does: check, clip, weigh, add up, quantise once.

The float sums here need not be the same everywhere: only the owner computes them, and everybody applies the bytes that
come out. Robustness so far is against accidents and crude attacks: values that are not finite never get past the
codec, a claimed weight is capped, and a contribution whose norm is out of line is scaled down. Audits come later.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch

from swarm.averaging import plan
from swarm.network import codec

NORM_LIMIT = 4.0
"""times the median norm per square root of tokens; honest peers differ by less, a sign flip times 1000 does not"""


def combine(
    contributions: Mapping[str, torch.Tensor], tokens: Mapping[str, int], warmth: Mapping[str, float] | None = None
) -> torch.Tensor:
    """Tokens-weighted mean of pseudo-gradients, fp32 [numel] each; keys are peer ids, summed in their order. `warmth`:
    see `plan.weights`."""
    shares = plan.weights(tokens, warmth)
    scales = _clip_scales(contributions, tokens)
    total = torch.zeros_like(next(iter(contributions.values())))
    for peer_id in sorted(contributions):
        total += contributions[peer_id] * (shares[peer_id] * scales[peer_id])
    return total


def _clip_scales(contributions: Mapping[str, torch.Tensor], tokens: Mapping[str, int]) -> dict[str, float]:
    if len(contributions) < 3:
        return dict.fromkeys(contributions, 1.0)  # with two there is no majority to be out of line with
    # drift grows between the square root of the steps (noise) and the steps (signal): compare per root
    norms = {peer_id: float(values.norm()) / tokens[peer_id] ** 0.5 for peer_id, values in contributions.items()}
    limit = NORM_LIMIT * statistics.median(norms.values())
    return {peer_id: min(1.0, limit / norm) if norm > 0 and limit > 0 else 1.0 for peer_id, norm in norms.items()}


def reduce_part(
    contributions: Mapping[str, torch.Tensor], tokens: Mapping[str, int], feedback: torch.Tensor, *,
    num_fine: int, bits: int, warmth: Mapping[str, float] | None = None,
) -> tuple[bytes, torch.Tensor]:
    """(result bytes, new feedback): the average plus what earlier results of this owner lost, quantised once.

    `feedback` fp32 [numel] is charged only when the result is in a commit; until then the caller keeps the old one.
    """
    wanted = combine(contributions, tokens, warmth) + feedback
    data, said = codec.encode_and_read(wanted, num_fine, bits)
    return data, wanted - said
