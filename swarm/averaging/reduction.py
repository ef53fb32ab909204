"""What a part's owner does: check, weigh, add up, quantise once.

The float sums here need not be the same everywhere: only the owner computes them, and everybody applies the bytes that
come out. Values that are not finite never get past the codec; a claimed weight is capped (plan.py) and held against
what the peer has done before (pace.py); how much of what it has learnt is believed is robust.py's to say. Audits come
later.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from swarm.averaging import plan, robust
from swarm.averaging.robust import Verdict
from swarm.network import codec


def combine(
    contributions: Mapping[str, torch.Tensor], tokens: Mapping[str, int], verdict: Verdict | None = None
) -> torch.Tensor:
    """Mean of pseudo-gradients, fp32 [numel] each, by tokens and by how far each is believed: `verdict`,
    `robust.judge` by default. Keys are peer ids, summed in their order. A verdict is used up:
    its centre becomes the mean, since it is as large as the part."""
    verdict = verdict or robust.judge(contributions, tokens, plan.weights(tokens))
    first = next(iter(contributions.values()))
    total = torch.zeros_like(first) if verdict.centre is None else verdict.centre.mul_(verdict.centre_factor)
    heard = [peer_id for peer_id in sorted(contributions) if verdict.factors[peer_id] > 0]
    for span in robust.strides(first.numel(), 1):
        for peer_id in heard:
            total[span].add_(contributions[peer_id][span], alpha=verdict.factors[peer_id])
    return total


def reduce_part(
    contributions: Mapping[str, torch.Tensor], tokens: Mapping[str, int], feedback: torch.Tensor, *,
    num_fine: int, bits: int, verdict: Verdict | None = None,
) -> tuple[bytes, torch.Tensor]:
    """(result bytes, new feedback): the average plus what earlier results of this owner lost, quantised once.

    `feedback` fp32 [numel] is charged only when the result is in a commit; until then the caller keeps the old one.
    `verdict`: see `combine`.
    """
    wanted = combine(contributions, tokens, verdict).add_(feedback)
    data, said = codec.encode_and_read(wanted, num_fine, bits)
    return data, wanted.sub_(said)
