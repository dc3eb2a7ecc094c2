"""PBL, the preference-based loss of self-distilled answers: towards those that align with the target, off the others.

Departures from the paper:
- The term of conflicting answers is bounded by default. The paper's falls for ever, as a log-probability has no floor,
  and π_ref has no effect on its gradient: nothing ever stops it. `literal` is the paper's.
- Equal answers to one prompt count once, however often they were drawn (`train/sets.py`).
- The NLL of the gold answer, without which an empty align side teaches nothing, is `train.losses.cft.weighted_nll`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from train.losses.copr import candidate_mask


def preference_bias_loss(
    logps: Tensor,
    ref_logps: Tensor,
    aligned: Tensor,
    mask: Tensor | None,
    alpha: float,
    beta: float,
    negative: Literal["bounded", "literal"] = "bounded",
    b: float = 1.0,
) -> Tensor:
    """L = −α Σ_align ρ + β Σ_conflict n(ρ), ρ = log π_θ(y′|x) − log π_ref(y′|x), over answers y′ to x.   -> [b], nats.

    `literal`: n(ρ) = ρ. `bounded`: n(ρ) = −(2/b) log σ(−bρ) > 0, of slope 2 σ(bρ): that is 1 at π_θ = π_ref, like the
    other's, dies away as the answer gets less likely than it was, and is below 2 where it gets likelier. At ρ = 0 it is
    (2/b) ln 2. As log π ≤ 0, the bounded loss is never below α Σ_align log π_ref.

    Args:
        logps: log π_θ(y′|x) [b, j], nats, summed over tokens.
        ref_logps: the same of the reference [b, j]; gets no gradient.
        aligned: [b, j] bool, True where y′ agrees with the target answer, False where it conflicts.
        mask: [b, j] bool, True where there is an answer; what the others hold is never looked at. None: everywhere.
        alpha: α ≥ 0.
        beta: β ≥ 0.
        negative: the conflict term.
        b: b > 0, in 1/nat: how soon the bounded term lets go; its slope is a tenth at ρ = −2.9/b.

    A prompt without answers costs 0, with a graph.

    >>> logps, aligned = torch.tensor([[-2.0, -5.0]]), torch.tensor([[True, False]])
    >>> preference_bias_loss(logps, torch.tensor([[-3.0, -3.0]]), aligned, None, 1.0, 0.5, "literal").item()
    -2.0

    Raises:
        ValueError: shapes that do not fit; α, β or b out of range; an unknown negative term.
    """
    mask = candidate_mask(mask, logps=logps, ref_logps=ref_logps, aligned=aligned)
    if aligned.dtype != torch.bool:
        raise ValueError(f"aligned must be bool, not {aligned.dtype}")
    if not (alpha >= 0 and beta >= 0 and 0 < b < math.inf):
        raise ValueError(f"need alpha >= 0, beta >= 0 and b > 0, not alpha {alpha}, beta {beta}, b {b}")
    kind = torch.promote_types(torch.promote_types(logps.dtype, ref_logps.dtype), torch.float32)
    rho = (logps.to(kind) - ref_logps.detach().to(kind)).masked_fill(~mask, 0)
    if negative == "literal":
        conflict = rho
    elif negative == "bounded":
        conflict = -(2 / b) * F.logsigmoid(-b * rho)
    else:
        raise ValueError(f"negative must be bounded or literal, not {negative!r}")
    return torch.where(aligned, -alpha * rho, beta * conflict).masked_fill(~mask, 0).sum(dim=1)
