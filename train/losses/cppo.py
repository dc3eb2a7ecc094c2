"""CPPO: PPO whose samples differ in how much is learned from them (α), and how much they hold the last policy (β).

J = E[α(x) L^CLIP − β(x) L^KR − c L^VF] (ICLR 2024); each term is a function here, as a loss, so its sign is turned.
Beside them stands what PPO, GRPO and GSPO need between rollout and loss. Token-level tensors are [b, t]; a mask is True
(or not 0) at the tokens that were generated. What is masked may be NaN or infinite: it is never looked at and gets no
gradient. A row without valid tokens counts nothing; without any, a loss is 0, with a graph. Everything is computed in
float32 at least, and only log π_θ and the values that are trained get gradient: all else is a constant of the batch.

Every function raises ValueError for shapes that do not fit, arguments out of range, and a constant of the batch that is
NaN or infinite at a valid token: measured before the update, that is a mistake, not training gone wrong.

Departures from the papers, or from official code:
- L^KR is masked (the code lets padding add log²π), and no weight is negative (the code's α of high_variance is).
- `lead="reward"` is the default; the paper's theory and the sound rows of the code's linear mode are "probability".
- Heuristic weights are continuous in the score that they follow, but not in the other one: at z_P = k, z_R = 3 the
  reward's lead has α jump from 1 to f(3). Nothing that is 1 in the whole of `normal` could avoid it.
- Learned weights follow φᵀx, by Adam over the whole batch; the code fits free logits. The literal sum of differences
  pays a wrong order of one bucket with the excess of another, so a wrong order costs extra: see `learned_weights`.
- A log-ratio above 40 nats counts as 40, without gradient: e^89 is infinite in float32, and its gradient NaN.
- Deviations are the population's (TRL: n − 1), and nothing is added to them: a deviation of 0 gives 0.
- GSPO is in its token form: the paper's value and gradient where a sample has one advantage, and defined beyond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Lead = Literal["reward", "probability"]
Level = Literal["token", "sequence"]
Scores = Tensor | Sequence[float] | Any  # Any: NumPy's arrays, which this module does not import
MAX_LOG_RATIO = 40.0


def heuristic_weights(
    z_p: Scores, z_r: Scores, *, k: float, lb: float, ub: float, lead: Lead = "reward"
) -> tuple[Tensor, Tensor]:
    """(α, β) of every sample by its bucket and scores: 1 in `normal`, f(z) in the other four.   [n], [n] -> [n], [n].

    f(z) = z + 1 − k where z > k, z + 1 + k where z < −k, clipped into [lb, ub]. lead="reward": α = f(z_R), β = f(z_P),
    so overfitting learns less and holds more, high_variance learns more and holds less. lead="probability":
    α = f(z_P), β = f(z_R), the other way round. Both raise both in high_performance and lower both in noisy.

    Args:
        z_p: standard score of the log-probability.
        z_r: the same of the reward. As in `classify`, NaN is normal, and scores are compared at 9 decimals: give
            float64, as 0.85 is above 0.85 in float32.
        k: the buckets' threshold, ≥ 0.
        lb: least weight.
        ub: largest weight.
        lead: which score α follows.

    >>> alpha, beta = heuristic_weights([1.0, 0.0], [-0.75, 3.0], k=0.5, lb=0.5, ub=2.5)  # overfitting, normal
    >>> alpha.tolist(), beta.tolist()
    ([0.75, 1.0], [1.5, 1.0])

    Raises:
        ValueError: k < 0; not 0 ≤ lb ≤ 1 ≤ ub < ∞; an unknown lead; shapes that do not fit.
    """
    z, side, kind = _leading(z_p, z_r, k, lb, ub, lead)
    alpha, beta = torch.where(side != 0, (z + 1 - side * k).clamp(lb, ub), 1).to(kind).unbind(-1)
    return alpha, beta


def learned_weights(
    z_p: Scores, z_r: Scores, *, k: float, lb: float, ub: float, lead: Lead = "reward", power: int = 2,
    tau: float = 0.1, lr: float = 0.05, steps: int = 100, generator: torch.Generator, penalty: float = 10.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """α = (ub − lb) σ(φ₁ᵀx) + lb, β = (ub − lb) σ(φ₂ᵀx)^p + lb, x = (z_P, z_R, 1), φ fitted to the batch.   [n] -> [n].

    Adam on E[(α−1)² + (β−1)²] + τ Σ_d [d + penalty · max(0, d + (ub − lb)/100)]. The d are eight differences of bucket
    means that should be negative: for α and for β, ⟨w⟩_normal − ⟨w⟩_c where a corner c should lie above normal, and
    ⟨w⟩_c − ⟨w⟩_normal where below. Above are, for α, high_performance and, lead="reward", high_variance; for β
    high_performance and overfitting; the other two below. ("probability": α and β change places.) Differences of
    corners follow from these. An empty corner is skipped; an empty normal bucket stands at 1, what normal means.

    Why the penalty: in Σ d of full buckets normal cancels, and an outlier pays for another's wrong order, so Σ d alone
    (penalty=0) leaves some batches in a wrong order that a φ could right. With it all eight held on each of the 200
    random batches of the tests (12 to 128 samples, all five buckets, lb < 1 < ub). There is no guarantee, as there may
    be no φ: where rewards are 0 or 1 and the only normal sample was rewarded, α would have to dip between high_variance
    and high_performance, along z_P alone. Small batches with a normal bucket of one or two come near that.

    Scores [n], k, bounds and lead as in `heuristic_weights`; a score that is not finite gives 1, 1 and has no part.
    `power` is p: 2, or 1 (official code). lr and steps are Adam's; the code has 0.01 and up to 1,000. `generator` draws
    where φ starts, close to α = β = 1. The order of samples changes nothing.

    >>> draw = torch.Generator().manual_seed(0)
    >>> alpha, beta = learned_weights([1, 1, -1, -1, 0], [1, -1, 1, -1, 0], k=0.5, lb=0.5, ub=2.5, generator=draw)
    >>> bool(alpha[1] < alpha[4] < alpha[2]), bool(beta[1] > beta[4] > beta[2])  # overfitting, normal, high_variance
    (True, True)
    """
    z, side, kind = _leading(z_p, z_r, k, lb, ub, lead)
    if z.dim() != 2:
        raise ValueError(f"scores must be [n], not {tuple(z.shape[:-1])}")
    if power not in (1, 2) or not (tau >= 0 and lr > 0 and steps >= 0 and penalty >= 0):
        raise ValueError(f"need power 1 or 2, lr > 0, no less than 0 of {tau=}, {steps=}, {penalty=}; {power=}, {lr=}")
    weights = torch.ones_like(z)
    rows = z.isfinite().all(dim=1).nonzero()[:, 0]
    for score in z.T:  # in an order of their own, so that the last bit does not depend on that of the batch
        rows = rows[score[rows].argsort(stable=True)]
    if len(rows):
        start = 0.01 * torch.randn(3, 2, generator=generator, dtype=torch.float64, device=generator.device).cpu()
        with torch.inference_mode(False), torch.enable_grad():  # rollouts are weighted where gradients are off
            fitted = _fit(z[rows].cpu(), side[rows].cpu(), start.clone(), (lb, ub), power, (tau, penalty), lr, steps)
        weights[rows] = fitted.to(weights.device)
    alpha, beta = weights.to(kind).unbind(1)
    return alpha, beta


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, alpha: Tensor | float, clip: float,
    *, level: Level = "token", normaliser: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """−L^CLIP: mean over valid tokens of α · max(−A r, −A clip(r, 1 − ε, 1 + ε)), r of `ratios`.   -> scalar.

    PPO's clipped surrogate (Schulman et al., 2017), α apart; at α = 1 that bit for bit.

    Args:
        logps: log π_θ of the tokens [b, t], nats, under the distribution that they were drawn from (temperature).
        old_logps: the same of the policy that drew them.
        advantages: A [b, t], or one a sample [b].
        mask: [b, t].
        alpha: α ≥ 0, one a sample [b], or a number for all.
        clip: ε > 0; may be infinite.
        level: "sequence" is GSPO: r of the whole sample, and a mean over samples (with a token) of the means over their
            tokens: each counts once, whatever its length.
        normaliser: number of valid tokens (level="sequence": samples) of the whole step, so that the losses of its
            passes add up. (DDP averages gradients: multiply by the number of processes.) Default: of this batch.

    >>> old, new = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, 0.0]])  # r = 1, e; the second is clipped
    >>> round(policy_loss(new, old, torch.tensor([2.0]), torch.tensor([[True, True]]), 1.0, clip=0.2).item(), 4)
    -2.2

    Raises:
        ValueError: ε ≤ 0; at a valid token a NaN or infinite advantage, old log-probability or α, or α < 0; shapes.
    """
    if advantages.dim() == 1 and logps.dim() == 2 and len(advantages) == len(logps):
        advantages = advantages[:, None].expand(logps.shape)
    valid = _valid(mask, logps, old_logps=old_logps, advantages=advantages)
    _check_clip(clip)
    ratio = ratios(logps, old_logps, valid, level)
    (advantage,) = _filled(valid, advantages.detach())
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return _mean(loss, valid, alpha, normaliser, level)


def retention_loss(
    logps: Tensor, previous_logps: Tensor, mask: Tensor, beta: Tensor | float,
    *, normaliser: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """L^KR: mean over valid tokens of β · (log π_θ − log π_{t−1})².   -> scalar, nats².

    `previous_logps` is of the anchor: the last task's policy, or that of the rollout (official code). All [b, t]; β ≥ 0
    and `normaliser` as α and that in `policy_loss`.

    >>> retention_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -4.0]]), torch.ones(1, 2), 0.5).item()
    1.0
    """
    valid = _valid(mask, logps, previous_logps=previous_logps)
    new, previous = _filled(valid, logps, previous_logps.detach())
    return _mean((new - previous).square(), valid, beta, normaliser)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float,
    *, normaliser: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """L^VF: mean over valid tokens of ½ max((V − G)², (clip(V, V_old − ε, V_old + ε) − G)²).   -> scalar.

    As in PPO's code and TRL's PPOTrainer. All [b, t]: V is trained, V_old of the rollout, G the `returns` of `gae`;
    `clip` is ε > 0 in the reward's unit, infinite for the plain square; `normaliser` as in `policy_loss`.

    >>> value_loss(torch.tensor([[3.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]]), torch.ones(1, 1), 1.0).item()
    0.5
    """
    valid = _valid(mask, values, old_values=old_values, returns=returns)
    _check_clip(clip)
    new, old, target = _filled(valid, values, old_values.detach(), returns.detach())
    clipped = new.clamp(old - clip, old + clip)
    return _mean(0.5 * torch.maximum((new - target).square(), (clipped - target).square()), valid, 1.0, normaliser)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t; returns A + V.   [b, t] each, 0 where masked, no gradient.

    GAE (Schulman et al., 2016). t + 1 is the next valid token, so padding may stand anywhere; after the last one both
    A and V are 0. λ = 1: discounted return − V; λ = 0: the TD error.

    >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.5, 9.0]])
    >>> gae(rewards, values, torch.tensor([[True, True, False]]), gamma=1.0, lam=0.5)[0].tolist()  # 0 + ½ · ½; 1 − ½
    [[0.25, 0.5, 0.0]]
    """
    valid = _valid(mask, rewards=rewards, values=values)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in [0, 1], not {gamma} and {lam}")
    r, v = _filled(valid, rewards, values)
    advantages = torch.zeros_like(v)
    next_value = next_advantage = v.new_zeros(len(v))
    for t in reversed(range(v.shape[1])):
        advantage = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * next_advantage
        next_value = torch.where(valid[:, t], v[:, t], next_value)
        next_advantage = torch.where(valid[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(valid[:, t], advantage, 0)
    return advantages, advantages + v


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − mean)/σ over the valid tokens of the batch, plus the mean if not `shift_mean`.   [b, t], 0 where masked.

    σ is the population's; where it is 0, or there is one token, x − mean = 0. No gradient.

    >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    valid = _valid(mask, values=values)
    (out,) = _filled(valid, values)
    x = out[valid]
    z = _standardised(x, torch.zeros_like(x, dtype=torch.long))
    out[valid] = (z if shift_mean or not len(x) else z + x.double().mean()).to(out.dtype)
    return out


@torch.no_grad()
def token_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, ended: Tensor,
    kl_coef: float, missing_end: float = -1.0,
) -> Tensor:  # fmt: skip
    """−kl_coef (log π − log π_ref), + score at the last valid token, + missing_end there if not ended.   -> [b, t].

    PPO's rewards, 0 where masked, without gradient: `scores` [b] of whole samples; log π and log π_ref [b, t], nats, of
    the policy that drew the tokens and of the KL's reference; `ended` [b], False where a sample was cut off before its
    end token. kl_coef ≥ 0; `missing_end` is in the reward's unit.

    >>> logps, ref_logps, whole = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]]), torch.ones(1, 2)
    >>> token_rewards(torch.tensor([3.0]), logps, ref_logps, whole, torch.tensor([False]), kl_coef=0.5).tolist()
    [[-0.5, 2.0]]
    """
    if mask.dim() != 2 or not scores.shape == ended.shape == mask.shape[:1]:
        raise ValueError(f"scores and ended must be {[*mask.shape[:1]]}, not {[*scores.shape]} and {[*ended.shape]}")
    if not 0 <= kl_coef < math.inf or not math.isfinite(missing_end):
        raise ValueError(f"need kl_coef >= 0 and a finite missing_end, not {kl_coef} and {missing_end}")
    end = scores[:, None].expand(mask.shape)
    valid = _valid(mask, scores=end, logps=logps, ref_logps=ref_logps)
    score, new, ref = _filled(valid, end, logps, ref_logps)
    last = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
    penalty = torch.where(ended[:, None] != 0, 0.0, missing_end)
    return torch.where(last, score + penalty, 0) - kl_coef * (new - ref)


def adapt_kl(coef: float, kl: float, target: float, horizon: float, n: float) -> float:
    """Coef · (1 + clip(kl/target − 1, −0.2, 0.2) · n/horizon): the KL's coefficient after n more samples.

    The controller of Ziegler et al. (2019). `kl` is the mean over samples of KL(π‖π_ref) in nats, to the reference of
    the reward, not to the rollout's policy (which stays near 0 and would turn the penalty off). n is below 5 horizons:
    more could bring the coefficient to 0, where it would stay.

    >>> round(adapt_kl(0.1, kl=12.0, target=6.0, horizon=10000, n=500), 6)  # 0.1 (1 + 0.2 · 0.05)
    0.101
    """
    if not (math.isfinite(kl) and coef > 0 and target > 0 and horizon > 0 and 0 <= n < 5 * horizon):
        raise ValueError(f"need 0 <= n < 5 horizons, a finite {kl=}, others > 0: {coef=}, {target=}, {horizon=}, {n=}")
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


@torch.no_grad()
def group_advantages(rewards: Tensor, groups: Tensor, scale: bool = True) -> Tensor:
    """A = (R − mean of its group)/σ of its group, 0 where σ is 0 or the group has one sample.   [b], [b] -> [b].

    GRPO (Shao et al., 2024); scale=False does not divide (Dr. GRPO, Liu et al., 2025). `groups` says which samples
    answer one prompt, by any whole numbers in any order. σ is the population's.

    >>> group_advantages(torch.tensor([0.0, 7.0, 4.0]), torch.tensor([5, 8, 5])).tolist()
    [-1.0, 0.0, 1.0]
    """
    if rewards.dim() != 1 or rewards.shape != groups.shape:
        raise ValueError(f"rewards and groups must be [b], not {[*rewards.shape]} and {[*groups.shape]}")
    if not bool(rewards.isfinite().all()):
        raise ValueError(f"reward {int((~rewards.isfinite()).nonzero()[0])} is not finite")
    kind = torch.promote_types(rewards.dtype, torch.float32)
    return _standardised(rewards, groups.unique(return_inverse=True)[1], scale).to(kind)


def ratios(logps: Tensor, old_logps: Tensor, mask: Tensor, level: Level = "token") -> Tensor:
    """π_θ/π_old of each token, or s = exp(mean over the sample's tokens of log π_θ/π_old).   -> [b, t], 1 where masked.

    level="sequence": GSPO (Zheng et al., 2025) in its token form, s · π_θ/sg[π_θ] with sg the stopped gradient: each
    token has the value s of its sample, and the gradient s ∇log π_θ of its own. Their mean over a sample is s, in value
    and gradient.

    >>> ratios(torch.tensor([[0.0, -1.0]]), torch.tensor([[-1.0, 0.0]]), torch.ones(1, 2), "sequence").tolist()
    [[1.0, 1.0]]
    """
    valid = _valid(mask, logps, old_logps)
    new, old = _filled(valid, logps, old_logps.detach())
    gap = new - old
    if level == "token":
        return gap.clamp(max=MAX_LOG_RATIO).exp()
    if level != "sequence":
        raise ValueError(f"level must be token or sequence, not {level!r}")
    mean = gap.detach().sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    own = (new - new.detach()).masked_fill(~new.isfinite(), 0)  # 0, with the gradient of log π_θ; −∞ has none
    return torch.where(valid, mean.clamp(max=MAX_LOG_RATIO).exp() * own.exp(), 1)


@torch.no_grad()
def importance_weights(
    prox_logps: Tensor, behaviour_logps: Tensor, mask: Tensor, clip: float, level: Level = "token"
) -> Tensor:  # fmt: skip
    """Of each token w = min(c, π_prox/μ), where an older policy μ drew the sample.   -> [b, t], no gradient.

    The decoupled objective (Hilton et al., 2022; AReaL, 2025) is E_μ[w · max(−A r, −A clip(r, 1 − ε, 1 + ε))], r =
    π_θ/π_prox: clipped at a recent policy π_prox, whoever drew. As w ≥ 0, it is `policy_loss` of advantages w · A.
    Truncated at c (Ionides, 2008), so that a token that μ hardly knew moves nothing far; w = 1 where μ = π_prox.

    Args:
        prox_logps: log π_prox [b, t], nats: of the policy where the phase begins; `old_logps` of `policy_loss`.
        behaviour_logps: log μ [b, t], of the policy that drew.
        mask: [b, t]; 1 where masked.
        clip: c ≥ 1; may be infinite.
        level: as in `ratios`: "sequence" has one w a sample, of its mean log-ratio, as GSPO's r.

    >>> prox, behaviour = torch.tensor([[-1.0, -1.0, -3.0]]), torch.tensor([[-1.0, -3.0, -2.0]])  # π/μ = 1, e², 1/e
    >>> [round(w, 4) for w in importance_weights(prox, behaviour, torch.ones(1, 3), clip=2.0)[0].tolist()]
    [1.0, 2.0, 0.3679]

    Raises:
        ValueError: c < 1; at a valid token a log-probability that is NaN or infinite; shapes that do not fit.
    """
    if not clip >= 1:
        raise ValueError(f"clip must be at least 1, where both policies agree, not {clip}")
    valid = _valid(mask, prox_logps=prox_logps, behaviour_logps=behaviour_logps)
    return ratios(prox_logps, behaviour_logps, valid, level).clamp(max=clip)


@torch.no_grad()
def statistics(
    logps: Tensor, old_logps: Tensor, mask: Tensor, clip: float, level: Level = "token"
) -> dict[str, Tensor]:
    """How far the update went, as means over valid tokens: all 0 where nothing moved.   -> scalars.

    `clip_fraction`: of |r − 1| > ε, r of `ratios`; `kl_k1`: −log r, `kl_k3`: r − 1 − log r ≥ 0 of the token's own r:
    two unbiased estimates of KL(π_old‖π_θ), in nats a token (Schulman, 2020).

    >>> moved = statistics(torch.tensor([[-2.0]]), torch.tensor([[-1.0]]), torch.ones(1, 1), clip=0.2)
    >>> {name: round(value.item(), 4) for name, value in moved.items()}  # r = 1/e
    {'clip_fraction': 1.0, 'kl_k1': 1.0, 'kl_k3': 0.3679}
    """
    _check_clip(clip)
    outside = (ratios(logps, old_logps, mask, level) - 1).abs() > clip
    valid, (new, old) = mask != 0, _filled(mask != 0, logps, old_logps)
    gap = (new - old).clamp(max=MAX_LOG_RATIO)
    of = {"clip_fraction": outside.to(gap.dtype), "kl_k1": -gap, "kl_k3": gap.expm1() - gap}
    return {name: _mean(each, valid, 1.0, None) for name, each in of.items()}


def _leading(
    z_p: Scores, z_r: Scores, k: float, lb: float, ub: float, lead: Lead
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Scores that (α, β) follow [n, 2], float64; which side of the bucket each is on (±1; 0, 0 in normal); a type."""
    if not k >= 0 or not 0 <= lb <= 1 <= ub < math.inf:
        raise ValueError(f"need k >= 0 and 0 <= lb <= 1 <= ub < infinity, not k {k}, lb {lb}, ub {ub}")
    if lead not in ("reward", "probability"):
        raise ValueError(f"lead must be reward or probability, not {lead!r}")
    p, r = (z if isinstance(z, Tensor) else torch.as_tensor(z, dtype=torch.float64) for z in (z_p, z_r))
    if p.shape != r.shape:
        raise ValueError(f"z_p and z_r must be of one shape, not {tuple(p.shape)} and {tuple(r.shape)}")
    z = torch.stack([r, p] if lead == "reward" else [p, r], dim=-1).detach().double()
    at = z.round(decimals=9)
    side = (at > k).double() - (at < -k).double()
    side = side * (side != 0).all(dim=-1, keepdim=True)
    return z, side, torch.promote_types(torch.promote_types(p.dtype, r.dtype), torch.float32)


def _fit(
    z: Tensor, side: Tensor, start: Tensor, bounds: tuple[float, float], power: int, strength: tuple[float, float],
    lr: float, steps: int,
) -> Tensor:  # fmt: skip
    """The fit of `learned_weights`.   [n, 2], [n, 2], [3, 2] -> [n, 2]; columns are α's and β's."""
    (lb, ub), (tau, penalty) = bounds, strength
    corners = torch.tensor([[0.0, 0], [1, 1], [1, -1], [-1, 1], [-1, -1]])  # of which normal is none
    inside = (side == corners[:, None]).all(dim=2)  # [5, n]
    full = inside.any(dim=1, keepdim=True)
    means = inside.double() / inside.sum(dim=1, keepdim=True).clamp(min=1)
    signs = corners * full
    exponent = torch.tensor([1, power])
    # where 1 is in the range; 0 and 1 would be infinitely far
    share = torch.tensor((1 - lb) / (ub - lb) if ub > lb else 0.5, dtype=torch.float64).clamp(0.05, 0.95)
    phi = (start + torch.tensor([[0.0], [0], [1]]) * torch.logit(share ** (1 / exponent))).requires_grad_()
    x = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
    adam = torch.optim.Adam([phi], lr=lr)
    for _ in range(steps):
        w = (ub - lb) * torch.sigmoid(x @ phi) ** exponent + lb
        bucket = means @ w
        d = signs * (torch.where(full[0], bucket[0], 1) - bucket)
        wrong = torch.relu(d + signs.abs() * (ub - lb) / 100)
        adam.zero_grad()
        ((w - 1).square().mean(dim=0).sum() + tau * (d + penalty * wrong).sum()).backward()
        adam.step()
    return ((ub - lb) * torch.sigmoid(x @ phi.detach()) ** exponent + lb).clamp(lb, ub)


def _valid(mask: Tensor, *tensors: Tensor, **constants: Tensor) -> Tensor:
    """The mask as bool, once all shapes fit, and the constants are finite where it is True."""
    shapes = [tuple(each.shape) for each in (mask, *tensors, *constants.values())]
    if mask.dim() != 2 or len(set(shapes)) > 1:
        raise ValueError(f"need mask and tensors of one shape [b, t], not {', '.join(map(str, shapes))}")
    valid = mask != 0
    for name, each in constants.items():
        broken = (valid & ~each.isfinite()).nonzero()
        if len(broken):
            row, token = broken[0].tolist()
            raise ValueError(f"{name} must be finite, not {each[row, token].item()} (row {row}, token {token})")
    return valid


def _check_clip(clip: float) -> None:
    if not clip > 0:
        raise ValueError(f"clip must be positive, not {clip}")


def _filled(valid: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors with 0 where masked, in one type, float32 at least. First of all: 0 · NaN is NaN."""
    kind = torch.float32
    for each in tensors:
        kind = torch.promote_types(kind, each.dtype)
    return [each.to(kind).masked_fill(~valid, 0) for each in tensors]


def _mean(
    values: Tensor, valid: Tensor, weight: Tensor | float, normaliser: Tensor | float | None, level: Level = "token"
) -> Tensor:
    """Σ weight · values / number, over valid tokens, or over samples of their means.   [b, t] -> scalar."""
    w = torch.as_tensor(weight, dtype=values.dtype, device=values.device).detach()
    if w.dim() and w.shape != values.shape[:1]:
        raise ValueError(f"weights must be a number or one a sample, [{len(values)}], not {[*w.shape]}")
    w = (w[:, None] if w.dim() else w).expand_as(values)
    if bool((valid & ~((w >= 0) & w.isfinite())).any()):
        raise ValueError(f"weights of samples must be finite and >= 0, not {weight}")
    weighted = (values * w).masked_fill(~valid, 0)
    size = valid.sum(dim=1)
    if level == "sequence":
        weighted, count = weighted.sum(dim=1) / size.clamp(min=1), (size > 0).sum()
    else:
        count = size.sum()
    total = torch.as_tensor(count if normaliser is None else normaliser, dtype=values.dtype, device=values.device)
    return weighted.sum() / torch.where(total > 0, total, 1)


def _standardised(x: Tensor, group: Tensor, scale: bool = True) -> Tensor:
    """(x − mean)/σ within groups 0, 1, …; 0 in one of equal values, whatever their mean rounds to.   [n], float64.

    Values that differ by rounding alone (1e-12 of the largest; 1e-6, where they are float32) are equal.
    """
    noise = 1e-12 if x.dtype == torch.float64 else 1e-6
    x = x.double()
    size = torch.bincount(group).double()
    mean = torch.zeros_like(size).index_add(0, group, x) / size
    centred = x - mean[group]
    std = (torch.zeros_like(size).index_add(0, group, centred.square()) / size).sqrt()
    low, high = (torch.zeros_like(x).scatter_reduce(0, group, x, how, include_self=False) for how in ("amin", "amax"))
    equal = high - low <= noise * torch.maximum(low.abs(), high.abs())
    return torch.where(equal[group], 0, centred / std[group] if scale else centred)
