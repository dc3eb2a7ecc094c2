"""COPR: a policy is fitted to the optimum of its own update, prompt by prompt; older optima are constraints.

Sequence-level tensors are [b, j]: j candidates of b prompts, with a bool mask where prompts have fewer than the widest
one. J is the number of candidates that a prompt has. What is masked is never looked at, and gets no gradient. Sums and
softmaxes are computed in the widest type of the arguments, float32 at least.

Departures from the paper, or from its official code:
- Ties: candidates of one rank share the mean of their positions; the formula has no place for them.
- J may differ by prompt; answers of equal tokens count once (`train/sets.py`), as in PBL.
- ln λ is clamped: λ grows as fast as its own square, and would otherwise be infinite after finitely many steps.
- P_θ and P* are normalised over the candidates of their own prompt, and P* stays as it was stored, as in the paper; the
  code normalises over the micro-batch and lets the target move.
- The fit by KL is an ablation, not the paper's.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

CLAMP = 5.0  # |ln λ| at most: λ from 1/148 to 148


def draw_scale(uid: str, candidates: int, seed: int) -> float:
    """r_x ~ Beta(J − 1, 2), for one prompt: COPR's scale of advantages.   -> in (0, 1).

    It depends on the three arguments alone: not on order, batch, process, machine or version. Beta(J − 1, 2) is the law
    of the second largest of J uniform numbers, and those are 52 bits each of a BLAKE2b hash: no library's generator is
    in it. Its mean is (J − 1)/(J + 1); one candidate more leaves a prompt's r_x or raises it.

    Args:
        uid: of the prompt.
        candidates: J.
        seed: any whole number.

    >>> draw_scale("a", 4, seed=0) == draw_scale("a", 4, seed=0) != draw_scale("b", 4, seed=0)
    True

    Raises:
        ValueError: fewer than two candidates: Beta(0, 2) is no distribution, and nothing is preferred.
    """
    if candidates < 2:
        raise ValueError(f"prompt {uid} has {candidates} candidates: a preference needs two")
    hashes = (
        blake2b(f"{seed}/{number}/{uid}".encode(), digest_size=8, person=b"copr r_x") for number in range(candidates)
    )
    uniform = [((int.from_bytes(each.digest(), "big") >> 12) + 0.5) * 2.0**-52 for each in hashes]  # never 0, never 1
    return sorted(uniform)[-2]


def advantages(ranks: Tensor, r: Tensor, mask: Tensor | None = None) -> Tensor:
    """Adv(x, y_j) = r_x (2j − J − 1)/(J − 1), j = 1 the worst … J the best.   [b, j] -> [b, j], of sum 0, in [−r, r].

    COPR's linear advantage. 2j − J − 1 is the number of candidates that are worse, less the number that are better; so
    counted, ties share the mean of their positions, and only the order of the ranks matters. 0 where masked.

    Args:
        ranks: [b, j], whole numbers from 1 = best; 1, 1, 3 and 1, 1, 2 mean the same.
        r: [b], of `draw_scale`.
        mask: [b, j] bool, True where there is a candidate. Default: everywhere. A row without any is padding.

    >>> advantages(torch.tensor([[1, 2, 3]]), torch.tensor([0.5])).tolist()
    [[0.5, 0.0, -0.5]]

    Raises:
        ValueError: shapes that do not fit; a candidate without a rank (below 1); a prompt of one candidate.
    """
    mask = candidate_mask(mask, ranks=ranks)
    if r.shape != ranks.shape[:1]:
        raise ValueError(f"r must be one number a prompt, ({ranks.shape[0]},), not {tuple(r.shape)}")
    size = mask.sum(dim=1)
    if bool((size == 1).any()):
        raise ValueError(f"row {int((size == 1).nonzero()[0])} has one candidate: a preference needs two")
    better = beats(ranks, mask)  # [b, i, k]: i beats k
    net = better.sum(dim=2) - better.sum(dim=1)
    kind = torch.promote_types(r.dtype, torch.float32)
    return r.to(kind)[:, None] * net.to(kind) / (size - 1).clamp(min=1)[:, None]


def optimal_logps(ref_logps: Tensor, adv: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """P*: log P*(y|Y_x) = log softmax_y(log π_{t−1}(y|x) + Adv(x, y)/β) over Y_x.   [b, j] -> [b, j], nats.

    COPR's optimal policy, what maximises E[Adv] − β KL(π‖π_{t−1}), seen on a prompt's candidates Y_x. −∞ where masked.
    Equal advantages, or β = ∞, give π_{t−1} normalised over Y_x.

    Args:
        ref_logps: log π_{t−1}(y|x) [b, j], nats, summed or averaged over tokens as those that are fitted later.
        adv: [b, j], of `advantages`.
        beta: β > 0, in advantage a nat; may be infinite.
        mask: [b, j] bool, True where there is a candidate. Default: everywhere.

    >>> logps = optimal_logps(torch.tensor([[-9.0, -9.0]]), torch.tensor([[0.5, -0.5]]), beta=0.5)
    >>> round((logps[0, 0] - logps[0, 1]).item(), 6)  # 2 · 0.5/0.5
    2.0

    Raises:
        ValueError: shapes that do not fit; β that is not positive; a candidate whose log-probability or advantage is
            missing (NaN) or infinite: no softmax can use it.
    """
    mask = candidate_mask(mask, ref_logps=ref_logps, adv=adv)
    check_beta(beta)
    kind = torch.promote_types(torch.promote_types(ref_logps.dtype, adv.dtype), torch.float32)
    values = ref_logps.to(kind) + adv.to(kind) / beta
    broken = (mask & ~values.isfinite()).nonzero()
    if len(broken):
        row, column = broken[0].tolist()
        raise ValueError(
            f"candidate {column} of row {row} has log-probability {ref_logps[row, column].item()} and advantage "
            f"{adv[row, column].item()}: both must be finite"
        )
    return _over_candidates(values, mask).masked_fill(~mask, -math.inf)


def fit_loss(
    logps: Tensor, target: Tensor, mask: Tensor | None = None, distance: Literal["mse", "kl"] = "mse"
) -> Tensor:
    """(1/J) Σ_y [log P_θ(y|Y_x) − log P*(y|Y_x)]², P_θ = π_θ normalised over the prompt's candidates.   [b, j] -> [b].

    COPR's fit, in nats²; `kl` is KL(P*‖P_θ) = Σ_y P* (log P* − log P_θ) instead, in nats. Both are 0 only where
    P_θ = P*: there the margins of π_θ are those of π_{t−1} plus (Adv_i − Adv_k)/β, which is 2 r_x/β at J = 2. At
    θ = π_{t−1}, with a = Adv/β, the first is (1/J) Σ_y (a_y − ln E_P[e^a])², P = π_{t−1} normalised over Y_x.

    Args:
        logps: log π_θ(y|x) [b, j], nats, as they are: they are normalised here.
        target: log P* [b, j], of `optimal_logps`, already normalised over the same candidates; gets no gradient.
        mask: [b, j] bool, True where there is a candidate. Default: everywhere. A row without any costs 0.
        distance: mse or kl.

    >>> fit_loss(torch.tensor([[-3.0, -3.0]]), torch.tensor([[0.5, 0.5]]).log()).item()
    0.0

    Raises:
        ValueError: shapes that do not fit; an unknown distance.
    """
    mask = candidate_mask(mask, logps=logps, target=target)
    fixed = target.detach().masked_fill(~mask, 0)
    gap = _over_candidates(logps, mask).masked_fill(~mask, 0) - fixed
    if distance == "mse":
        return gap.square().sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    if distance == "kl":
        return -(fixed.exp() * gap).sum(dim=1)
    raise ValueError(f"distance must be mse or kl, not {distance!r}")


def lagrangian(loss: Tensor, constraints: Tensor, log_lambda: Tensor) -> Tensor:
    """L = Λ⁻¹ [J_t + Σ_i λ_i J_i^C], Λ = 1 + Σ_i λ_i: a mean, so the step does not grow with λ.   -> scalar.

    COPR's normalised Lagrangian, for the policy's parameters; λ = exp(log_lambda) gets no gradient (`dual_ascent` moves
    it).

    Args:
        loss: J_t, the new task's, a scalar.
        constraints: J_i^C [n], one an older task; none for the first task.
        log_lambda: ln λ_i [n].

    >>> lagrangian(torch.tensor(1.0), torch.tensor([4.0]), torch.tensor([2.0]).log()).item()  # (1 + 2 · 4)/(1 + 2)
    3.0

    Raises:
        ValueError: shapes that do not fit.
    """
    if loss.dim() or constraints.dim() != 1 or constraints.shape != log_lambda.shape:
        raise ValueError(
            f"need a scalar, [n] and [n], not {[tuple(each.shape) for each in (loss, constraints, log_lambda)]}"
        )
    weights = torch.softmax(torch.cat([log_lambda.new_zeros(1), log_lambda.detach()]), dim=0)  # 1/Λ, λ_1/Λ, …
    return (weights * torch.cat([loss[None], constraints])).sum()


def dual_ascent(log_lambda: Tensor, constraint: Tensor, lr: float, low: float = -CLAMP, high: float = CLAMP) -> Tensor:
    """One step: ln λ_i ← ln λ_i + lr·λ_i·J_i^C, clamped.   [n] -> [n].

    COPR's dual ascent, plain and without Λ: λ_i J_i^C is its own derivative by ln λ_i. A constraint that is violated
    (J_i^C > 0) makes its λ grow, one that holds lets it shrink. No gradient; the arguments stay as they are.

    Args:
        log_lambda: ln λ_i [n].
        constraint: J_i^C = the mean fit of task i's buffer, less d_i [n].
        lr: ≥ 0.
        low: least ln λ. Steps are in proportion to λ: from far below, one whose constraint is violated again would
            hardly come back.
        high: most ln λ.

    >>> dual_ascent(torch.tensor([0.0, 0.0, 4.9]), torch.tensor([1.0, -1.0, 1.0]), lr=0.5).tolist()
    [0.5, -0.5, 5.0]

    Raises:
        ValueError: shapes that do not fit; limits that are no interval; a negative rate; a constraint that is not a
            finite number, as that would spoil λ for good.
    """
    if log_lambda.dim() != 1 or log_lambda.shape != constraint.shape:
        raise ValueError(f"need [n] and [n], not {tuple(log_lambda.shape)} and {tuple(constraint.shape)}")
    if not low <= high or not lr >= 0:
        raise ValueError(f"need low <= high and lr >= 0, not low {low}, high {high}, lr {lr}")
    sigma, value = log_lambda.detach(), constraint.detach()
    if not bool(value.isfinite().all()):
        raise ValueError(f"constraints must be finite, not {value.tolist()}")
    return (sigma + lr * sigma.exp() * value.to(sigma.dtype)).clamp(low, high)


def candidate_mask(mask: Tensor | None, **tensors: Tensor) -> Tensor:
    """The mask of candidates, everything where none is given, once all shapes fit.   -> [b, j] bool.

    >>> candidate_mask(None, logps=torch.zeros(1, 2)).tolist()
    [[True, True]]

    Raises:
        ValueError: tensors that are not [b, j] of one shape; a mask that is not that, of bool.
    """
    shapes = {name: tuple(each.shape) for name, each in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"need [b, j] of one shape, not {', '.join(f'{name} {s}' for name, s in shapes.items())}")
    first = next(iter(tensors.values()))
    if mask is None:
        return torch.ones_like(first, dtype=torch.bool)
    if mask.shape != first.shape or mask.dtype != torch.bool:
        raise ValueError(f"need a bool mask of shape {tuple(first.shape)}, not {mask.dtype} {tuple(mask.shape)}")
    return mask


def beats(ranks: Tensor, mask: Tensor) -> Tensor:
    """Which candidate is better than which: [b, i, k] is True where both are there and i has the smaller rank.

    >>> beats(torch.tensor([[2, 1]]), torch.tensor([[True, True]])).tolist()
    [[[False, False], [True, False]]]

    Raises:
        ValueError: a candidate without a rank, that is, below 1 or NaN.
    """
    unranked = (mask & ~(ranks >= 1)).nonzero()
    if len(unranked):
        row, column = unranked[0].tolist()
        raise ValueError(f"candidate {column} of row {row} has no rank: {ranks[row, column].item()}; 1 is the best")
    return (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def check_beta(beta: float) -> None:
    """Raises ValueError unless β > 0 (infinity is allowed: no preference moves the policy then)."""
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")


def _over_candidates(logps: Tensor, mask: Tensor) -> Tensor:
    """Log softmax over the candidates that are there.   [b, j] -> [b, j]; finite or −∞, but never NaN, elsewhere."""
    wide = logps.to(torch.promote_types(logps.dtype, torch.float32))
    # the least finite number, not −∞: a row without candidates then has a gradient of 0, not NaN
    return torch.log_softmax(wide.masked_fill(~mask, torch.finfo(wide.dtype).min), dim=1)
