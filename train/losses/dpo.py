"""DPO and IPO over ranked candidates: the peers of COPR, on the same tensors.

Departures from the papers:
- Both know pairs. Here a prompt has J ≥ 2 candidates, and its loss is the mean over its pairs of unlike rank, so every
  prompt counts once. J = 2 is the papers'. (Mask all but two candidates for the paper's pair of a larger set.)
- Ties make no pair. A prompt whose candidates all tie costs 0.
- IPO takes the log-probabilities that it is given. The paper's h is a log-ratio of whole answers, so: sums over tokens.
  TRL 1.16 divides the log-ratio of each answer by its number of tokens (and says that the paper's results are of that):
  give averages over tokens for it. A β for one is not a β for the other. DPO is of sums here, there and in the paper.
- Label smoothing is no part of DPO's paper: it is the conservative DPO of Mitchell's note (2023), (1 − ε) of the loss
  plus ε of that of the flipped pair. TRL's `robust` subtracts the second and divides by 1 − 2ε: another loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from train.losses.copr import beats, candidate_mask, check_beta


def dpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    ranks: Tensor,
    beta: float,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """−log σ(β(Δ_w − Δ_l)), Δ = log π_θ(y|x) − log π_ref(y|x), w better than l, the mean over pairs.   -> [b], nats.

    DPO (Rafailov et al., NeurIPS 2023); ln 2 at π_θ = π_ref. With label smoothing ε:
    −(1 − ε) log σ(β(Δ_w − Δ_l)) − ε log σ(−β(Δ_w − Δ_l)), least at a margin of ln((1 − ε)/ε)/β.

    Args:
        logps: log π_θ(y|x) [b, j], nats, summed over tokens.
        ref_logps: the same of the reference [b, j]; gets no gradient.
        ranks: [b, j], from 1 = best; ties make no pair.
        beta: β > 0, in 1/nat.
        mask: [b, j] bool, True where there is a candidate; others are never looked at. Default: everywhere.
        label_smoothing: ε in [0, ½): the share of pairs taken to be the wrong way round.

    A prompt without a pair costs 0, with a graph.

    >>> logps, ref = torch.tensor([[-2.0, -5.0]]), torch.tensor([[-3.0, -3.0]])
    >>> round(dpo_loss(logps, ref, torch.tensor([[1, 2]]), beta=1.0).item(), 4)  # −ln σ(1 + 2)
    0.0486

    Raises:
        ValueError: shapes that do not fit; a candidate without a rank; β or ε out of range.
    """
    margins, pairs = _margins(logps, ref_logps, ranks, beta, mask)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), not {label_smoothing}")
    loss = -(1 - label_smoothing) * F.logsigmoid(beta * margins)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-beta * margins)
    return _mean_over_pairs(loss, pairs)


def ipo_loss(logps: Tensor, ref_logps: Tensor, ranks: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """(Δ_w − Δ_l − 1/(2β))², Δ = log π_θ(y|x) − log π_ref(y|x), w better than l, the mean over pairs.   -> [b], nats².

    IPO (Azar et al., AISTATS 2024; its τ is β here). At J = 2 the least is at a margin of 1/(2β): COPR's 2 r_x/β_COPR
    where β = β_COPR/(4 r_x). Over all pairs of J strict ranks the Δ that fit best are (2j − J − 1)/(2βJ), j = J the
    best, plus a constant: COPR's whole optimum where β = β_COPR (J − 1)/(2 J r_x).

    Args and errors: as `dpo_loss`, without smoothing; averages over tokens in place of sums give TRL's variant.

    >>> ipo_loss(torch.tensor([[-2.0, -5.0]]), torch.tensor([[-3.0, -3.0]]), torch.tensor([[1, 2]]), beta=0.25).item()
    1.0
    """
    margins, pairs = _margins(logps, ref_logps, ranks, beta, mask)
    return _mean_over_pairs((margins - 1 / (2 * beta)).square(), pairs)


def _margins(
    logps: Tensor, ref_logps: Tensor, ranks: Tensor, beta: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Δ_i − Δ_k [b, i, k], and where i beats k; 0 where it does not."""
    mask = candidate_mask(mask, logps=logps, ref_logps=ref_logps, ranks=ranks)
    check_beta(beta)
    pairs = beats(ranks, mask)
    delta = (logps - ref_logps.detach()).masked_fill(~mask, 0)
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    return (delta[:, :, None] - delta[:, None, :]).masked_fill(~pairs, 0), pairs


def _mean_over_pairs(values: Tensor, pairs: Tensor) -> Tensor:
    """[b, j, j] -> [b]."""
    return values.masked_fill(~pairs, 0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
